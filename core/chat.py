"""Llama 2's chat format: dialogues as ids, with one loss weight per token (paper.md section 9).

One exchange is `<s>[INST] user [/INST] answer </s>`: BOS and EOS are ids, all else is text. A
system message is folded into the first user message. Each side of an exchange is encoded on its
own. No SentencePiece piece reaches across the space after `[/INST]`, so the ids are those of the
whole text, as in Meta's code, and a prompt's ids are always the beginning of the dialogue's.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

from puna.core.tokenizer import Tokenizer

INST, END_INST = "[INST]", "[/INST]"
SYSTEM, END_SYSTEM = "<<SYS>>", "<</SYS>>"
TAGS = (INST, END_INST, SYSTEM, END_SYSTEM)


class _Said(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class Message(_Said, total=False):
    """One message of a dialogue."""

    weight: float
    """of an assistant message: how much its tokens count when it is learned from; left out: 1"""


def check_dialogue(messages: Sequence[Message]) -> None:
    """Raises ValueError, with the reason, for a dialogue that the chat format cannot hold.

    It may begin with one system message; then user and assistant alternate, user first. No
    message is empty, and none contains one of the four tags: it could forge a turn.
    """
    for message in messages:
        check_text(message["content"], message["role"])
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("the dialogue has no user message")
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise ValueError(
                f"the roles do not alternate: found {message['role']!r} where {expected!r} belongs"
            )


def check_text(text: str, role: str = "assistant") -> None:
    """Raises ValueError where a message's text is empty or contains a chat tag."""
    if not text.strip():
        raise ValueError(f"the {role} message is empty")
    for tag in TAGS:
        if tag in text:
            raise ValueError(f"the {role} message contains the chat tag {tag}")


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[float]]:
    """Ids and weights of a whole dialogue, which ends with an assistant message.

    `weights[i]` says how much predicting `ids[i]` counts: 1, or the message's `weight`, for the
    answers' tokens and their EOS, 0 for everything else (paper section 3.1). Raises ValueError as
    `check_dialogue` does.
    """
    check_dialogue(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("a dialogue to learn from must end with an assistant message")
    ids: list[int] = []
    weights: list[float] = []
    counts = [each.get("weight", 1.0) for each in messages if each["role"] == "assistant"]
    exchanges = _exchanges(messages, system_every_turn=False)
    for (user, answer), count in zip(exchanges, counts, strict=True):
        prompt_ids = _encode_user(tokenizer, user)
        answer_ids = encode_answer(tokenizer, answer or "")
        ids += prompt_ids + answer_ids
        weights += [0.0] * len(prompt_ids) + [count] * len(answer_ids)
    return ids, weights


def spelled(messages: Sequence[Message]) -> list[tuple[str, float]]:
    """A dialogue as text, with `<s>` and `</s>` written out: (text, weight) of every side of it, as
    `encode_dialogue` has them; a last user message may be unanswered. Raises ValueError as
    `check_dialogue` does."""
    check_dialogue(messages)
    counts = iter([each.get("weight", 1.0) for each in messages if each["role"] == "assistant"])
    sides: list[tuple[str, float]] = []
    for user, answer in _exchanges(messages, system_every_turn=False):
        sides.append((f"<s>{INST} {user.strip()} {END_INST}", 0.0))
        if answer is not None:
            sides.append((f" {answer.strip()} </s>", next(counts)))
    return sides


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], *, system_every_turn: bool = False
) -> list[int]:
    """Ids of a dialogue that ends with a user message, up to where the answer begins.

    `system_every_turn` folds the system message into every user message instead of the first
    alone: the augmented context of Ghost Attention (paper section 3.3). Raises ValueError as
    `check_dialogue` does.
    """
    check_dialogue(messages)
    if messages[-1]["role"] != "user":
        raise ValueError("a prompt must end with a user message")
    ids: list[int] = []
    for user, answer in _exchanges(messages, system_every_turn):
        ids += _encode_user(tokenizer, user)
        if answer is not None:
            ids += encode_answer(tokenizer, answer)
    return ids


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer as they follow its prompt in a dialogue: text, one space, EOS.

    Raises ValueError where the text is empty or contains a chat tag.
    """
    check_text(text)
    return tokenizer.encode(f"{text.strip()} ", eos=True)


def decode_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of an answer's ids, without EOS (and anything after it) and the spaces around."""
    ids = list(ids)
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return tokenizer.decode(ids).strip()


def _exchanges(
    messages: Sequence[Message], system_every_turn: bool
) -> list[tuple[str, str | None]]:
    """(user text with the system message folded in, answer or None) of each exchange."""
    system = ""
    if messages[0]["role"] == "system":
        system = f"{SYSTEM}\n{messages[0]['content']}\n{END_SYSTEM}\n\n"
        messages = messages[1:]
    exchanges: list[tuple[str, str | None]] = []
    for index in range(0, len(messages), 2):
        folded = system if index == 0 or system_every_turn else ""
        answer = messages[index + 1]["content"] if index + 1 < len(messages) else None
        exchanges.append((folded + messages[index]["content"], answer))
    return exchanges


def _encode_user(tokenizer: Tokenizer, user: str) -> list[int]:
    return tokenizer.encode(f"{INST} {user.strip()} {END_INST}", bos=True)
