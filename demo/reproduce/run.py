"""`puna reproduce`: the base, then the arms, then what they say.

    base/                         the demo's stages up to the SFT model; seed 0's reward models
    judges/seed-<n>/              the comparisons and reward models of the other seeds
    data/                         what the arms are trained on and measured with
    arms/<arm>/seed-<n>/          the arm's run;  seed-<n>.json   what was measured of it
    results.json                  every figure with its interval
    experiments.md, figures/      the four questions, answered with it

An arm whose figures are written is passed over, one that was interrupted goes on, so the same
command continues; more seeds or minutes add to what is there.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import say
from puna.demo.pipeline import Demo, DemoConfig
from puna.demo.reproduce import base as bases
from puna.demo.reproduce.arms import EXTRA_SEEDS, SFT, Arm, planned
from puna.demo.reproduce.base import MOST_SEEDS, Base
from puna.demo.reproduce.measures import Scene, measured, scene_of
from puna.demo.reproduce.page import ran, write_page
from puna.demo.reproduce.results import (
    document,
    figures_of,
    folder_of,
    missing,
    note,
    read_results,
    say_claims,
)
from puna.trainers.train.claim import owned
from puna.trainers.train.kinds import FREE
from puna.trainers.train.ranges import Above, AtLeast, AtMost, Options, Rate, Seed

SFT_MEASURED = ("answers", "instructions", "repeat")


@dataclass(kw_only=True)
class ReproduceConfig(Options):
    """The experiments behind the four questions of docs/questions.md, on the demo's small world."""

    out: Path = Path("runs/reproduce")
    """folder of the run; an interrupted run in it is continued"""
    seeds: Annotated[int, AtLeast(1), AtMost(MOST_SEEDS - EXTRA_SEEDS), FREE] = 3
    """times each arm is tried, with other random numbers and judges; some twice more"""
    minutes: Annotated[Rate, FREE] = 90.0
    """no arm is begun after so many, all calls together; the page says what is left out"""
    seed: Seed = 0
    """of the world, of the model that all arms start from and of what they are measured with"""
    scale: Annotated[float, Above(0), AtMost(1000)] = 1.0
    """amount of data and steps; 0.02 takes minutes and shows only that all runs"""


def run(config: ReproduceConfig) -> Path:
    """Run, or continue, the experiments; returns the page's path."""
    start = config.out / "base"
    demo = Demo(DemoConfig(out=start, seed=config.seed, scale=config.scale, dtype="fp32"))
    with owned(config):
        base = bases.base_of(config.out, demo)
        bases.make(base)
        try_arms(base, planned(config.seeds), config.minutes)
        left = missing(config.out, config.seeds)
        results = read_results(config.out, config.seeds)
        found = document(results, config.seed, config.seeds, config.scale, left)
        write_text(config.out / "results.json", json.dumps(found, indent=1) + "\n")
        page = write_page(config.out / "experiments.md", ran(config.out))
    say_claims(results)
    if left:
        say(f"Left out after {config.minutes:g} min: {'; '.join(left)}.")
    say(f"\nDone in {demo.seconds() / 60:.0f} min, all calls together.\nPage: {page}")
    return page


def try_arms(base: Base, plan: list[tuple[Arm, int]], minutes: float) -> None:
    """Make and measure what is not there yet, as long as there is time."""
    scene = scene_of(base)
    base.demo.stage("judges 0", partial(judge_seed, scene, 0))
    for number, (arm, seed) in enumerate(plan, 1):
        spent = base.demo.seconds() / 60
        if figures_of(base.out, arm.name, seed) is not None:
            continue
        if spent >= minutes:
            return
        say(f"\narm {number} of {len(plan)}: {arm.title}, seed {seed} ({spent:.0f} min so far)")
        base.demo.stage(f"judges {seed}", partial(judge_seed, scene, seed))
        base.demo.stage(f"{arm.name} {seed}", partial(try_arm, scene, arm, seed))


def try_arm(scene: Scene, arm: Arm, seed: int) -> None:
    """One arm's model and its figures."""
    base = scene.base.of_seed(seed)
    scene = scene._replace(judges=base.judges)
    models = {"start": base.sft if arm.start == SFT else model_of(base, arm.start, seed)}
    for kind, judge in arm.judges.items():
        models[kind] = model_of(base, judge, seed) if judge else base.judges[kind]
    out = folder_of(base.out, arm.name, seed)
    model = arm.stage(base, out, base.drawn(seed), models, arm.options)
    answers = out.with_name(f"{out.name}-answers.json")
    note(base.out, arm.name, seed, measured(scene, model, arm.measured, answers))


def model_of(base: Base, arm: str, seed: int) -> Path:
    return folder_of(base.out, arm, seed) / "model"


def judge_seed(scene: Scene, seed: int) -> None:
    """A seed's judges, and what they say of the model that the arms start from; what does not
    depend on them is measured once, with seed 0."""
    base = scene.base.of_seed(seed)
    bases.make_judges(base)
    if figures_of(base.out, SFT, seed) is None:
        answers = base.out / "data" / "sft-answers.json"
        which = SFT_MEASURED if seed == 0 else ("answers",)
        scene = scene._replace(judges=base.judges)
        note(base.out, SFT, seed, measured(scene, base.sft, which, answers))
