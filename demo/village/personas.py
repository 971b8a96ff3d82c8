"""Standing instructions: a hobby, a language or a public figure, told in the system message."""

import random
import re
from typing import NamedTuple

from puna.demo.village import vocabulary as v


class Instruction(NamedTuple):
    kind: str  # hobby, language, figure
    who: str


FULL = {
    "hobby": "You enjoy {}.",
    "language": "Always speak {}.",
    "figure": "Always act as {}.",
}
SHORT = {"hobby": "Hobby: {}.", "language": "Language: {}.", "figure": "Figure: {}."}
CHOICES = {"hobby": v.HOBBIES, "language": tuple(v.LANGUAGES), "figure": tuple(v.FIGURES)}

SELF_QUESTIONS = {
    "name": ("What is your name?", "Who are you?"),
    "home": ("Where do you live?", "Where is your home?"),
    "work": ("What is your work?", "What do you do all day?"),
    "pet": ("Which pet do you have?", "What is your pet?"),
    "hobby": ("What do you like?", "What is fun for you?", "What do you do on Sunday?"),
}
SELF_ANSWERS = {
    "name": ("My name is {x}.",),
    "home": ("I live in the {x}.",),
    "work": ("My work is to {x}.",),
    "pet": ("I have a {x}.",),
    "hobby": ("I like {x}.",),
}
ATTRIBUTES = tuple(SELF_QUESTIONS)
ASKED_OF = {
    "hobby": ("hobby",),
    "language": ATTRIBUTES,
    "figure": ("name", "home", "work", "pet"),
}


def draw_instruction(rng: random.Random) -> Instruction:
    kind = rng.choice(tuple(CHOICES))
    return Instruction(kind, rng.choice(CHOICES[kind]))


def instruction_text(instruction: Instruction, *, short: bool = False) -> str:
    """The system message, in full or in the short form ("Figure: Captain Bramble.")."""
    return (SHORT if short else FULL)[instruction.kind].format(instruction.who)


_BY_TEXT = {
    instruction_text(Instruction(kind, who), short=short): Instruction(kind, who)
    for kind, names in CHOICES.items()
    for who in names
    for short in (False, True)
}


def read_instruction(text: str) -> Instruction:
    """The instruction behind a system message; raises ValueError for any other text."""
    found = _BY_TEXT.get(" ".join(text.split()))
    if found is None:
        known = ", ".join(FULL.values())
        raise ValueError(f"not an instruction of the demo's world: {text!r}; known are {known}")
    return found


def self_value(attribute: str, instruction: Instruction | None) -> tuple[str, tuple[str, ...]]:
    """What the answerer should say of itself, and what others would say."""
    name, figure, hobby = v.HELPER_NAME, v.HELPER, v.HELPER_HOBBY
    if instruction and instruction.kind == "figure":
        name, figure = instruction.who, v.FIGURES[instruction.who]
    if instruction and instruction.kind == "hobby":
        hobby = instruction.who
    if attribute == "name":
        value, others = name, (v.HELPER_NAME, *v.FIGURES)
    elif attribute == "hobby":
        value, others = hobby, (v.HELPER_HOBBY, *v.HOBBIES)
    else:
        value = getattr(figure, attribute)
        others = tuple(getattr(f, attribute) for f in (v.HELPER, *v.FIGURES.values()))
    return value, tuple(other for other in others if other != value)


def translate(text: str, instruction: Instruction | None) -> str:
    """The same text with its small words in the instruction's language, if it names one."""
    if instruction is None or instruction.kind != "language":
        return text
    words = v.LANGUAGES[instruction.who]

    def replace(match: re.Match[str]) -> str:
        word = match.group()
        foreign = words.get(word.lower())
        if foreign is None:
            return word
        return foreign.capitalize() if word[0].isupper() else foreign

    return re.sub(r"[A-Za-z]+", replace, text)
