"""Chat templates of others: rendered in jinja2's sandbox, cut into prompts and answers.

What is learned from is found by rendering twice, up to where an answer begins and to its end. A
control token is put where the template has it, never where a message spells it: such spellings
are hidden while the template is rendered, and are read as text.
"""

import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from puna.core.text.beside import CHAT_TEMPLATE
from puna.core.text.tokenizer import Tokenizer

# What a template's own mistakes raise.
WRONG = (ArithmeticError, LookupError, TypeError, AttributeError, ValueError)
# A mark of transformers' around what an answer is; the mask is found otherwise here.
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


class Turn(NamedTuple):
    """One exchange as ids: from the end of the answer before up to where the answer begins, and
    the answer with its EOS; none where it is yet to come."""

    prompt: list[int]
    answer: list[int]


def render(template: str, messages: Sequence[Any], names: dict[str, str], ask: bool) -> str:
    """The dialogue as the template writes it; with `ask`, up to where an answer begins.

    `messages` have a role and a content, `names` are the special tokens (bos_token, ...). The date
    is not told, so that a dialogue is the same text every day. Raises ValueError for a template
    that is none, that refuses the dialogue or that writes too much.
    """
    from jinja2 import TemplateError

    from puna.core.text.sandbox import joined as bounded

    said = [{"role": each["role"], "content": each["content"]} for each in messages]
    given: dict[str, Any] = {"bos_token": "", "eos_token": "", **names, "messages": said}
    given |= {"tools": None, "documents": None, "add_generation_prompt": ask}
    try:
        return bounded(_compiled(template).generate(**given))
    except RecursionError as error:
        raise ValueError("the model's chat template is nested too deeply") from error
    except (*WRONG, TemplateError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the model's chat template does not take this dialogue ({why})"
        ) from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from puna.core.text.sandbox import Sandbox

    plain = _GENERATION.sub(lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], template)
    return Sandbox().from_string(plain)


@lru_cache(maxsize=8)
def is_llama2(template: str) -> bool:
    """Whether the template writes dialogues as Llama 2's chat format has them."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    asked = [{"role": "user", "content": "one"}]
    more = [*asked, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    system = [{"role": "system", "content": "zero"}, *more]
    try:
        return all(
            render(template, dialogue, names, True) == render(CHAT_TEMPLATE, dialogue, names, True)
            for dialogue in (asked, more, system)
        )
    except ValueError:
        return False


def foreign(tokenizer: Tokenizer) -> str | None:
    """The template that the tokenizer's dialogues are rendered with; None where they are Llama
    2's, read by SentencePiece."""
    template = tokenizer.chat_template
    if template is None or (tokenizer.is_sentencepiece and is_llama2(template)):
        return None
    return template


def turns(tokenizer: Tokenizer, template: str, messages: Sequence[Any]) -> list[Turn]:
    """The exchanges of a dialogue in order; the prompts' ids of a dialogue are those of one that
    goes on from it. Raises ValueError as `render` does, and where the template does not write an
    answer behind its prompt or does not end it with an EOS."""
    hidden = _hidden(tokenizer, messages)
    told = [{**each, "content": _replaced(each["content"], hidden)} for each in messages]
    shown = {mark: piece for piece, mark in hidden.items()}
    names = tokenizer.names
    found: list[Turn] = []
    done = ""  # the text up to the end of the last answer
    for index, message in enumerate(told):
        if message["role"] == "user":
            asked = render(template, told[: index + 1], names, True)
            if not asked.startswith(done):
                raise ValueError(
                    "the model's chat template writes earlier turns otherwise once a dialogue goes "
                    "on; answers cannot be told from prompts: give dialogues of one exchange"
                )
            found.append(Turn(_ids(tokenizer, asked[len(done) :], shown, not done), []))
        elif message["role"] == "assistant":
            whole = render(template, told[: index + 1], names, False)
            if not whole.startswith(asked):
                raise ValueError(
                    "the model's chat template does not write an answer where it asks for one; use "
                    "a template that does"
                )
            end = _end(tokenizer, whole, len(asked))
            prompt = found[-1].prompt
            both = _ids(tokenizer, whole[len(done) : end], shown, not done)
            if both[: len(prompt)] == prompt:
                answer = both[len(prompt) :]
            else:  # a piece reaches across: what is drawn begins with a piece of its own
                answer = _ids(tokenizer, whole[len(asked) : end], shown, False)
            found[-1] = Turn(prompt, answer)
            done = whole[:end]
    return found


def _end(tokenizer: Tokenizer, whole: str, begin: int) -> int:
    """Where the answer that begins at `begin` ends: behind its EOS."""
    places = [
        (place, place + len(piece))
        for piece, control in tokenizer.controls.items()
        if control.id in tokenizer.eos_ids and (place := whole.find(piece, begin)) >= 0
    ]
    if not places:
        raise ValueError(
            "the model's chat template ends an answer with none of its EOS tokens; name the one it "
            "has in eos_token_id of generation_config.json"
        )
    return min(places)[1]


def _ids(tokenizer: Tokenizer, text: str, shown: dict[str, str], first: bool) -> list[int]:
    """Ids of a rendered text, whose control tokens are the template's; what messages spelled is put
    back as text."""
    ids: list[int] = []
    parts = [part for part in _matcher(tuple(tokenizer.controls)).split(text) if part]
    kinds = [tokenizer.controls.get(part) for part in parts]
    for part, kind, before, after in zip(
        parts, kinds, [None, *kinds[:-1]], [*kinds[1:], None], strict=True
    ):
        if kind is not None:
            ids.append(kind.id)
            first = False
            continue
        plain = part.lstrip() if before is not None and before.rstrip else part
        plain = plain.rstrip() if after is not None and after.lstrip else plain
        if plain:
            plain = _replaced(plain, shown)
            ids += tokenizer.encode(plain) if first else tokenizer.encode_later(plain)
            first = False
    return ids


@lru_cache(maxsize=8)
def _matcher(pieces: tuple[str, ...]) -> "re.Pattern[str]":
    """Finds the longest of several spellings."""
    longest = sorted(pieces, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest)) + ")")


def _hidden(tokenizer: Tokenizer, messages: Sequence[Any]) -> dict[str, str]:
    """Marks that no message holds, in place of the control tokens that the messages spell."""
    told = "".join(each["content"] for each in messages)
    spelled = [piece for piece in tokenizer.controls if piece in told]
    nonce = secrets.token_hex(8)
    return {piece: f"{nonce}{number:x}." for number, piece in enumerate(spelled)}


def _replaced(text: str, by: dict[str, str]) -> str:
    return _matcher(tuple(by)).sub(lambda found: by[found[0]], text) if by else text


def joined(found: Sequence[Turn]) -> list[int]:
    """All ids in order."""
    return list(chain.from_iterable([*turn.prompt, *turn.answer] for turn in found))
