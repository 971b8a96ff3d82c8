"""What is taken out of a row, and what may be wrong with it."""

from collections.abc import Mapping
from typing import Any, cast

from puna.core.documents import listed, shortened
from puna.core.text import chat
from puna.core.text.chat import Message
from puna.trainers.data.messages import Malformed, Unusable
from puna.trainers.data.mistaken import rows_inside

Row = Mapping[str, Any]


def has(row: Row, name: str) -> bool:
    """Whether a row has a column that says something: null is as none."""
    return bool(name) and row.get(name) is not None


def optional(row: Row, name: str) -> list[str]:
    """The text of a column that is mapped, where it says something."""
    if not name or row.get(name) is None:
        return []
    return [text] if (text := string(row, name)).strip() else []


def string(row: Row, name: str) -> str:
    if name not in row:
        raise missing(row, f"'{name}'")
    if not isinstance(row[name], str):
        raise Malformed(f"'{name}' is {shortened(row[name])}, expected a string")
    return cast(str, row[name])


def missing(row: Row, expected: str) -> Malformed:
    if null := [name for name in row if f"'{name}'" in expected and row[name] is None]:
        return Malformed(
            f"{listed(null)} {'is' if len(null) == 1 else 'are'} null, expected {expected}; give "
            "the row a text there, or leave it out"
        )
    columns = listed(row) or "none"
    return Malformed(
        f"the row has the columns {columns}, expected {expected}; "
        "rename them or, where the command has [columns], name the file's own in the recipe"
        + rows_inside(row)
    )


def check_dialogue(messages: list[Message]) -> None:
    for message in messages:
        check_unicode(message["content"])
    try:
        chat.check_dialogue(messages)
    except ValueError as error:
        raise unusable(error) from error


def check_prompt(messages: list[Message]) -> None:
    check_dialogue(messages)
    if messages[-1]["role"] != "user":
        raise Unusable("the prompt does not end with a user message")


def check_text(text: str, role: str = "assistant") -> None:
    check_unicode(text)
    try:
        chat.check_text(text, role)
    except ValueError as error:
        raise unusable(error) from error


def unusable(error: ValueError) -> Unusable:
    """The reason without its particulars, so that like rows are counted together."""
    return Unusable(str(error).split(":")[0])


def check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("the text holds a lone surrogate, which is not valid Unicode") from None
