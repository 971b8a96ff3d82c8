"""One row of a file of answers that are already there: dialogues, or samples that Puna drew."""

from typing import Any, NamedTuple

from puna.core.documents import are_ids, field, shortened
from puna.core.text.chat import Message
from puna.trainers.data.columns import Columns
from puna.trainers.data.formats import Row, parse_dialogue, parse_prompt
from puna.trainers.data.messages import Malformed


class Answered(NamedTuple):
    """An answer and what it answers."""

    messages: list[Message]
    """The prompt: up to the last user message."""
    answer: str
    tokens: list[int]
    """The ids as they were drawn, EOS included where there was one; empty: not known."""
    is_safety: bool
    """Whether the prompt was written to draw out an unsafe answer (Eq. 4's is_safety)."""
    row: dict[str, Any]
    """The row as it was."""
    where: str = ""


def parse_answered(row: Row, columns: Columns) -> Answered:
    """A dialogue that ends with an answer (`messages`, or `prompt` and `response`) and perhaps
    `safety`: true or false; or a row of samples.jsonl."""
    if "tokens" in row and "answer" in row:
        return _sample(row)
    messages = parse_dialogue(row, columns).messages
    safety = row.get(columns.safety, False)
    if not isinstance(safety, bool):
        raise Malformed(f"'{columns.safety}' is {shortened(safety)}, expected true or false")
    return Answered(messages[:-1], messages[-1]["content"], [], safety, dict(row))


def _sample(row: Row) -> Answered:
    known = {name: row[name] for name in row}  # whatever a sample says is its own
    try:
        tokens = field(known, "tokens", list)
        answer, is_safety = field(known, "answer", str), field(known, "is_safety", bool)
    except ValueError as error:
        raise Malformed(str(error)) from error
    if not tokens or not are_ids(tokens):
        raise Malformed(f"tokens is {shortened(tokens)}, expected ids")
    prompt = parse_prompt({"messages": known.get("messages")}, Columns())
    return Answered(prompt.messages, answer, tokens, is_safety, known)
