"""A list of messages in a row of a user's file, and what may be wrong with a row at all."""

from collections.abc import Mapping
from typing import Any, cast

from puna.core.chat import Message
from puna.core.documents import shortened

ROLES = ("system", "user", "assistant")
MESSAGE = {"role", "content", "weight"}  # what is read of one


class Malformed(ValueError):
    """The row cannot be read: what is wrong, and what was expected."""


class Unusable(ValueError):
    """The row can be read but not learned from: the reason to count it under."""


def messages_of(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise Malformed(f"'{name}' is {shortened(value)}, expected a list of messages")
    messages = []
    for index, item in enumerate(value):
        where = f"'{name}[{index}]'"
        if not isinstance(item, dict):
            raise Malformed(
                f"{where} is {shortened(item)}, expected an object with role and content"
            )
        if item.get("role") not in ROLES:
            raise Malformed(
                f"{where} has role {shortened(item.get('role'))}, expected {either(ROLES)}"
            )
        if not isinstance(item.get("content"), str):
            raise Malformed(
                f"{where} has content {shortened(item.get('content'))}, expected a string"
            )
        message = message_of(item["role"], item["content"])
        if item.get("weight") is not None:
            message["weight"] = _weight(item["weight"], where)
        messages.append(message)
    return messages


def _weight(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise Malformed(f"{where} has weight {shortened(value)}, expected a number from 0 to 1")
    return float(value)


def message_of(role: str, content: str) -> Message:
    return cast(Message, {"role": role, "content": content})


def inside_messages(row: Mapping[str, Any]) -> list[str]:
    """What stands in a row's messages and is not read: "messages[].wieght"."""
    return [
        f"{name}[].{key}"
        for name, value in row.items()
        if isinstance(value, list)
        for item in value
        if isinstance(item, dict) and "role" in item and item.keys() - MESSAGE
        for key in item
        if key not in MESSAGE
    ]


def either(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
