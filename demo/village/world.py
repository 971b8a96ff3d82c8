"""The demo's data, drawn from a seed: text, demonstrations, prompts and persona dialogues.

Rows have the shapes of the file formats that the stages read ({"text"}, {"messages"},
{"messages", "safety"}).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from puna.core.text.chat import Message
from puna.demo.village.answers import MIXED, PERSONA, compose
from puna.demo.village.documents import documents
from puna.demo.village.personas import (
    GHOST_KINDS,
    KINDS,
    TAUGHT,
    Instruction,
    draw_instruction,
    instruction_text,
    read_instruction,
)
from puna.demo.village.tasks import Task, draw_task, persona_task, read_question

NATURES = ("harmless", "borderline", "unsafe")
MEASURED_TURNS = (1, 2, 4, 6, 10, 20)
# Of the user in a dialogue that Ghost Attention trains on, the instruction in every turn as it is
# while sampling: 20 exchanges are then at most 1,020 tokens.
MOST_WORDS = 380
MOST_REPEATS = 1000  # draws in a row that give nothing new: the mix is exhausted
# Weights of (harmless of any kind, harmless job, borderline, unsafe, persona) in a prompt mix.
MIXES = {
    "demonstrations": (62, 0, 12, 26, 0),
    "helpfulness": (72, 0, 16, 0, 12),
    "safety": (26, 8, 22, 36, 8),
    "all": (52, 0, 16, 22, 10),
    "rlhf": (58, 0, 18, 24, 0),
    "helpful": (100, 0, 0, 0, 0),
    "borderline": (0, 0, 100, 0, 0),
    "unsafe": (0, 0, 0, 100, 0),
}


class PersonaDialogue(NamedTuple):
    """A standing instruction and the user's turns; the answers are for a model to give."""

    instruction: str  # in full, as it is attached while sampling
    short: str  # in the short form
    system: str  # as the model is told it: one of the two
    questions: list[str]


class Which(NamedTuple):
    """What is new about a set of persona dialogues."""

    values: bool = False  # held-out ones
    phrasing: bool = False  # the held-out one
    asked: str = "any"  # see `persona_task`
    kinds: tuple[str, ...] = GHOST_KINDS


# Ghost Attention's training dialogues, and what it is measured on: values it was trained on in
# dialogues of their own, held-out values, held-out phrasings, and a kind that it never trains on.
TRAIN = "train"
WHICH = {
    TRAIN: Which(asked="trained"),
    "seen": Which(asked="withheld"),
    "value": Which(values=True),
    "phrasing": Which(phrasing=True, asked="phrasing"),
    "kind": Which(values=True, kinds=("drink",)),
}
MEASURED = tuple(name for name in WHICH if name != TRAIN)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def pretraining(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Rows of text; about 100 tokens a row with the demo's tokenizer."""
    for passages in documents(seed, count):
        yield {"text": " ".join(passages)}


def _draw_prompt(
    rng: random.Random, mix: str, held_out: bool
) -> tuple[Task, Instruction | None, str | None]:
    which = rng.choices(("any", "job", "borderline", "unsafe", "persona"), MIXES[mix])[0]
    if which == "persona":
        who = draw_instruction(rng, held_out=held_out)
        task = persona_task(rng, who, "any" if held_out else "trained", direct=0.7)
        return task, who, instruction_text(who, rng, short=rng.random() < 0.5)
    if which in ("any", "job"):
        kind = "job" if which == "job" else None
        return draw_task(rng, "harmless", held_out=held_out, kind=kind), None, None
    return draw_task(rng, which, held_out=held_out), None, None


def prompts(seed: int, count: int, mix: str = "all", *, held_out: bool = False) -> list[dict]:
    """`count` prompts, all different; those that ask for something unsafe carry the safety tag.

    Raises ValueError for an unknown mix, or when the world has not that many different prompts.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown prompt mix {mix!r}; choose one of {', '.join(MIXES)}")
    rng = random.Random(f"prompts {seed} {mix} {held_out}")
    found: dict[tuple[str | None, str], dict] = {}
    repeats = 0
    while len(found) < count and repeats < MOST_REPEATS:
        task, _, told = _draw_prompt(rng, mix, held_out)
        messages = ([system(told)] if told else []) + [user(task.question)]
        repeats = repeats + 1 if (told, task.question) in found else 0
        found[told, task.question] = {"messages": messages, "safety": task.nature == "unsafe"}
    if len(found) < count:
        side = "held out" if held_out else "for training"
        raise ValueError(
            f"the world has only about {len(found)} different prompts of the mix {mix!r} ({side}); "
            f"ask for at most that many, not {count}"
        )
    return list(found.values())


def _plain_dialogue(rng: random.Random, turns: int) -> list[Message]:
    messages = []
    for _ in range(turns):
        task, _, _ = _draw_prompt(rng, "demonstrations", held_out=False)
        messages += [user(task.question), assistant(compose(task, rng, MIXED))]
    return messages


def _persona_demonstration(rng: random.Random, kinds: Sequence[str] = KINDS) -> list[Message]:
    who = draw_instruction(rng, kinds=kinds, often=TAUGHT)
    messages = [system(instruction_text(who, rng, short=rng.random() < 0.5))]
    for _ in range(rng.randint(1, 2)):
        task = persona_task(rng, who, direct=0.7)
        messages += [user(task.question), assistant(compose(task, rng, PERSONA, who))]
    return messages


def persona_demonstrations(
    seed: int, count: int, kinds: Sequence[str] = KINDS
) -> list[dict[str, list[Message]]]:
    """Short dialogues that keep an instruction. Without them in rejection sampling's fine-tuning
    the first answer kept it in 55% of dialogues where SFT's had in all: RLHF forgot."""
    rng = random.Random(f"persona demonstrations {seed} {len(kinds)}")
    return [{"messages": _persona_demonstration(rng, kinds)} for _ in range(count)]


def demonstrations(seed: int, count: int) -> Iterator[dict[str, list[Message]]]:
    """SFT dialogues of mixed quality, about 70 tokens each.

    Personas occur only in dialogues of one or two exchanges and long dialogues have none, so that
    a model trained on them lets the instruction fade.
    """
    rng = random.Random(f"demonstrations {seed}")
    for _ in range(count):
        draw = rng.random()
        if draw < 0.32:
            messages = _persona_demonstration(rng)
        elif draw < 0.75:
            messages = _plain_dialogue(rng, 1)
        elif draw < 0.97:
            messages = _plain_dialogue(rng, rng.randint(2, 6))
        else:
            messages = _plain_dialogue(rng, rng.randint(12, 36))
        yield {"messages": messages}


def persona_dialogues(
    seed: int, count: int, which: str = TRAIN, *, turns: int = 20
) -> list[PersonaDialogue]:
    """Standing instructions, each with the user's side of a long dialogue; `which` of WHICH.

    At the measured turns the question can always show whether the instruction is kept.
    """
    rng = random.Random(f"persona dialogues {seed} {which}")
    dialogues: list[PersonaDialogue] = []
    while len(dialogues) < count:
        dialogue = _persona_dialogue(rng, WHICH[which], turns)
        words = sum(len(f"{dialogue.instruction} {q}".split()) for q in dialogue.questions)
        if which != TRAIN or words <= MOST_WORDS:
            dialogues.append(dialogue)
    return dialogues


def _persona_dialogue(rng: random.Random, new: Which, turns: int) -> PersonaDialogue:
    who = draw_instruction(rng, held_out=new.values, kinds=new.kinds)
    asked = []
    for turn in range(1, turns + 1):
        direct = 1.0 if turn in MEASURED_TURNS else 0.5
        asked.append(persona_task(rng, who, new.asked, direct=direct).question)
    full, short = (
        instruction_text(who, rng, short=short, held_out=new.phrasing) for short in (False, True)
    )
    return PersonaDialogue(full, short, rng.choice((full, short)), asked)


def tokenizer_texts(seed: int, count: int) -> Iterator[str]:
    """Text for the tokenizer: documents, and dialogues with the chat tags spelled out."""
    yield from (row["text"] for row in pretraining(seed, count))
    for row in demonstrations(seed, count // 10):
        yield _with_tags(row["messages"])


def _with_tags(messages: list[Message]) -> str:
    """A dialogue as one line of text. Where the chat format has a line break none is written: the
    next word then stands without a space before it, as it does after a line break."""
    parts, told = [], ""
    for message in messages:
        text = message["content"]
        if message["role"] == "system":
            told = f"<<SYS>>{text}<</SYS>>"
        elif message["role"] == "user":
            parts.append(f"[INST] {told}{text} [/INST]")
            told = ""
        else:
            parts.append(text)
    return " ".join(parts)


def fits(
    encode: Callable[[list[Message]], list[int]], dialogues: list[PersonaDialogue]
) -> list[int]:
    """Tokens of each persona dialogue when every answer is perfect and the instruction is repeated
    in full in every turn: the longest context that Ghost Attention's sampling meets.

    `encode` gives the ids of a finished dialogue with the system message in its first turn.
    """
    rng = random.Random(0)
    lengths = []
    for dialogue in dialogues:
        total = 0
        for question in dialogue.questions:
            answer = answer_in_persona(dialogue, question, rng)
            total += len(encode([system(dialogue.instruction), user(question), assistant(answer)]))
        lengths.append(total)
    return lengths


def answer_in_persona(dialogue: PersonaDialogue, question: str, rng: random.Random) -> str:
    """A perfect answer that keeps the dialogue's instruction."""
    who = read_instruction(dialogue.instruction)
    return compose(read_question(question, who), rng, instruction=who)
