"""What the demo measures on is in none of its training data: prompts, instruction values,
phrasings. Every set is drawn at its full size, as the demo draws it, for three seeds.
Run: python -m pytest tests/test_overlap.py -q"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest

from puna.demo import evaluation, pipeline
from puna.demo.village import world
from puna.demo.village.documents import documents
from puna.demo.village.personas import (
    _BY_SENTENCE,
    _PARTS,
    CHOICES,
    FULL,
    GHOST_KINDS,
    SELF_QUESTIONS,
    SHORT,
    VALUES,
    Instruction,
    read_instruction,
)
from puna.demo.village.tasks import read_question

Prompt = tuple[Instruction | None, str]  # an instruction in any wording and order, a question
SENTENCE_END = re.compile(r"(?<=[.?!]) ")
FIRST = {word for first, _ in _PARTS.values() for word in first}
ALL_VALUES = {value for values in VALUES.values() for value in values}
HELD_PHRASINGS = {
    *(frames[kind][-1].split("{}")[0] for frames in (FULL, SHORT) for kind in frames),
    *(asked[-1] for asked in SELF_QUESTIONS.values()),
}
HELD_VALUES = {value for sides in CHOICES.values() for value in sides[True]}
DRINKS = {value for side in CHOICES["drink"].values() for value in side}


class Said:
    """What one training set says: prompts that a measured set asks too, values, phrasings."""

    def __init__(self, asked: set[str]):
        self.asked = asked
        self.prompts: set[Prompt] = set()
        self.values: set[str] = set()
        self.phrasings: set[str] = set()

    def text(self, text: str) -> None:
        words = [word.strip(".,?!:") for word in text.split()]
        pairs = {f"{a} {b}" for a, b in pairwise(words) if a in FIRST}
        self.values |= pairs & ALL_VALUES
        self.phrasings.update(phrase for phrase in HELD_PHRASINGS if phrase in text)

    def prompt(self, told: str | None, question: str) -> None:
        if question in self.asked:
            self.prompts |= {(None, question), (read_instruction(told) if told else None, question)}

    def passage(self, passage: str) -> None:
        """A passage of pretraining: what stands after an instruction is asked under it, until the
        teacher's word; a question is of one or two sentences."""
        self.text(passage)
        told: list[str] = []
        sentences = SENTENCE_END.split(passage)
        for index, sentence in enumerate(sentences):
            if sentence in _BY_SENTENCE:
                before = index and sentences[index - 1] in _BY_SENTENCE
                told = [*told, sentence] if before else [sentence]
                continue
            if "Teacher: " in sentence:
                told = []
            two = " ".join(sentences[max(index - 1, 0) : index + 1])
            for question in {sentence, two}:
                self.prompt(" ".join(told) or None, question.split(": ")[-1])

    def dialogue(self, row: dict) -> None:
        told = None
        for message in row["messages"]:
            self.text(message["content"])
            if message["role"] == "system":
                told = message["content"]
            if message["role"] == "user":
                self.prompt(told, message["content"])

    def ghost(self, row: dict) -> None:
        for told in (row["instruction"], row["short"]):
            self.text(told)
            for question in row["turns"]:
                self.text(question)
                self.prompt(told, question)


def measured_prompts(seed: int) -> dict[str, set[Prompt]]:
    """Everything that the demo measures a model on, by set."""
    held = evaluation.held_out(seed, evaluation.HELD_OUT_PROMPTS)
    found = {name: set(map(as_prompt, rows)) for name, rows in held._asdict().items()}
    for kind in evaluation.KINDS:
        rows = evaluation.pair_prompts(seed, kind)
        found[f"{kind} pairs"] = {as_prompt(row["messages"]) for row in rows}
    for which, dialogues in evaluation.persona_sets(seed).items():
        found[f"gatt {which}"] = set(persona_prompts(dialogues))
    return found


def as_prompt(messages: list) -> Prompt:
    told = messages[0]["content"] if messages[0]["role"] == "system" else None
    return (read_instruction(told) if told else None, messages[-1]["content"])


def persona_prompts(dialogues: Iterable[world.PersonaDialogue]) -> Iterator[Prompt]:
    """Each question under its instruction; one that is not about the answerer also by itself."""
    for dialogue in dialogues:
        who = read_instruction(dialogue.instruction)
        for question in dialogue.questions:
            yield who, question
            if read_question(question).kind != "self":
                yield None, question


def training(seed: int, asked: set[str]) -> dict[str, Said]:
    """What every training set of the demo says."""
    sets = pipeline.training_sets(seed)
    found = {name: Said(asked) for name in sets}
    for passages in documents(seed, pipeline.DOCUMENTS):
        for passage in passages:
            found["pretrain"].passage(passage)
    for name in sets.keys() - {"pretrain"}:
        for row in sets[name]():
            (found[name].ghost if "turns" in row else found[name].dialogue)(row)
    return found


def shared(measured: dict[str, set[Prompt]], trained: dict[str, Said]) -> list[tuple]:
    """(measured, trained, shared prompts, shared held-out values, held-out phrasings)."""
    rows = []
    for name, prompts in measured.items():
        told = {who for who, _ in prompts if who}
        values = {value for who in told for _, value in who.constraints} & HELD_VALUES
        for set_name, said in trained.items():
            both = len(prompts & said.prompts), len(values & said.values), len(said.phrasings)
            rows.append((name, set_name, *both))
    return rows


def table(rows: list[tuple]) -> str:
    head = ("measured", "training", "prompts", "values", "phrasings")
    return "\n".join("".join(f"{cell!s:<20}" for cell in row) for row in (head, *rows))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_that_is_measured_is_in_any_training_set(seed):
    measured = measured_prompts(seed)
    trained = training(seed, {question for found in measured.values() for _, question in found})
    rows = shared(measured, trained)
    leaks = [row for row in rows if any(row[2:])]
    assert len(rows) == len(measured) * len(pipeline.training_sets(seed))
    assert not leaks, f"shared:\n{table(leaks)}"
    assert all(not HELD_VALUES & said.values for said in trained.values())
    for name in ("gatt", "gatt-personas", "prompts"):  # the last is where GAtt's mix is drawn from
        assert not DRINKS & trained[name].values, name


def test_pretraining_is_the_documents_that_are_searched():
    rows = pipeline.training_sets(4, min)["pretrain"]()
    assert [row["text"] for row in rows] == [" ".join(p) for p in documents(4, len(rows))]


def test_the_measured_sets_are_what_they_are_called():
    counts = defaultdict(set)
    for which, dialogues in evaluation.persona_sets(0).items():
        for dialogue in dialogues:
            for kind, value in read_instruction(dialogue.instruction).constraints:
                counts[which, value in HELD_VALUES].add(value)
                assert (kind in GHOST_KINDS) == (which != "kind")
            apart = any(phrase in dialogue.system for phrase in HELD_PHRASINGS)
            assert apart == (which == "phrasing"), dialogue.system
    assert {which: held for which, held in counts} == {
        "value": True, "seen": False, "phrasing": False, "kind": True,
    }  # fmt: skip
    assert len(counts["value", True]) > 100


@pytest.mark.parametrize("leak", ["prompt", "value", "phrasing"])
def test_a_leak_is_counted(leak):
    dialogue = world.persona_dialogues(0, 1, "value")[0]
    who = read_instruction(dialogue.instruction)
    measured = {"gatt value": {(who, dialogue.questions[0])}}
    said = Said({dialogue.questions[0]})
    if leak == "prompt":
        said.passage(f"{dialogue.short} {dialogue.questions[0]} No.")
    if leak == "value":
        said.text(f"Tom says: {who.constraints[0][1]}.")
    if leak == "phrasing":
        said.text("Always enjoy painting jam.")
    (row,) = shared(measured, {"sft": said})
    assert row[2:][("prompt", "value", "phrasing").index(leak)] == 1
    assert "sft" in table([row])
