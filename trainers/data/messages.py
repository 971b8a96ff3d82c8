"""A list of messages in a row of a user's file, and what may be wrong with a row at all."""

from collections.abc import Mapping
from typing import Any, cast

from puna.core.documents import as_name, shortened
from puna.core.text.chat import Message

ROLES = ("system", "user", "assistant")
OTHERS = {  # what the roles are called elsewhere
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
# Roles that a chat of two has no place for; a developer message stands above the system's.
OF_TOOLS = (
    "tool", "developer", "function", "function_call", "observation", "ipython", "environment",
)  # fmt: skip
MESSAGE = {"role", "content", "from", "value", "weight"}  # what is read of one


class Malformed(ValueError):
    """The row cannot be read: what is wrong, and what was expected."""


class Unusable(ValueError):
    """The row can be read but not learned from: the reason to count it under."""


def messages_of(value: Any, name: str, *, or_text: bool = False) -> list[Message]:
    """A list of messages: `role` and `content`, or `from` and `value` (ShareGPT), the content a
    text or parts with texts (OpenAI). An empty system message is none. `or_text`: the column could
    have been a string, too."""
    if not isinstance(value, list):
        expected = f"{'a string or ' if or_text else ''}a list of messages"
        raise Malformed(f"'{name}' is {shortened(value)}, expected {expected}")
    messages = []
    for index, item in enumerate(value):
        where = f"'{name}[{index}]'"
        if not isinstance(item, dict):
            raise Malformed(
                f"{where} is {shortened(item)}, expected an object with role and content"
            )
        role = _role(item, where)
        text = _text(item, where)
        if role == "system" and not text.strip():
            continue
        message = message_of(role, text)
        if item.get("weight") is not None:
            message["weight"] = _weight(item["weight"], where)
        messages.append(message)
    return messages


def _role(item: Mapping[str, Any], where: str) -> str:
    said = item["role"] if item.get("role") is not None else item.get("from")
    if isinstance(said, str):
        role = OTHERS.get(said, said)
        if role in ROLES:
            return role
        if role in OF_TOOLS:
            raise Unusable(f"a message has the role {role}")
    raise Malformed(
        f"{where} has role {shortened(said)}, expected {either(ROLES)}; a recipe's [roles] maps "
        "the file's own"
    )


def _text(item: Mapping[str, Any], where: str) -> str:
    content = item["content"] if "content" in item else item.get("value")
    if content is None and ("content" in item or "value" in item):
        raise Unusable("a message has no content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        for part in content:
            if not isinstance(part.get("text"), str):
                raise Unusable(f"a message has a part that is no text ({_kind(part)})")
        return "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Malformed(f"{where} has content {shortened(content)}, expected a string")
    return content


def _kind(part: Mapping[str, Any]) -> str:
    return as_name(part["type"]) if isinstance(part.get("type"), str) else "of no type"


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
        if isinstance(item, dict) and ("role" in item or "from" in item) and item.keys() - MESSAGE
        for key in item
        if key not in MESSAGE and item[key] is not None
    ]


def renamed(row: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    """The row with the file's names of roles, a recipe's [roles], replaced by ours."""

    def ours(item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        said = {key: item[key] for key in ("role", "from") if isinstance(item.get(key), str)}
        return item | {key: roles.get(role, role) for key, role in said.items()}

    return {
        name: [ours(item) for item in value] if isinstance(value, list) else value
        for name, value in row.items()
    }


def either(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
