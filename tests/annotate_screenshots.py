"""Pictures of the page for README.md and docs/annotate.md, taken in a headless Chromium.

Two chat models answer, the oracle of the demo's village compares as three people would, and the
page is photographed. From the repository's root, with what `puna demo` has left in runs/demo:

    python tests/annotate_screenshots.py --models NEWER OLDER --prompts PROMPTS --out docs/figures
"""

import argparse
import random
import tempfile
from pathlib import Path

from annotated import ask
from browser import PHONE, Browser, served

from puna.annotate.config import AnnotateConfig
from puna.annotate.supply import Speaker, Supply
from puna.demo.village import oracle
from puna.trainers.annotations.items import (
    Item,
    add_item,
    ask_batch,
    hand_out,
    progress_of,
    put_answers,
)
from puna.trainers.annotations.people import person
from puna.trainers.annotations.store import Store, opened
from puna.trainers.annotations.verdicts import skip, submit
from puna.trainers.rl.rewards import Answer

PEOPLE = {"Ana": 0.1, "Ben": 0.2, "Chen": 0.35}  # and how much noise is in what each says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs=2, type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=160, help="comparisons in a batch")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "c.db", create=True) as store:
        collected(store, given)
        photographed(store, given.out)


def collected(store: Store, given: argparse.Namespace) -> None:
    """Two batches by three people: the older model against itself, then both."""
    newer, older = given.models
    for number, models in enumerate(([older], [newer, older]), 1):
        config = AnnotateConfig(
            models=models, prompts=[given.prompts], out=store.path, batch=number,
            pairs=given.pairs, overlap=0.3, ahead=given.pairs, max_new_tokens=64, seed=number,
        )  # fmt: skip
        supply = Supply(store, config)
        named = {str(newer): "runs/v1/model", str(older): "runs/sft/model"}
        supply.speakers = tuple(each._replace(name=named[each.name]) for each in supply.speakers)
        while supply.step():
            pass
        everybody_compares(store, number, leave=9 if number == 2 else 0)


def everybody_compares(store: Store, batch: int, leave: int) -> None:
    """Each person in turn takes what lies before them, until no more than `leave` are left."""
    draw = random.Random(batch)
    people = {name: person(store, name) for name in PEOPLE}
    while True:
        for name, who in people.items():
            done, total = progress_of(store, batch)
            item = hand_out(store, who) if done < total - leave else None
            if item is not None:
                say_of(store, who, item, PEOPLE[name], draw)
            elif name == list(people)[-1]:
                return


def say_of(store: Store, who: int, item: Item, noise: float, draw: random.Random) -> None:
    """What the oracle says of an item, after as long as a person takes."""
    seconds = draw.lognormvariate(2.0 + noise, 0.4)
    safety = item.kind == "safety"
    verdict = oracle.compare(item.messages, item.left, item.right, draw, noise=noise, safety=safety)
    if verdict.safety == "chosen_unsafe" or draw.random() < 0.02:
        skip(store, who, item.key, draw.choice(REASONS[:3]), seconds)
        return
    chosen = SIDES[verdict.chosen]
    safe = {"both_safe": "both", "both_unsafe": "neither", "chosen_safe": chosen, None: None}
    submit(store, who, item.key, chosen=chosen, rating=verdict.rating,
           safe=safe[verdict.safety], seconds=seconds)  # fmt: skip
