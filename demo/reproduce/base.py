"""What all arms share: the demo's data, its SFT model, first comparisons and both reward models.

The stages are the demo's own, with the demo's recipes. One base serves all seeds: the seed of an
arm varies what the arm samples and trains.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from puna.core.documents import json_rows
from puna.core.text.tokenizer import Tokenizer
from puna.demo.evaluation import compare_held_out
from puna.demo.pipeline import Demo, annotators, ghost_row
from puna.demo.village import oracle, world
from puna.demo.village.tasks import draw_task
from puna.trainers import rlhf
from puna.trainers.data.prompts import load_prompts
from puna.trainers.reward import run as run_reward
from puna.trainers.rl.comparisons import write_rows
from puna.trainers.rl.config import RLHFConfig
from puna.trainers.rl.rounds import KINDS, compare

PROMPTS = 960  # of one round of rejection sampling; PPO takes as many answers to the same ones
SKILL_PROMPTS = 360  # of the loop about a skill that nobody judges; a third of them ask for it
GHOST_DIALOGUES = 200  # of 20 exchanges
GHOST_PERSONAS = 800  # short dialogues mixed into Ghost Attention's training
# Held-out comparisons, each of another prompt; some go because both answers are the same.
PAIRS = {"helpfulness": 6_000, "safety": 2_500}


class Base(NamedTuple):
    """The folder of the run, and in it the demo run that the arms start from."""

    out: Path
    demo: Demo
    loop: RLHFConfig  # the demo's, whose first round gives comparisons and reward models

    @property
    def sft(self) -> Path:
        return self.loop.model

    @property
    def judges(self) -> dict[str, Path]:
        """The reward models by kind."""
        return {kind: self.loop.out / "round-1" / kind / "model" for kind in KINDS}

    def comparisons(self, kind: str) -> Path:
        """What the reward model of this kind was trained on."""
        return self.loop.out / "round-1" / f"{kind}.jsonl"

    def file(self, name: str) -> Path:
        """A file of the data that is the arms' own."""
        return self.out / "data" / f"{name}.jsonl"

    def held_out(self, kind: str) -> Path:
        return self.file(f"{kind}-comparisons")


def base_of(out: Path, demo: Demo) -> Base:
    """Names what `make` makes."""
    return Base(out, demo, demo.rlhf_config())


def make(base: Base) -> None:
    """Do what is still to be done of the base."""
    stages: dict[str, Callable[[], Any]] = {
        "data": base.demo.write_world,
        "tokenizer": base.demo.train_tokenizer,
        "pretrain": base.demo.pretrain,
        "sft": base.demo.sft,
        "comparisons": lambda: compare_first(base),
        "reward": lambda: train_judges(base),
        "arms' data": lambda: write_data(base),
        "held-out comparisons": lambda: write_held_out(base),
    }
    for name, work in stages.items():
        base.demo.stage(name, work)


def compare_first(base: Base) -> None:
    """V1's comparisons: two answers of the SFT model, read by the oracle."""
    folder = base.loop.out / "round-1"
    compare(base.loop, 1, folder, [base.sft] * 2, annotators(base.loop.seed))


def train_judges(base: Base) -> None:
    """V1's reward models."""
    for kind in KINDS:
        rlhf.once(rlhf.reward_config(base.loop, 1, kind, base.sft, None), run_reward)


def write_data(base: Base) -> None:
    """Prompts and dialogues of the arms, drawn from the demo's where it has them."""
    demo, seed = base.demo, base.loop.seed
    prompts = [row for _, row in json_rows(base.loop.prompts[0])]
    count = demo.scaled(PROMPTS, 32)
    skill = demo.scaled(SKILL_PROMPTS // 3, 8)
    made: dict[str, Callable[[], list[Any]]] = {
        "first": lambda: prompts[:count],
        "half": lambda: prompts[: count // 2],
        "second": lambda: prompts[count : 2 * count],
        "skill": lambda: repeat_prompts(seed, skill) + prompts[: 2 * skill],
        "ghosts": lambda: [
            ghost_row(dialogue)
            for dialogue in world.persona_dialogues(seed, demo.scaled(GHOST_DIALOGUES, 6))
        ],
        "ghost-personas": lambda: world.persona_demonstrations(
            seed, demo.scaled(GHOST_PERSONAS, 12), world.GHOST_KINDS
        ),
    }
    for name, rows in made.items():
        if not base.file(name).exists():
            write_rows(base.file(name), rows())


def repeat_prompts(seed: int, count: int, *, held_out: bool = False) -> list[dict[str, Any]]:
    """`count` different prompts that ask for three words to be said again."""
    rng = random.Random(f"repeat {seed} {held_out}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        question = draw_task(rng, kind="repeat", held_out=held_out).question
        found[question] = {"messages": [world.user(question)], "safety": False}
    return list(found.values())


def write_held_out(base: Base) -> None:
    """Comparisons as the reward models were trained on, of held-out prompts."""
    tokenizer, seed = Tokenizer(base.demo.tokenizer), base.loop.seed
    for kind, full in PAIRS.items():
        file = base.held_out(kind)
        if file.exists():
            continue
        count = base.demo.scaled(full, 60)
        prompts = base.file(f"{kind}-prompts")
        write_rows(prompts, world.prompts(seed, min(count, full), kind, held_out=True))
        encoded, _ = load_prompts([prompts], tokenizer, 512)
        annotator = oracle.annotator(seed + 1, safety=kind == "safety")
        models = (base.sft, base.sft)
        compare_held_out(file, models, tokenizer, encoded, len(encoded), seed, 1, annotator)
