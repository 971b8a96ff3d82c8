"""Llama 2's chat format: dialogues as ids, with one loss weight per token (paper.md section 9).

One exchange is `<s>[INST] user [/INST] answer </s>`: BOS and EOS are ids, all else is text. A
system message is folded into the first user message. Each side of an exchange is encoded on its
own. No SentencePiece piece reaches across the space after `[/INST]`, so the ids are those of the
whole text, as in Meta's code, and a prompt's ids are always the beginning of the dialogue's.

A model that brings another chat template has its dialogues written by that:
`core/text/chat_template.py` cuts them into the same parts.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

from puna.core.text import chat_template
from puna.core.text.tokenizer import Tokenizer

INST, END_INST = "[INST]", "[/INST]"
SYSTEM, END_SYSTEM = "<<SYS>>", "<</SYS>>"
TAGS = (INST, END_INST, SYSTEM, END_SYSTEM)


# What stands before a turn that is encoded on its own.
EXCHANGE: list["Message"] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]


class _Said(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class Message(_Said, total=False):
    """One message of a dialogue."""

    weight: float
    """of an assistant message: how much its tokens count when it is learned from; left out: 1"""


def tags_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tags that no message may contain, since they are text to the tokenizer: Llama 2's, and
    none where the model's template has others (whose control tokens no text can spell)."""
    template = chat_template.foreign(tokenizer)
    return TAGS if template is None or INST in template else ()


def check_dialogue(messages: Sequence[Message], tags: Sequence[str] = TAGS) -> None:
    """Raises ValueError, with the reason, for a dialogue that the chat format cannot hold.

    It may begin with one system message; then user and assistant alternate, user first. No
    message is empty, and none contains one of the tags: it could forge a turn.
    """
    for message in messages:
        check_text(message["content"], message["role"], tags)
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("the dialogue has no user message")
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise ValueError(
                f"the roles do not alternate: found {message['role']!r} where {expected!r} belongs"
            )


def check_text(text: str, role: str = "assistant", tags: Sequence[str] = TAGS) -> None:
    """Raises ValueError where a message's text is empty or contains a chat tag."""
    if not text.strip():
        raise ValueError(f"the {role} message is empty")
    for tag in tags:
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
    check_dialogue(messages, tags_of(tokenizer))
    if messages[-1]["role"] != "assistant":
        raise ValueError("a dialogue to learn from must end with an assistant message")
    ids: list[int] = []
    weights: list[float] = []
    counts = [each.get("weight", 1.0) for each in messages if each["role"] == "assistant"]
    for (prompt_ids, answer_ids), count in zip(_turns(tokenizer, messages), counts, strict=True):
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
    check_dialogue(messages, tags_of(tokenizer))
    if messages[-1]["role"] != "user":
        raise ValueError("a prompt must end with a user message")
    return chat_template.joined(_turns(tokenizer, messages, system_every_turn))


def encode_turn(
    tokenizer: Tokenizer, user: str, instruction: str = "", *, later: bool = False
) -> list[int]:
    """Ids of one user message up to where the answer begins, the instruction folded in; `later`
    where it follows on an answer's EOS. Raises ValueError as `check_dialogue` does."""
    messages: list[Message] = [{"role": "user", "content": user}]
    template = chat_template.foreign(tokenizer)
    if later and template is not None:
        if instruction:
            messages = [{"role": "user", "content": f"{instruction}\n\n{user}"}]
        check_dialogue(messages, tags_of(tokenizer))
        return chat_template.turns(tokenizer, template, [*EXCHANGE, *messages])[-1].prompt
    if instruction:
        messages.insert(0, {"role": "system", "content": instruction})
    return encode_prompt(tokenizer, messages)


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer as they follow its prompt in a dialogue: text, one space, EOS.

    Raises ValueError where the text is empty or contains a chat tag.
    """
    check_text(text, tags=tags_of(tokenizer))
    return respelled(tokenizer, text, finished=True)


def respelled(tokenizer: Tokenizer, text: str, *, finished: bool) -> list[int]:
    """`encode_answer` of whatever a model said; one that was cut off has no EOS."""
    template = chat_template.foreign(tokenizer)
    if template is None:
        return tokenizer.encode(f"{text.strip()} ", eos=finished)
    dialogue = [EXCHANGE[0], {"role": "assistant", "content": text.strip()}]
    ids = chat_template.turns(tokenizer, template, dialogue)[0].answer
    return ids if finished else ids[:-1]


def decode_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of an answer's ids, without EOS (and anything after it) and the spaces around."""
    ids = list(ids)
    end = next((n for n, token in enumerate(ids) if token in tokenizer.eos_ids), len(ids))
    return tokenizer.decode(ids[:end]).strip()


def _turns(
    tokenizer: Tokenizer, messages: Sequence[Message], system_every_turn: bool = False
) -> list[chat_template.Turn]:
    """The exchanges as ids, in Llama 2's format or the model's own."""
    template = chat_template.foreign(tokenizer)
    if template is not None:
        told = _told_every_turn(messages) if system_every_turn else messages
        return chat_template.turns(tokenizer, template, told)
    return [
        chat_template.Turn(
            _encode_user(tokenizer, user),
            [] if answer is None else encode_answer(tokenizer, answer),
        )
        for user, answer in _exchanges(messages, system_every_turn)
    ]


def _told_every_turn(messages: Sequence[Message]) -> list[Message]:
    """The system message, if any, before every user message but the first, whose template has its
    own place for it."""
    if messages[0]["role"] != "system":
        return list(messages)
    system = messages[0]["content"]
    return [
        {**each, "content": f"{system}\n\n{each['content']}"}
        if each["role"] == "user" and index > 1
        else each
        for index, each in enumerate(messages)
    ]


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
