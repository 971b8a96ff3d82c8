"""Pictures of the page for README.md and docs/annotate.md, taken in a headless Chromium.

Two chat models answer, the oracle of the demo's village compares as three people would, reward
models order the same answers, and the page is photographed. Of a run of `puna demo` in runs/demo:

    python tests/annotate_screenshots.py --out docs/figures \\
        --prompts runs/demo/data/prompts.jsonl --models NEWER OLDER --rewards HELPFULNESS SAFETY
"""

import argparse
import random
import tempfile
from pathlib import Path

from annotate_pages import served
from browser import PHONE, Browser
from PIL import Image  # comes with matplotlib

from puna.annotate.app import REASONS
from puna.annotate.config import AnnotateConfig
from puna.annotate.guidelines import rendered
from puna.annotate.scoring import Scoring
from puna.annotate.supply import Supply
from puna.demo.village import oracle
from puna.trainers.annotations.items import KINDS, SIDES, Item, hand_out, progress_of
from puna.trainers.annotations.people import person
from puna.trainers.annotations.store import Store, opened
from puna.trainers.annotations.verdicts import skip, submit

PEOPLE = {"Ana": 0.1, "Ben": 0.2, "Chen": 0.35}  # and how much noise is in what each says
GUIDELINES = {
    "helpfulness": "Prefer the answer that is **right**, then the one in a whole, polite sentence.",
    "safety": "An answer that helps to do harm is **unsafe**, and so is an insult.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs=2, type=Path, required=True)
    parser.add_argument("--rewards", nargs=2, type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=160, help="comparisons in a batch")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "c.db", create=True) as db:
        supply = collected(db, given)
        photographed(db, supply, given.out)


def collected(store: Store, given: argparse.Namespace) -> Supply:
    """Two batches by three people: the older model against itself, then both."""
    newer, older = given.models
    named = {str(newer): "runs/v1/model", str(older): "runs/sft/model"}
    for number, models in enumerate(([older], [newer, older]), 1):
        config = AnnotateConfig(
            models=models, prompts=[given.prompts], out=store.path, batch=number,
            pairs=given.pairs, overlap=0.3, ahead=given.pairs, max_new_tokens=64, seed=number,
        )  # fmt: skip
        supply = Supply(store, config)
        supply.speakers = tuple(each._replace(name=named[each.name]) for each in supply.speakers)
        while supply.step():
            pass
        everybody_compares(store, number, leave=9 if number == 2 else 0)
    scoring = Scoring(store, dict(zip(KINDS, given.rewards, strict=True)), "cpu")
    for judge in scoring.judges:
        judge.path = Path("runs/reward-1", judge.kind)
    while scoring.step():
        pass
    return supply


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


def photographed(store: Store, supply: Supply, out: Path) -> None:
    """compare, on a desk in light; safety, on a phone in dark; dashboard."""
    browser = Browser()
    try:
        guidelines = {kind: rendered(text) for kind, text in GUIDELINES.items()}
        with served(store, guidelines, supply=supply) as at:
            browser.size(1100, 620)
            before(store, at, browser, "helpfulness")
            browser.press("2")
            photograph(browser, out / "annotate-compare.png")
            browser.get(f"{at}/dashboard")
            browser.size(1100, 1260)
            photograph(browser, out / "annotate-dashboard.png")
            browser.size(PHONE[0], 990)
            browser.dark(True)
            before(store, at, browser, "safety")
            browser.press("0", *"sss")
            photograph(browser, out / "annotate-phone.png")
    finally:
        browser.driver.quit()


def photograph(browser: Browser, path: Path) -> None:
    """A picture of at most 200 colours, which is much smaller."""
    browser.screenshot(path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(200, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def before(store: Store, at: str, browser: Browser, kind: str) -> None:
    """Go to the longest item of a kind that is left."""
    item = store.number(
        "SELECT id FROM item JOIN answer ON item = id WHERE kind = ? GROUP BY id "
        "ORDER BY wanted > 0 DESC, sum(length(text)) DESC LIMIT 1", kind
    )  # fmt: skip
    with store.writing() as db:
        db.execute("DELETE FROM hand")
        db.execute(
            "UPDATE item SET wanted = 1, reserved = ? WHERE id = ?", (person(store, "me"), item)
        )
    browser.get(at)


if __name__ == "__main__":
    main()
