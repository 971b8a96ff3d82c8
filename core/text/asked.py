"""Texts and chats as callers hand them over, and the ids that a model reads of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from puna.core.text.chat import (
    Message,
    check_dialogue,
    encode_answer,
    encode_prompt,
    tags_of,
)
from puna.core.text.tokenizer import Tokenizer


def one_or_many(given: Any) -> tuple[list[Any], bool]:
    """(texts and chats, whether it was one alone and not a list of them)."""
    if isinstance(given, str):
        return [given], True
    if not isinstance(given, Sequence):
        raise ValueError(f"expected a text, a chat or a list of them, not {_kind(given)}")
    are_messages = [isinstance(each, Mapping) for each in given]
    if given and all(are_messages):
        _check_messages(given)
        return [list(given)], True
    if any(are_messages):
        raise ValueError(
            "one list holds messages and something else; put the messages of a chat into a list of "
            "their own"
        )
    for each in given:
        if not isinstance(each, str):
            _check_messages(each)
    return list(given), False


def _check_messages(chat: Any) -> None:
    if not isinstance(chat, Sequence):
        raise ValueError(f"expected a text or a list of messages, not {_kind(chat)}")
    for message in chat:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"a message is {message!r}; it must be an object with 'role' and 'content'"
            )
        if not isinstance(message["content"], str):
            raise ValueError(f"a message's content must be a text, not {_kind(message['content'])}")


def _kind(value: Any) -> str:
    return type(value).__name__


def prompt_ids(tokenizer: Tokenizer, prompt: str | list[Message]) -> list[int]:
    """Ids up to where the text goes on, or the answer begins."""
    if isinstance(prompt, str):
        return tokenizer.encode_start(prompt)
    return encode_prompt(tokenizer, prompt)


def known_and_asked(tokenizer: Tokenizer, text: str | list[Message]) -> tuple[list[int], list[int]]:
    """BOS and a text's ids, or the ids of a chat up to its last answer and those of the answer."""
    if isinstance(text, str):
        return [tokenizer.bos_id], tokenizer.encode(text)
    if not text or text[-1]["role"] != "assistant":
        raise ValueError("the chat must end with an assistant message: the answer to look at")
    check_dialogue(text, tags_of(tokenizer))
    return encode_prompt(tokenizer, text[:-1]), encode_answer(tokenizer, text[-1]["content"])
