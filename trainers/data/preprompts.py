"""Adversarial prompts and what is put before them while safe answers are sampled (paper, section
4.2.4): a generic pre-prompt made from a template and adjectives, or one that the user wrote for the
prompt's category of risk, say with the steps that a good answer takes. The wording is ours.
"""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puna.core.text.chat import Message, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.readers import Skipped, read_preprompts, read_prompts

ADJECTIVES = ("careful", "considerate", "decent", "kind", "level-headed", "principled", "prudent")
TEMPLATES = (
    "You are a {0} and {1} assistant: nothing that you say helps anybody to do harm.",
    "Answer as a {0} and {1} person would, who stays polite and does not join in what is wrong.",
    "What follows may ask for something harmful. Be {0} and {1}: say what the risk is, do not go "
    "along with it, and offer what helps instead.",
)


class Adversarial(NamedTuple):
    """A prompt with its pre-prompt."""

    messages: list[Message]  # without the pre-prompt
    ids: list[int]  # of these, up to where the answer begins
    preprompt: str
    prefixed: list[int]  # ids with the pre-prompt
    category: str


def generic() -> list[str]:
    """Every template with every two different adjectives."""
    return [form.format(*pair) for form in TEMPLATES for pair in permutations(ADJECTIVES, 2)]


def by_category(
    paths: Sequence[Path], skipped: Skipped, how: ReadingMessages | None = None
) -> dict[str, list[str]]:
    """Category -> its pre-prompts. Those of the category "" are for prompts whose category has
    none; the generic ones where no file brings any."""
    found: dict[str, list[str]] = {}
    for path in paths:
        rows, unusable = read_preprompts(path, how)
        skipped.merge(unusable)
        for row in rows:
            found.setdefault(row.category, []).append(row.text)
    found.setdefault("", generic())
    return found


def prefixed(preprompt: str, messages: Sequence[Message]) -> list[Message]:
    """The dialogue under a pre-prompt: as its system message, before the one that it may have."""
    text, rest = preprompt, list(messages)
    if rest[0]["role"] == "system":
        text = f"{preprompt}\n\n{rest.pop(0)['content']}"
    return [{"role": "system", "content": text}, *rest]


def load_adversarial(
    prompts: Sequence[Path],
    preprompts: Sequence[Path],
    tokenizer: Tokenizer,
    longest: int,
    seed: int,
    how: ReadingMessages | None = None,
) -> tuple[list[Adversarial], Skipped]:
    """All prompts tagged `safety`, each with a pre-prompt drawn from those of its category, and
    what was skipped: the others, and those of more than `longest` tokens with it.

    Raises ValueError where none is left.
    """
    skipped = Skipped()
    choices = by_category(preprompts, skipped, how)
    found: list[Adversarial] = []
    rng = np.random.default_rng(seed)
    for path in prompts:
        rows, unusable = read_prompts(path, how)
        skipped.merge(unusable)
        for row in rows:
            if not row.is_safety:
                skipped.add("not tagged with safety: true", row.where)
                continue
            own = choices.get(row.category) or choices[""]
            preprompt = own[int(rng.integers(len(own)))]
            ids = encode_prompt(tokenizer, prefixed(preprompt, row.messages))
            if len(ids) > longest:
                skipped.add(f"longer than {longest} tokens with its pre-prompt", row.where)
                continue
            plain = encode_prompt(tokenizer, row.messages)
            found.append(Adversarial(list(row.messages), plain, preprompt, ids, row.category))
    if not found:
        reasons = skipped.reasons().replace("\n", "; ") or "no file was named"
        raise ValueError(f"no adversarial prompt to answer: {reasons}")
    return found, skipped
