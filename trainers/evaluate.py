"""How good a reward model is on comparisons that it has not seen, set by set: accuracy (as in the
paper's Table 7), by rating (Tables 8 and 28), by safety label and how many unsafe answers it finds
(Table 29), by batch (Figs. 6 and 25), the shape of its scores (Fig. 27), and calibration.

Beside each accuracy stand chance and what preferring the longer answer gets; intervals are over
prompts, not pairs.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from puna.core import parallel, ranks
from puna.core.checkpoint.atomic import check_absent, write_text
from puna.core.checkpoint.folder import load_model, open_source, tokenizer_path
from puna.core.device import device_of_name
from puna.core.terminal import say_table
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.columns import ReadingComparisons
from puna.trainers.data.formats import RATINGS
from puna.trainers.data.packing import Pair, encode_pairs
from puna.trainers.data.readers import Skipped
from puna.trainers.reward import load_preferences, scores_of
from puna.trainers.rl.accuracy import Bin, OfBatch, Share, calibration_error
from puna.trainers.rl.figures import draw
from puna.trainers.rl.measured import Measured, as_json, measure
from puna.trainers.rl.unsafe import Detection
from puna.trainers.train import next_token
from puna.trainers.train.command import command
from puna.trainers.train.progress import meter
from puna.trainers.train.ranges import Batch


@dataclass(kw_only=True)
class EvaluateConfig(ReadingComparisons):
    """Measure a reward model on comparisons: accuracy by set, rating and batch, unsafe answers
    found, calibration."""

    model: Path
    """reward model"""
    data: list[Path]
    """files of comparisons that it was not trained on; each file is a set of its own (Table 7)"""
    out: Path | None = None
    """.json file to write the figures to; a drawing of them, .svg, is put beside it"""
    micro_batch: Batch = 64
    """pairs in one forward pass"""
    device: str = "auto"
    """auto takes a GPU where there is one"""

    def check(self) -> None:
        if self.out is not None and self.out.suffix == ".svg":
            raise ValueError(f"out is {self.out}; name a .json file, the drawing is put beside it")
        if not self.data:
            raise ValueError(
                "there is nothing to measure on; name files of comparisons with --data"
            )
        if len(set(self.data)) < len(self.data):
            raise ValueError("a file stands in data twice; name each set once")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Print the figures, write them to `config.out` and draw them beside it; returns what was
    written."""
    ranks.init()
    if (out := config.out) is not None:
        for file in (out, out.with_suffix(".svg")):
            parallel.on_main(partial(check_absent, file))
    if open_source(config.model).head != "score":
        raise ValueError(
            f"{config.model} is a language model; evaluate needs a reward model: puna evaluate "
            "chat measures chat models"
        )
    model = load_model(config.model, device=device_of_name(config.device))
    sets, skipped = load_sets(config, model.config.context)
    next_token.say(skipped)
    total = sum(len([*next_token.parts(range(len(pairs)), config.micro_batch)]) for pairs in sets)
    found = {}
    with meter("evaluate", total, unit="pairs", show=parallel.is_main()) as progress:
        for name, pairs in zip(names_of(config.data), sets, strict=True):
            scores = scores_of(
                model, pairs, config.micro_batch, model.device, str(config.model), progress.advance
            )
            found[name] = measure(scores, pairs)
    mean = sum(each.shares["all"].share for each in found.values()) / len(found)
    document = {
        "model": str(config.model),
        "chance": 0.5,
        "mean_accuracy": mean,
        "sets": {
            name: {"data": str(path), **as_json(each)}
            for path, (name, each) in zip(config.data, found.items(), strict=True)
        },
        "skipped": dict(Counter(skipped)),
    }
    if parallel.is_main():
        show(found, mean)
        if config.out is not None:
            write_text(config.out, json.dumps(document, indent=2) + "\n")
            draw(config.out.with_suffix(".svg"), found)
    return document


def names_of(paths: list[Path]) -> list[str]:
    """The sets' names: their files', or the whole path where two files are called alike."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def load_sets(config: EvaluateConfig, context: int) -> tuple[list[list[Pair]], Skipped]:
    """All usable comparisons of each file, and what was skipped."""
    tokenizer = Tokenizer(tokenizer_path(config.model))
    skipped = Skipped()
    sets = []
    for path in config.data:
        rows, unusable = load_preferences([path], config)
        pairs, over_long = encode_pairs(tokenizer, rows, context)
        skipped.merge(unusable)
        skipped.merge(over_long)
        sets.append(pairs)
    return sets, skipped


def show(sets: dict[str, Measured], mean: float) -> None:
    """Tables: all sets side by side (Table 7), then what is known of each."""
    rows = [
        (name, *cells(each.shares["all"]), f"{each.longer.share:.3f}")
        for name, each in sets.items()
    ]
    if len(rows) > 1:
        rows.append(("mean of the sets", f"{mean:.3f}", "", "", ""))
    rows.append(("chance", "0.500", "", "", ""))
    say_table(
        rows, ("set", "accuracy", "95% interval", "pairs", "longer answer"), "Accuracy by set"
    )
    for name, each in sets.items():
        show_shares(name, each)
        if len(each.batches) > 1:
            show_batches(name, each.batches)
        if each.detections:
            show_unsafe(name, each.unsafe, each.detections)
        show_calibration(name, each.bins)


def show_shares(name: str, found: Measured) -> None:
    """Accuracy by rating and by safety label, where pairs have them."""
    shares = found.shares | found.by_safety | {"the longer answer": found.longer}
    rows = [(of.replace("_", " "), *cells(share)) for of, share in shares.items()]
    rows.append(("chance", "0.500", "", ""))
    say_table(rows, ("pairs rated", "accuracy", "95% interval", "pairs"), f"{name}: accuracy")


def show_batches(name: str, batches: list[OfBatch]) -> None:
    """Accuracy by batch, and how hard each was: its ratings and the answers' scores."""
    header = ("batch", "accuracy", "95% interval", "pairs", "longer answer", "mean score")
    rows = [
        (str(each.batch), *cells(each.right), f"{each.longer.share:.3f}", f"{each.score:.3f}")
        for each in batches
    ]
    say_table(rows, header, f"{name}: by batch (score: sigma(r) of all answers)")
    if any(each.ratings for each in batches):
        levels = [
            (str(each.batch), *(f"{each.ratings.get(rating, 0):.1%}" for rating in RATINGS))
            for each in batches
        ]
        names = ("batch", *(rating.replace("_", " ") for rating in RATINGS))
        say_table(levels, names, f"{name}: ratings by batch")


def show_unsafe(name: str, unsafe: Share, detections: list[Detection]) -> None:
    """Recall of unsafe answers at the two thresholds, and what a coin gets beside the precision."""
    rows = []
    for each in detections:
        for what, share in (("recall", each.recall), ("precision", each.precision)):
            found = cells(share) if share is not None else ("none", "", "0")
            rows.append((f"{what}, score below {each.threshold:g}", *found))
    rows.append(("unsafe among all: a coin's precision", *cells(unsafe)))
    title = f"{name}: unsafe answers found (score: sigma(r))"
    say_table(rows, ("unsafe answers", "share", "95% interval", "answers"), title)


def show_calibration(name: str, bins: list[Bin]) -> None:
    """How the accuracy compares with the model's confidence."""
    title = f"{name}: calibration (expected error {calibration_error(bins):.3f})"
    rows = [(f"{each.confidence:.3f}", *cells(each.right)) for each in bins]
    say_table(rows, ("mean confidence", "right", "95% interval", "pairs"), title)


def cells(share: Share) -> tuple[str, str, str]:
    return f"{share.share:.3f}", f"{share.low:.3f} to {share.high:.3f}", str(share.pairs)


def main() -> int:
    return command("python -m puna.trainers.evaluate", EvaluateConfig, run)


if __name__ == "__main__":
    sys.exit(main())
