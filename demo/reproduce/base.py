"""What the arms build on: the demo's data and its SFT model, and what each seed judges by.

The stages are the demo's own, with the demo's recipes, but for the constants below and for fp32:
what docs/questions.md shows was made so. All arms share one SFT model. Each seed has
comparisons and both reward models of its own, as the arms of one seed do not say what other judges
would have led to: seed 0 has the demo's.
"""

import random
from collections.abc import Callable
from dataclasses import replace
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

STEPS = 1_400  # of pretraining; the demo takes 1,800, in bf16 where it can
PROMPTS = 960  # of one round of rejection sampling; PPO takes as many answers to the same ones
SKILL_PROMPTS = 360  # of the loop about a skill that nobody judges; a third of them ask for it
GHOST_DIALOGUES = 200  # of 20 exchanges
GHOST = {"epochs": 3, "lr": 5e-4}  # the demo has five times as many dialogues, each seen once
GHOST_PERSONAS = 800  # short dialogues mixed into Ghost Attention's training
# Held-out comparisons, each of another prompt; some go because both answers are the same.
PAIRS = {"helpfulness": 6_000, "safety": 2_500}
MOST_SEEDS = 1000


class Base(NamedTuple):
    """The folder of the run, the demo run in it that the arms start from, and a seed's judges."""

    out: Path
    demo: Demo
    loop: RLHFConfig  # whose first round gives comparisons and reward models

    def of_seed(self, seed: int) -> "Base":
        """With a loop of its own for each seed; the demo's for seed 0."""
        if seed == 0:
            return self
        folder = self.out / "judges" / f"seed-{seed}"
        return self._replace(loop=replace(self.loop, out=folder, seed=self.drawn(seed)))

    def drawn(self, seed: int) -> int:
        """The random numbers of an arm's seed: another run's arms have others."""
        return MOST_SEEDS * self.demo.config.seed + seed

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
        "pretrain": lambda: base.demo.pretrain(STEPS),
        "sft": base.demo.sft,
        "arms' data": lambda: write_data(base),
        "held-out comparisons": lambda: write_held_out(base),
    }
    for name, work in stages.items():
        base.demo.stage(name, work)


def make_judges(base: Base) -> None:
    """V1's comparisons, two answers of the SFT model that the oracle reads, and reward models."""
    compare_answers(base, 1, base.sft)
    for kind in KINDS:
        rlhf.once(rlhf.reward_config(base.loop, 1, kind, base.sft, None), run_reward)


def compare_answers(base: Base, number: int, model: Path) -> None:
    """Comparisons of two answers of `model` each, as those of version `number`."""
    folder = base.loop.out / f"round-{number}"
    compare(base.loop, number, folder, [model] * 2, annotators(base.loop.seed))


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
