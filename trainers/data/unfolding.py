"""Rows of ours from rows of layouts that are more than other names: rankings, trees, annotators.

Each function takes (where, row) of a whole file and gives the same of ours. What cannot be read or
used is passed on as the Malformed or Unusable that says so, in place of a row.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations
from math import inf
from os.path import commonprefix
from typing import Any, NamedTuple

from puna.core.documents import shortened
from puna.trainers.data.cells import Row, string
from puna.trainers.data.files import Rows
from puna.trainers.data.formats import SPEAKER, parse_transcript
from puna.trainers.data.messages import Malformed, Unusable

MOST_ANSWERS = 64  # of one ranking: every two of them are compared


def common_beginning(rows: Rows) -> Rows:
    """`chosen` and `rejected` as one text each, which begin alike: that is the prompt."""
    for where, row in rows:
        if isinstance(row, Mapping) and is_common_beginning(row):
            prompt = shared(row)
            answers = {name: row[name][len(prompt) :] for name in ("chosen", "rejected")}
            yield where, {**row, **answers, "prompt": prompt}
        else:
            yield where, row


def is_common_beginning(row: Row) -> bool:
    texts = [row.get("chosen"), row.get("rejected")]
    if any(row.get(name) is not None for name in ("messages", "prompt")):
        return False
    if not all(isinstance(text, str) and not SPEAKER.match(text) for text in texts):
        return False
    return bool(shared(row).strip())


def shared(row: Row) -> str:
    """What both answers begin with, up to a space, as TRL cuts it."""
    prefix = commonprefix([row["chosen"], row["rejected"]])
    return prefix[: max(prefix.rfind(" "), prefix.rfind("\n")) + 1]


def compared_by_annotators(rows: Rows) -> Rows:
    """PandaLM: each annotator says 1 or 2 for the better response, or 0 for a tie."""
    for where, row in rows:
        if not isinstance(row, Mapping):
            yield where, row
            continue
        names = [name for name in row if name.startswith("annotator")]
        votes = Counter(row[name] for name in names if type(row[name]) is int)
        (best, count), *_ = [*votes.most_common(1), (0, 0)]
        verdict = {1: "a", 2: "b"}.get(best, "tie") if count > len(names) / 2 else "tie"
        rest = {name: value for name, value in row.items() if name not in names}
        yield where, {**rest, "verdict": verdict}


def compared_neighbours(rows: Rows) -> Rows:
    """HelpSteer2: two rows with one prompt, the answer with the higher `helpfulness` is better."""
    before: tuple[str, Row] | None = None
    for where, row in rows:
        if not isinstance(row, Mapping):
            yield where, row
        elif before is None:
            before = where, row
        elif before[1].get("prompt") != row.get("prompt"):
            yield before[0], Unusable("no row beside it has the same prompt")
            before = where, row
        else:
            yield where, _neighbours(before[1], row)
            before = None
    if before is not None:
        yield before[0], Unusable("no row beside it has the same prompt")


def _neighbours(a: Row, b: Row) -> Any:
    first, second = a.get("helpfulness"), b.get("helpfulness")
    for value in (first, second):
        if type(value) not in (int, float):
            return Malformed(f"'helpfulness' is {shortened(value)}, expected a number")
    verdict = "tie" if first == second else "a" if first > second else "b"  # type: ignore[operator]
    return {"prompt": a.get("prompt"), "a": a.get("response"), "b": b.get("response"),
            "verdict": verdict}  # fmt: skip


def ranked(row: Row) -> tuple[list[dict[str, str]], list[tuple[float, str]]]:
    """(the prompt, (rank, answer) of each answer) of a ranking (Nectar's). Raises Malformed."""
    prompt = string(row, "prompt")
    messages: Any = [{"role": "user", "content": prompt}]
    if SPEAKER.match(prompt):
        messages = parse_transcript(prompt)
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            messages.pop()
    answers = row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(each, dict) for each in answers):
        raise Malformed(f"'answers' is {shortened(answers)}, expected a list of answers with ranks")
    if len(answers) > MOST_ANSWERS:
        raise Malformed(f"'answers' has {len(answers)}, expected at most {MOST_ANSWERS}")
    found = []
    for each in answers:
        rank, text = each.get("rank"), each.get("answer")
        if type(rank) not in (int, float) or not isinstance(text, str):
            raise Malformed(f"'answers' has {shortened(each)}, expected a rank and an answer")
        found.append((float(rank), text))
    return messages, found


def pairs_of_ranking(rows: Rows) -> Rows:
    """Every two answers of a ranking, the one with the lower rank preferred; ties are left out."""
    for where, row in rows:
        try:
            messages, answers = ranked(row) if isinstance(row, Mapping) else ([], [])
        except Malformed as error:
            yield where, error
            continue
        if not isinstance(row, Mapping):
            yield where, row
        yield from _pairs(where, messages, answers)


def _pairs(where: str, messages: Any, answers: list[tuple[float, str]]) -> Iterator[Any]:
    for (first, a), (second, b) in combinations(sorted(answers, key=lambda each: each[0]), 2):
        if first < second:
            yield where, {"messages": messages, "chosen": a, "rejected": b}


def prompts_of_ranking(rows: Rows) -> Rows:
    """The prompts of a ranking."""
    for where, row in rows:
        try:
            yield where, {"messages": ranked(row)[0]} if isinstance(row, Mapping) else row
        except Malformed as error:
            yield where, error


class Node(NamedTuple):
    """A message of a tree (OASST)."""

    where: str
    message: dict[str, str]
    rank: float


def whole_trees(rows: Rows) -> Rows:
    """The messages of rows that are a tree each, `prompt` with `replies` inside of one another."""
    for where, row in rows:
        if not isinstance(row, Mapping):
            yield where, row
            continue
        waiting = [(row.get("prompt"), None)]
        while waiting:
            message, parent = waiting.pop()
            if not isinstance(message, dict):
                yield where, Malformed(f"a reply is {shortened(message)}, expected a message")
                continue
            replies = message.get("replies") or []
            yield where, {**message, "parent_id": parent}
            if isinstance(replies, list):
                waiting += [(reply, message.get("message_id")) for reply in replies]


def paths(
    rows: Rows, found: list[tuple[str, Any]]
) -> Iterator[tuple[list[Node], list[Node], bool]]:
    """(the messages up to one, the replies to it, best first, whether all of the messages are the
    best replies) of all messages of a file's trees.

    What is no message is put into `found`. The whole file is in memory.
    """
    children: dict[Any, list[tuple[Any, Node]]] = {}
    for where, row in rows:
        if not isinstance(row, Mapping) or row.get("deleted") is True:
            found += [] if isinstance(row, Mapping) else [(where, row)]
            continue
        text, role, rank = row.get("text"), row.get("role"), row.get("rank")
        if not isinstance(text, str) or role not in ("prompter", "assistant"):
            reason = f"'role' is {shortened(role)} and 'text' {shortened(text)}"
            found.append(
                (where, Malformed(f"{reason}, expected prompter or assistant, and a text"))
            )
            continue
        place = float(rank) if isinstance(rank, (int, float)) else inf
        node = Node(where, {"role": role, "content": text}, place)
        children.setdefault(str(row.get("parent_id")), []).append(
            (str(row.get("message_id")), node)
        )
    waiting: list[tuple[str, list[Node], bool]] = [("None", [], True)]
    while waiting:
        name, path, is_best = waiting.pop()
        replies = sorted(children.pop(name, []), key=lambda each: each[1].rank)
        yield path, [node for _, node in replies], is_best
        waiting += [
            (key, [*path, node], is_best and (place == 0 or not path))
            for place, (key, node) in enumerate(replies)
        ][::-1]


def threads(rows: Rows) -> Rows:
    """Of each tree the dialogue in which every reply is the best one, up to its last answer."""
    found: list[tuple[str, Any]] = []
    for path, replies, is_best in paths(rows, found):
        if is_best and not replies:
            while path and path[-1].message["role"] != "assistant":
                path.pop()
            if path:
                found.append((path[-1].where, {"messages": [node.message for node in path]}))
    yield from found


def beginnings(rows: Rows) -> Rows:
    """The first message of each tree."""
    found: list[tuple[str, Any]] = []
    for path, replies, _ in paths(rows, found):
        if not path:
            found += [(node.where, {"messages": [node.message]}) for node in replies]
    yield from found


def pairs_of_trees(rows: Rows) -> Rows:
    """Every two ranked answers to a message, the one with the lower rank preferred."""
    found: list[tuple[str, Any]] = []
    for path, replies, _ in paths(rows, found):
        ranks = [(node.rank, node.message["content"]) for node in replies if node.rank < inf]
        if path and path[-1].message["role"] == "prompter":
            messages = [node.message for node in path]
            found += _pairs(path[-1].where, messages, ranks[:MOST_ANSWERS])
    yield from found
