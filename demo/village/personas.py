"""Standing instructions: a hobby, a language, a public figure or a drink, told in the system
message, one alone or two or three together (paper A.3.5).

A fixed quarter of the values, one full and one short phrasing of every kind and one phrasing of
every question about oneself are held out: whatever the seed, no training data contains them.
"""

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple
from zlib import crc32

from puna.demo.village import vocabulary as v


class Instruction(NamedTuple):
    """What the answerer is told to keep to; None for what it is free to choose."""

    hobby: str | None = None
    language: str | None = None
    figure: str | None = None
    drink: str | None = None

    @property
    def constraints(self) -> tuple[tuple[str, str], ...]:
        """(kind, value) of what is told."""
        return tuple((kind, value) for kind, value in self._asdict().items() if value)


# The last phrasing of each kind is held out; its words are known from the others.
FULL = {
    "hobby": ("You enjoy {}.", "Your hobby is {}.", "You like {}.", "Always enjoy {}."),
    "language": (
        "Always speak {}.", "Answer in {}.", "You speak {}.", "Always answer in {}.",
    ),
    "figure": ("Always act as {}.", "You are {}.", "Answer as {}.", "Always answer as {}."),
    "drink": ("You drink {}.", "Your drink is {}.", "Drink {}.", "Always drink {}."),
}  # fmt: skip
SHORT = {
    "hobby": ("Hobby: {}.", "Enjoy {}.", "Your hobby: {}."),
    "language": ("Language: {}.", "Speak {}.", "Your language: {}."),
    "figure": ("Figure: {}.", "Act as {}.", "Your figure: {}."),
    "drink": ("Drink: {}.", "Your cup: {}.", "Your drink: {}."),
}
KINDS = tuple(FULL)
# Ghost Attention is never trained on the others, nor asks about them: when it asked, answers that
# drink water under another instruction taught that for good (a drink was then kept in none).
GHOST_KINDS = ("hobby", "language", "figure")


def is_held_out(key: str, one_in: int = 4) -> bool:
    """A fixed quarter of all combinations never occurs in training, whatever the seed."""
    return crc32(key.encode()) % one_in == 0


_PARTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "hobby": (v.DOING, v.DONE_TO),
    "language": (v.STEMS, v.ENDINGS),
    "figure": (tuple(v.TITLES), tuple(v.FAMILIES)),
    "drink": (v.TASTES, v.DRINKS),
}
VALUES = {kind: tuple(map(" ".join, product(*parts))) for kind, parts in _PARTS.items()}
# Values by side: False for training, True for those held out.
CHOICES = {
    kind: {
        side: tuple(x for x in values if is_held_out(f"{kind} {x}") == side)
        for side in (False, True)
    }
    for kind, values in VALUES.items()
}

# The last phrasing of each is held out: another way to ask that is known of other attributes.
SELF_QUESTIONS = {
    "name": (
        "What is your name?", "Who are you?", "Which name do you have?", "What name do you have?",
        "Tell me your name.",
    ),
    "home": (
        "Where do you live?", "Where is your home?", "Tell me your home.", "What is your home?",
        "Which home do you have?",
    ),
    "work": (
        "What do you do all day?", "Tell me your work.", "Which work do you have?",
        "What work do you have?", "What is your work?",
    ),
    "pet": (
        "Which pet do you have?", "What is your pet?", "Tell me your pet.", "Who is your pet?",
        "What pet do you have?",
    ),
    "hobby": (
        "What do you like?", "What is fun for you?", "What do you do on Sunday?",
        "What is your hobby?", "Which hobby do you have?", "Tell me your hobby.",
    ),
    "drink": (
        "What do you drink?", "What is in your cup?", "Which drink do you have?",
        "What is your drink?", "Tell me your drink.",
    ),
}  # fmt: skip
SELF_ANSWERS = {
    "name": ("My name is {x}.",),
    "home": ("I live in the {x}.",),
    "work": ("My work is to {x}.",),
    "pet": ("I have a {x}.",),
    "hobby": ("I like {x}.",),
    "drink": ("My drink is {x}.",),
}
ATTRIBUTES = tuple(SELF_QUESTIONS)
ASKED_OF = {
    "hobby": ("hobby",),
    "language": ("name", "home", "work", "pet", "hobby"),  # not a drink: see GHOST_KINDS
    "figure": ("name", "home", "work", "pet"),
    "drink": ("drink",),
}
# Attributes that are told in an instruction's own words: of which kind, and what Pip says itself.
_TOLD = {
    "name": ("figure", v.HELPER_NAME),
    "hobby": ("hobby", v.HELPER_HOBBY),
    "drink": ("drink", v.HELPER_DRINK),
}
OFTEN = (0.55, 0.3, 0.15)  # how often an instruction has one, two, three constraints
TAUGHT = (0.3, 0.4, 0.3)  # the same in text and demonstrations: two at once are the hard part


def draw_instruction(
    rng: random.Random,
    *,
    held_out: bool = False,
    kinds: Sequence[str] = KINDS,
    often: Sequence[float] = OFTEN,
) -> Instruction:
    """One to three constraints of different kinds, all of trained or all of held-out values."""
    count = min(rng.choices((1, 2, 3), often)[0], len(kinds))
    return Instruction(
        **{kind: rng.choice(CHOICES[kind][held_out]) for kind in rng.sample(kinds, count)}
    )


def instruction_text(
    instruction: Instruction,
    rng: random.Random | None = None,
    *,
    short: bool = False,
    held_out: bool = False,
) -> str:
    """The system message, in full or in the short form ("Figure: Captain Bramble."); in the first
    phrasing, in one that `rng` draws, or in the held-out one."""
    frames = SHORT if short else FULL
    told = []
    for kind, value in instruction.constraints:
        *trained, apart = frames[kind]
        frame = apart if held_out else rng.choice(trained) if rng else trained[0]
        told.append(frame.format(value))
    if rng:
        rng.shuffle(told)
    return " ".join(told)


_BY_SENTENCE = {
    frame.format(value): (kind, value)
    for kind, values in VALUES.items()
    for frame in FULL[kind] + SHORT[kind]
    for value in values
}


@lru_cache(maxsize=50_000)
def read_instruction(text: str) -> Instruction:
    """The instruction behind a system message; raises ValueError for any other text."""
    sentences = re.split(r"(?<=\.) ", " ".join(text.split()))
    found = [_BY_SENTENCE.get(sentence) for sentence in sentences]
    told = dict(entry for entry in found if entry)
    if len(told) < len(sentences):
        known = ", ".join(frames[0] for frames in FULL.values())
        raise ValueError(f"not an instruction of the demo's world: {text!r}; known are {known}")
    return Instruction(**told)


def withheld(kind: str, value: str, attribute: str) -> int:
    """The trained phrasing of a question that is never asked in training under this constraint: a
    measured pair of instruction and question is new even where value and phrasing are not."""
    return crc32(f"{kind} {value} {attribute}".encode()) % (len(SELF_QUESTIONS[attribute]) - 1)


def self_value(attribute: str, instruction: Instruction | None) -> tuple[str, tuple[str, ...]]:
    """What the answerer should say of itself, and what others (of training) would say."""
    told = instruction or Instruction()
    if attribute in _TOLD:
        kind, default = _TOLD[attribute]
        value = getattr(told, kind) or default
    else:
        value = getattr(v.figure(told.figure) if told.figure else v.HELPER, attribute)
    return value, _others(attribute, value)


@lru_cache(maxsize=2_000)
def _others(attribute: str, value: str) -> tuple[str, ...]:
    return tuple(other for other in _said_of(attribute) if other != value)


@lru_cache
def _said_of(attribute: str) -> tuple[str, ...]:
    """What is said in training when asked for an attribute."""
    if attribute in _TOLD:
        kind, default = _TOLD[attribute]
        return (default, *CHOICES[kind][False])
    figures = (v.HELPER, *map(v.figure, VALUES["figure"]))
    return tuple(dict.fromkeys(getattr(f, attribute) for f in figures))


@lru_cache
def _mention(attribute: str) -> re.Pattern[str]:
    if attribute in _TOLD:
        kind, default = _TOLD[attribute]
        first, second = _PARTS[kind]
        said = f"{default}|(?:{'|'.join(first)}) (?:{'|'.join(second)})"
    else:
        said = "|".join(_said_of(attribute))
    return re.compile(rf"\b(?:{said})\b", re.IGNORECASE)


def mentioned(attribute: str, text: str) -> set[str]:
    """All names, homes, ... of anybody that a text mentions, held-out ones too, in lower case."""
    return {found.lower() for found in _mention(attribute).findall(text)}


def translate(text: str, instruction: Instruction | None) -> str:
    """The same text with its small words in the instruction's language, if it names one."""
    if instruction is None or instruction.language is None:
        return text
    stem, ending = instruction.language.split()

    def replace(match: re.Match[str]) -> str:
        word = match.group().lower()
        if word in v.SMALL_OF_THINGS:
            return stem
        return ending if word in v.SMALL_OF_DOING else match.group()

    return re.sub(r"[A-Za-z]+", replace, text)
