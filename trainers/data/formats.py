"""One row of a user's file as a dialogue, a preference or a prompt.

A row is a JSON object. `Malformed` says that it cannot be read (the run stops), `Unusable` that
it can be read but not learned from (it is skipped and counted). Columns and values with other
names than ours are mapped by the recipe's `[columns]` and `[ratings]`, or by a layout that is known
by its columns (`layouts`).
"""

import json
import re
from typing import Any, NamedTuple

from puna.core.documents import count_of, shortened
from puna.core.text.chat import Message
from puna.trainers.data.cells import (
    Row,
    check_dialogue,
    check_prompt,
    check_text,
    check_unicode,
    has,
    missing,
    optional,
    string,
)
from puna.trainers.data.columns import Columns as Columns
from puna.trainers.data.columns import Ratings as Ratings
from puna.trainers.data.messages import Malformed, Unusable, either, message_of, messages_of

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
SAFETY = ("chosen_safe", "both_safe", "both_unsafe")
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Dialogue(NamedTuple):
    """A dialogue that ends with an assistant message."""

    messages: list[Message]
    where: str = ""
    """`file:line`, for messages about it."""


class Preference(NamedTuple):
    """Two answers to one prompt and which of them a person preferred."""

    messages: list[Message]
    """The prompt: up to the last user message."""
    chosen: str
    rejected: str
    rating: str | None = None
    """How much better, one of RATINGS; None where nobody was asked."""
    safety: str | None = None
    """One of SAFETY; None where nobody was asked."""
    batch: int | None = None
    """The week or round in which it was collected."""
    chosen_model: str = ""
    """What gave the answers, and at which temperature; empty and None where it is not known."""
    rejected_model: str = ""
    chosen_temperature: float | None = None
    rejected_temperature: float | None = None
    where: str = ""


class Prompt(NamedTuple):
    """A dialogue that ends with a user message, to be answered by a model."""

    messages: list[Message]
    is_safety: bool = False
    """Whether it was written to draw out an unsafe answer (Eq. 4's is_safety)."""
    where: str = ""
    category: str = ""
    """The kind of risk, where the row says it."""


class Start(NamedTuple):
    """A text to be continued, as it is."""

    text: str
    where: str = ""


class Preprompt(NamedTuple):
    """What stands before an adversarial prompt while its answer is sampled (section 4.2.4)."""

    text: str
    category: str = ""
    """The kind of risk that it is for; empty: for all that have none of their own."""
    where: str = ""


class Ghost(NamedTuple):
    """The user's side of a dialogue and an instruction to keep; either may be left out."""

    turns: list[str]
    instruction: str | None = None
    short: str | None = None
    where: str = ""


def parse_text(row: Row, columns: Columns) -> str:
    """The text of a row."""
    text = string(row, columns.text)
    if not text.strip():
        raise Unusable("the text is empty")
    check_unicode(text)
    return text


def parse_dialogue(row: Row, columns: Columns) -> Dialogue:
    """`messages`, or `prompt` and `response`."""
    if has(row, columns.messages):
        messages = _messages(row, columns)
    elif has(row, columns.prompt) and has(row, columns.response):
        messages = _prompt(row, columns)
        answer = _answer_to(messages, row[columns.response], columns.response)
        messages = [*messages, message_of("assistant", answer)]
    else:
        raise missing(row, f"'{columns.messages}' or '{columns.prompt}' and '{columns.response}'")
    check_dialogue(messages)
    if messages[-1]["role"] != "assistant":
        raise Unusable("the dialogue does not end with an assistant message")
    return Dialogue(messages)


def parse_prompt(row: Row, columns: Columns) -> Prompt:
    """`messages` or `prompt`, and perhaps `safety`, true or false, and `category`; of two
    transcripts what stands before the answers."""
    if has(row, columns.messages):
        messages = _messages(row, columns)
    elif has(row, columns.prompt):
        messages = _prompt(row, columns)
    elif has(row, columns.chosen):  # a comparison's own
        messages = _chosen_and_rejected(row, columns)[0]
    else:
        raise missing(row, f"'{columns.messages}' or '{columns.prompt}'")
    safety = row.get(columns.safety, False)
    if not isinstance(safety, bool):
        raise Malformed(f"'{columns.safety}' is {shortened(safety)}, expected true or false")
    check_prompt(messages)
    return Prompt(messages, safety, category=_category(row, columns))


def parse_start(row: Row, columns: Columns) -> Start:
    """`prompt` or `text`; an empty one is a beginning, too."""
    name = next((each for each in (columns.prompt, columns.text) if has(row, each)), None)
    if name is None:
        expected = f"'{columns.prompt}' or '{columns.text}'"
        raise missing(row, f"{expected} (with --chat also '{columns.messages}')")
    text = string(row, name)
    check_unicode(text)
    return Start(text)


def parse_preprompt(row: Row, columns: Columns) -> Preprompt:
    """`preprompt`, and perhaps `category`."""
    text = string(row, columns.preprompt).strip()
    if not text:
        raise Unusable("the preprompt is empty")
    check_text(text, "system")
    return Preprompt(text, _category(row, columns))


def _category(row: Row, columns: Columns) -> str:
    return string(row, columns.category) if has(row, columns.category) else ""


def parse_ghost(row: Row, columns: Columns) -> Ghost:
    """`turns` (what the user says) or `messages` (their user messages are taken), and perhaps
    `instruction` and `short`."""
    told = parse_instruction(row, columns) if has(row, columns.instruction) else Ghost([])
    if has(row, columns.turns):
        turns = row[columns.turns]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise Malformed(f"'{columns.turns}' is {shortened(turns)}, expected a list of texts")
    elif has(row, columns.messages):
        messages = messages_of(row[columns.messages], columns.messages)
        turns = [message["content"] for message in messages if message["role"] == "user"]
    else:
        raise missing(row, f"'{columns.turns}' or '{columns.messages}'")
    if not turns:
        raise Unusable("the dialogue has no user message")
    for turn in turns:
        check_text(turn, "user")
    return told._replace(turns=turns)


def parse_instruction(row: Row, columns: Columns) -> Ghost:
    """`instruction`, and perhaps `short`: what may stand for it in training."""
    instruction = string(row, columns.instruction)
    short = string(row, columns.short) if has(row, columns.short) else instruction
    for name, text in (("instruction", instruction), ("short instruction", short)):
        check_text(text, name)
    return Ghost([], instruction, short)


def parse_preference(row: Row, columns: Columns, ratings: Ratings) -> Preference:
    """A comparison: `chosen` and `rejected` to a prompt, two transcripts, or `a` and `b`.

    `ratings` maps the file's values to ours: the rating levels; for answers a and b, which of
    them is better and how much (`a better`), or which alone (`a`); `tie`; and `safe` or `unsafe`
    for one answer.
    """
    if columns.a or columns.b:
        preference = _compared(row, columns, ratings)
    else:
        messages, chosen, rejected = _chosen_and_rejected(row, columns)
        rating = row.get(columns.rating)
        level = None if rating is None else _value(rating, columns.rating, ratings, RATINGS)
        safety = _safety(row, columns, ratings)
        preference = Preference(messages, chosen, rejected, level, safety)
    check_prompt(preference.messages)
    for answer in (preference.chosen, preference.rejected):
        check_text(answer)
    if preference.chosen.strip() == preference.rejected.strip():
        raise Unusable("the two answers are the same")
    if preference.safety == "chosen_unsafe":
        raise Unusable("the chosen answer is unsafe and the rejected one safe")
    return preference._replace(batch=_batch(row, columns), **_variants(row))


def _compared(row: Row, columns: Columns, ratings: Ratings) -> Preference:
    """A row with answers a and b and a verdict on them."""
    if not (columns.a and columns.b and columns.rating):
        raise Malformed("[columns] maps one of a, b and rating without the others")
    messages = _prompt_or_messages(row, columns)
    answers = {"a": string(row, columns.a), "b": string(row, columns.b)}
    known = tuple(f"{better} {level}" for better in "ab" for level in RATINGS)
    verdict = _value(row.get(columns.rating), columns.rating, ratings, ("a", "b", *known))
    better, _, level = verdict.partition(" ")
    worse = "b" if better == "a" else "a"
    safety = None
    if columns.a_safe and columns.b_safe:
        names = {"a": columns.a_safe, "b": columns.b_safe}
        safe = {side: _is_safe(row.get(name), name, ratings) for side, name in names.items()}
        safety = _safety_label(safe[better], safe[worse])
    return Preference(messages, answers[better], answers[worse], level or None, safety)


def _chosen_and_rejected(row: Row, columns: Columns) -> tuple[list[Message], str, str]:
    """(prompt, chosen answer, rejected answer) in each of the layouts that are read as they are."""
    for name in (columns.chosen, columns.rejected):
        if name not in row:
            raise missing(row, f"'{name}'")
    names = (columns.chosen, columns.rejected)
    pair = (row[columns.chosen], row[columns.rejected])
    if has(row, columns.messages) or has(row, columns.prompt):
        messages = _prompt_or_messages(row, columns)
        chosen, rejected = map(_answer_to, (messages, messages), pair, names)
        return messages, chosen, rejected
    dialogues = [
        parse_transcript(side)
        if isinstance(side, str)
        else messages_of(side, columns.chosen, or_text=True)
        for side in pair
    ]
    for dialogue in dialogues:
        if not dialogue or dialogue[-1]["role"] != "assistant":
            raise Unusable("the dialogue does not end with an assistant message")
    chosen_dialogue, rejected_dialogue = dialogues
    if chosen_dialogue[:-1] != rejected_dialogue[:-1]:
        raise Unusable("the two dialogues differ before their last answer")
    return (
        chosen_dialogue[:-1],
        chosen_dialogue[-1]["content"],
        rejected_dialogue[-1]["content"],
    )


def parse_transcript(text: str) -> list[Message]:
    """A dialogue written as paragraphs that begin with `Human:` or `Assistant:` (Anthropic's HH).

    Raises Malformed where the text does not begin with `Human:` or `Assistant:`.
    """
    before, *turns = SPEAKER.split(text)
    if before.strip() or not turns:
        raise Malformed(
            "there is neither 'messages' nor 'prompt', and 'chosen' or 'rejected' is no "
            f"transcript: it begins with {shortened(text)}, expected 'Human:' or 'Assistant:'"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        message_of(roles[speaker], content.strip())
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def _answer_to(messages: list[Message], answer: Any, name: str) -> str:
    """An answer: its text, or messages that are it alone or the prompt and it."""
    if isinstance(answer, str):
        return answer
    dialogue = messages_of(answer, name, or_text=True)
    if dialogue[: len(messages)] == messages:
        dialogue = dialogue[len(messages) :]
    if len(dialogue) != 1 or dialogue[0]["role"] != "assistant":
        raise Malformed(
            f"'{name}' holds {count_of(len(dialogue), 'message')} after the prompt, "
            "expected one assistant "
            "message"
        )
    return dialogue[0]["content"]


def _prompt_or_messages(row: Row, columns: Columns) -> list[Message]:
    return _messages(row, columns) if has(row, columns.messages) else _prompt(row, columns)


def _messages(row: Row, columns: Columns) -> list[Message]:
    """The messages column, under the system column where it has no system message of its own."""
    messages = messages_of(row[columns.messages], columns.messages)
    return (
        messages
        if messages[:1] and messages[0]["role"] == "system"
        else [*_system(row, columns), *messages]
    )


def _prompt(row: Row, columns: Columns) -> list[Message]:
    """The prompt column: one user message as text, or messages; and what goes with it."""
    if isinstance(row.get(columns.prompt), list):
        messages = messages_of(row[columns.prompt], columns.prompt, or_text=True)
    else:
        text = "\n\n".join([string(row, columns.prompt), *optional(row, columns.input)])
        messages = [message_of("user", text)]
    return _system(row, columns) + messages


def _system(row: Row, columns: Columns) -> list[Message]:
    return [message_of("system", text) for text in optional(row, columns.system)]


def _safety(row: Row, columns: Columns, ratings: Ratings) -> str | None:
    value = row.get(columns.safety)
    if value is None:
        return None
    return _value(value, columns.safety, ratings, (*SAFETY, "chosen_unsafe"))


def _safety_label(chosen_safe: bool, rejected_safe: bool) -> str:
    if chosen_safe:
        return "both_safe" if rejected_safe else "chosen_safe"
    return "chosen_unsafe" if rejected_safe else "both_unsafe"


def _is_safe(value: Any, name: str, ratings: Ratings) -> bool:
    if isinstance(value, bool):
        return value
    return _value(value, name, ratings, ("safe", "unsafe")) == "safe"


def _value(value: Any, name: str, ratings: Ratings, known: tuple[str, ...]) -> str:
    """The file's value in our terms, by way of the recipe's [ratings]."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # Parquet's whole numbers beside missing ones
    key = value if isinstance(value, str) else json.dumps(value, default=str)
    mapped = ratings.get(key, key)
    if mapped == "tie":
        raise Unusable("a tie where a ranking is asked for")
    if mapped not in known:
        raise Malformed(
            f"'{name}' is {shortened(value)}, expected {either(known)}; "
            "map the file's own values in the recipe's [ratings]"
        )
    return mapped


def _variants(row: Row) -> dict[str, Any]:
    """What gave each of the two answers, where the row says so."""
    found: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        model, temperature = row.get(f"{side}_model"), row.get(f"{side}_temperature")
        if model is not None:
            found[f"{side}_model"] = string(row, f"{side}_model")
        if temperature is not None:
            if type(temperature) not in (int, float):
                raise Malformed(
                    f"'{side}_temperature' is {shortened(temperature)}, expected a number"
                )
            found[f"{side}_temperature"] = float(temperature)
    return found


def _batch(row: Row, columns: Columns) -> int | None:
    batch = row.get(columns.batch)
    if batch is not None and type(batch) is not int:
        raise Malformed(f"'{columns.batch}' is {shortened(batch)}, expected a whole number")
    return batch
