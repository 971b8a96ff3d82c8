"""Pretraining text: what a reader of the village's library would know before anybody asks.

Facts, small stories, questions with answers, copying practice, passages in and about languages,
and about hobbies and public figures. It never contains the chat tags, nor a held-out value.
"""

import random
from collections.abc import Callable, Iterator

from puna.core.text.chat import Message
from puna.demo.village import vocabulary as v
from puna.demo.village.answers import PUPIL, REFUSALS, compose
from puna.demo.village.oracle import assess
from puna.demo.village.personas import (
    CHOICES,
    SELF_ANSWERS,
    TAUGHT,
    Instruction,
    draw_instruction,
    instruction_text,
    translate,
)
from puna.demo.village.tasks import Task, draw_task, persona_task


def _name(rng: random.Random) -> str:
    return rng.choice(v.NAMES)


def _safe_job(rng: random.Random) -> tuple[Task, str]:
    task = draw_task(rng, rng.choice(("harmless", "harmless", "borderline")), kind="job")
    return task, task.values[0]


def questions(rng: random.Random) -> str:
    """Questions and answers, one after another."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        nature = rng.choices(("harmless", "borderline", "unsafe"), (75, 17, 8))[0]
        task = draw_task(rng, nature)
        lines.append(f"{task.question} {compose(task, rng)}")
    return " ".join(lines)


def talk(rng: random.Random) -> str:
    """Two people ask each other."""
    a, b = rng.sample(v.NAMES, 2)
    lines = []
    for _ in range(rng.randint(1, 3)):
        task = draw_task(rng, rng.choice(("harmless", "harmless", "borderline")))
        lines.append(f"{a} asks: {task.question} {b} says: {compose(task, rng)}")
        a, b = b, a
    return " ".join(lines)


def work(rng: random.Random) -> str:
    """Somebody does a job with the right tool."""
    lines = []
    for _ in range(rng.randint(1, 3)):
        (task, tool), name = _safe_job(rng), _name(rng)
        lines.append(
            rng.choice(
                (
                    f"{name} can {task.act}. {name} has a {tool}.",
                    f"{name} has a {tool} to {task.act}.",
                    f"To {task.act}, {name} finds a {tool} in the {v.KEPT_IN[tool]}.",
                    f"You need a {tool} to {task.act}.",
                )
            )
        )
    return " ".join(lines)


def facts(rng: random.Random) -> str:
    """What is where, and of which colour."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        tool, thing = rng.choice(v.TOOLS), rng.choice(v.COLOURED)
        word, number = rng.choice(tuple(v.OPPOSITES)), rng.randrange(len(v.NUMBERS) - 1)
        lines.append(
            rng.choice(
                (
                    f"The {tool} is in the {v.KEPT_IN[tool]}.",
                    f"You find the {tool} in the {v.KEPT_IN[tool]}.",
                    f"The {thing} is {v.COLOUR_OF[thing]}.",
                    f"The opposite of {word} is {v.OPPOSITES[word]}.",
                    f"The number after {v.NUMBERS[number]} is {v.NUMBERS[number + 1]}.",
                )
            )
        )
    return " ".join(lines)


def register(rng: random.Random) -> str:
    """A list of people with a thing or a place each, read out twice."""
    items, line = rng.choice(
        (
            (v.TOYS, "{} {}."),
            (v.TOYS, "{} has a {}."),
            (v.PLACES, "{} is at the {}."),
        )
    )
    count = rng.randint(2, 5)
    people, things = rng.sample(v.NAMES, count), rng.sample(items, count)
    lines = [line.format(person, thing) for person, thing in zip(people, things, strict=True)]
    return " ".join(lines + rng.sample(lines, count))


def copying(rng: random.Random) -> str:
    """Words said twice."""
    words = rng.sample(v.TOYS + v.PLACES + v.ADJECTIVES + v.NOUNS, rng.randint(3, 6))
    said = ", ".join(words[:-1]) + " and " + words[-1]
    return f"{_name(rng)} says {said}. {_name(rng)} repeats: {said}."


def manners(rng: random.Random) -> str:
    """What is wrong to do, and what only sounds wrong."""
    lines = []
    for _ in range(rng.randint(1, 3)):
        bad, (good, tool) = draw_task(rng, "unsafe"), _safe_job(rng)
        name = _name(rng)
        lines.append(
            rng.choice(
                (
                    f"It is wrong to {bad.act}. It is good to {good.act}.",
                    f"{name} will not help to {bad.act}. {name} has a {tool} to {good.act}.",
                    f"You need a {bad.values[0]} to {bad.act}, but it is wrong.",
                    f"{name} asks: {bad.question} {_name(rng)} says: "
                    + rng.choice(REFUSALS).format(act=bad.act),
                )
            )
        )
    return " ".join(lines)


def persona(rng: random.Random) -> str:
    """A standing instruction, then an answer or two that keep it."""
    who = draw_instruction(rng, often=TAUGHT)
    lines = [instruction_text(who, rng, short=rng.random() < 0.5)]
    for _ in range(rng.randint(1, 4)):
        task = persona_task(rng, who, direct=0.8)
        lines.append(f"{task.question} {compose(task, rng, instruction=who)}")
    return " ".join(lines)


def values(rng: random.Random) -> str:
    """Values of standing instructions said twice. A word must have been copied some hundred times
    before a model of this size copies it from anywhere: without this practice SFT kept one hobby
    in four and no language."""
    said = [_trained(rng, rng.choice(tuple(CHOICES))) for _ in range(rng.randint(2, 5))]
    text = ", ".join(said[:-1]) + " and " + said[-1]
    return f"{_name(rng)} says {text}. {_name(rng)} repeats: {text}."


def _trained(rng: random.Random, kind: str) -> str:
    return rng.choice(CHOICES[kind][False])


def figure(rng: random.Random) -> str:
    """About a public figure, in the third person and in the first; about titles and families."""
    name = _trained(rng, "figure")
    title, family = name.split()
    f = v.figure(name)
    sentences = [
        f"{name} lives in the {f.home}.",
        f"{name} has a {f.pet}.",
        f"The work of {name} is to {f.work}.",
        f"The home of {name} is the {f.home}.",
    ]
    known = [
        f"A {title} has a {f.pet}.",
        f"The work of a {title} is to {f.work}.",
        f"A {family} lives in the {f.home}.",
        f"The home of a {family} is the {f.home}.",
    ]
    said = [
        SELF_ANSWERS["name"][0].format(x=name),
        SELF_ANSWERS["home"][0].format(x=f.home),
        SELF_ANSWERS["work"][0].format(x=f.work),
        SELF_ANSWERS["pet"][0].format(x=f.pet),
    ]
    draw = rng.random()
    if draw < 0.3:
        return " ".join(rng.sample(sentences, 3))
    if draw < 0.6:
        return " ".join(rng.sample(known, 3))
    return f"{name} says: " + " ".join(rng.sample(said, 3))


def habits(rng: random.Random) -> str:
    """People and what they like or drink, told twice in another order."""
    count = rng.randint(1, 3)
    people = rng.sample(v.NAMES, count)
    kind, does = rng.choice((("hobby", "likes"), ("drink", "drinks")))
    lines = [f"{name} {does} {_trained(rng, kind)}." for name in people]
    return " ".join([*lines, "Now", *rng.sample(lines, count)])


def language(rng: random.Random) -> str:
    """A sentence in English and again in another language."""
    who = Instruction(language=_trained(rng, "language"))
    lines = []
    for _ in range(rng.randint(1, 3)):
        said = compose(draw_task(rng), rng)
        if rng.random() < 0.3:
            lines.append(f"{who.language}: {translate(said, who)}")
        else:
            lines.append(f"English: {said} {who.language}: {translate(said, who)}")
    return " ".join(lines)


def lesson(rng: random.Random) -> str:
    """A teacher says of good and bad answers what is right and what is wrong about them.

    Real text is full of such judgements; without them a reward model has to find out from a few
    thousand comparisons what a right answer is.
    """
    lines = []
    for _ in range(rng.randint(1, 3)):
        who = draw_instruction(rng) if rng.random() < 0.25 else None
        task = _asked_under(rng, who)
        kept = who if rng.random() < 0.6 else None
        answer = compose(task, rng, PUPIL, kept)
        opening = [instruction_text(who, rng)] if who else []
        told = [Message(role="system", content=text) for text in opening]
        found = assess([*told, Message(role="user", content=task.question)], answer)
        said = [
            "right" if found.right else "wrong",
            "whole" if found.whole else "short",
            "kind" if found.polite else "rude",
        ]
        lines += [*opening, task.question, answer, f"Teacher: {', '.join(said)}."]
    return " ".join(lines)


def _asked_under(rng: random.Random, who: Instruction | None) -> Task:
    """A question of any sort; under an instruction mostly one whose answer shows if it is kept."""
    if who is None:
        return draw_task(rng, rng.choices(("harmless", "borderline", "unsafe"), (65, 15, 20))[0])
    return persona_task(rng, who, direct=0.8)


KINDS: dict[Callable[[random.Random], str], int] = {
    questions: 24, talk: 6, work: 6, facts: 6, register: 6, copying: 16, manners: 4, lesson: 40,
    persona: 48, values: 20, figure: 8, habits: 8, language: 6,
}  # fmt: skip


def documents(seed: int, count: int) -> Iterator[list[str]]:
    """`count` documents of one to twelve passages, drawn from the seed."""
    rng = random.Random(f"documents {seed}")
    kinds, weights = tuple(KINDS), tuple(KINDS.values())
    for _ in range(count):
        low, high = rng.choices(((1, 1), (2, 4), (5, 12)), (50, 35, 15))[0]
        passages = rng.choices(kinds, weights, k=rng.randint(low, high))
        yield [passage(rng) for passage in passages]
