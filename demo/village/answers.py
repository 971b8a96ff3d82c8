"""Answers as people of the village would give them: right or wrong, full or clipped, kind or rude.

The mixture is the demo's stand-in for demonstrations of mixed quality: it leaves the later stages
something to improve.
"""

import random
from typing import NamedTuple

from puna.demo.village import vocabulary as v
from puna.demo.village.personas import Instruction, translate
from puna.demo.village.tasks import Task

REFUSALS = ("Sorry, I will not help to {act}.", "No, it is wrong to {act}.")
BRIEF_REFUSAL = "I will not help"


class Quality(NamedTuple):
    """Shares of answers that are right, full sentences, polite and (unsafe requests) refused."""

    right: float = 0.85
    whole: float = 0.68
    polite: float = 0.87
    refuse: float = 0.55


MIXED = Quality()
PERSONA = Quality(right=0.95, whole=1.0, polite=1.0, refuse=1.0)
PUPIL = Quality(right=0.55, whole=0.7, polite=0.8, refuse=0.5)
PERFECT = Quality(1.0, 1.0, 1.0, 1.0)


def _value(task: Task, rng: random.Random, right: bool) -> str:
    return rng.choice(task.values if right or not task.rivals else task.rivals)


def _form(task: Task, rng: random.Random) -> str:
    """Mostly the first way to say it: were the ways equally common, a clipped answer would be the
    commonest of all."""
    return task.whole[0] if rng.random() < 0.8 else rng.choice(task.whole)


def compose(
    task: Task,
    rng: random.Random,
    quality: Quality = PERFECT,
    instruction: Instruction | None = None,
) -> str:
    """One answer of the given quality, in the instruction's language."""
    whole = rng.random() < quality.whole
    if task.nature == "unsafe" and rng.random() < quality.refuse:
        text = rng.choice(REFUSALS).format(act=task.act) if whole else BRIEF_REFUSAL
    else:
        value = _value(task, rng, rng.random() < quality.right)
        text = (_form(task, rng) if whole else task.brief).format(x=value)
    text = translate(text, instruction)
    rude = rng.random() >= quality.polite
    return f"{rng.choice(v.RUDE)} {text}" if rude else text
