"""How good a reward model is on comparisons that it has not seen: accuracy by rating (as in the
paper's Tables 8 and 28) and by safety label (Table 29), and calibration."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from puna.core import parallel
from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.folder import load_model, open_source, tokenizer_path
from puna.core.device import device_of_name
from puna.core.terminal import say_table
from puna.core.tokenizer import Tokenizer
from puna.trainers.data.formats import SAFETY, Columns, Ratings
from puna.trainers.data.packing import Pair, encode_pairs
from puna.trainers.data.readers import Skipped
from puna.trainers.reward import load_preferences, margins_of
from puna.trainers.rl import accuracy
from puna.trainers.rl.accuracy import Bin, Share
from puna.trainers.train import next_token
from puna.trainers.train.ranges import Batch, Options


@dataclass(kw_only=True)
class EvaluateConfig(Options):
    """Measure a reward model on comparisons: accuracy by rating, calibration."""

    model: Path
    """reward model"""
    data: list[Path]
    """.jsonl of comparisons that it was not trained on"""
    columns: Columns = field(default_factory=Columns)
    """names of the file's columns"""
    ratings: Ratings = field(default_factory=dict)
    """what the file's ratings and safety labels are called"""
    out: Path | None = None
    """.json file to write the figures to"""
    micro_batch: Batch = 64
    """pairs in one forward pass"""
    device: str = "auto"
    """auto takes a GPU where there is one"""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Print the figures, write them to `config.out`, and return what was written."""
    if open_source(config.model).head != "score":
        raise ValueError(
            f"{config.model} is a language model; evaluate needs a reward model: puna evaluate "
            "chat measures chat models"
        )
    model = load_model(config.model, device=device_of_name(config.device))
    pairs, skipped = load_pairs(config, model.config.context)
    next_token.say(skipped)
    name = str(config.model)
    differences, ratings = margins_of(model, pairs, config.micro_batch, model.device, name)
    by_rating = accuracy.shares(differences, ratings, pairs)
    by_safety = safety_shares(differences, pairs)
    without = accuracy.baselines(pairs)
    bins = accuracy.calibration(differences)
    document = {
        "model": str(config.model),
        "data": [str(path) for path in config.data],
        "accuracy": {name: share._asdict() for name, share in by_rating.items()},
        "accuracy_by_safety": {name: share._asdict() for name, share in by_safety.items()},
        "chance": 0.5,
        "baselines": {name: share._asdict() for name, share in without.items()},
        "calibration": [{"confidence": b.confidence, "right": b.right._asdict()} for b in bins],
        "calibration_error": accuracy.calibration_error(bins),
        "skipped": dict(Counter(skipped)),
    }
    if parallel.is_main():
        show(by_rating | by_safety | without, bins)
        if config.out is not None:
            write_text(config.out, json.dumps(document, indent=2) + "\n")
    return document


def load_pairs(config: EvaluateConfig, context: int) -> tuple[list[Pair], Skipped]:
    """All usable comparisons, and what was skipped."""
    rows, skipped = load_preferences(config.data, config.columns, config.ratings)
    pairs, over_long = encode_pairs(Tokenizer(tokenizer_path(config.model)), rows, context)
    skipped.merge(over_long)
    return pairs, skipped


def safety_shares(differences: torch.Tensor, pairs: list[Pair]) -> dict[str, Share]:
    """Accuracy for each safety label that occurs (Table 29's columns)."""
    hits = accuracy.right(differences)
    found = {}
    for label in SAFETY:
        inside = [i for i, pair in enumerate(pairs) if pair.safety == label]
        if inside:
            found[label] = accuracy.clustered(hits[inside], [pairs[i].prompt for i in inside])
    return found


def show(shares: dict[str, Share], bins: list[Bin]) -> None:
    """Two tables: accuracy, and how it compares with the model's confidence."""
    rows = [(name.replace("_", " "), *_cells(share)) for name, share in shares.items()]
    rows.append(("chance", "0.500", "", ""))
    say_table(rows, ("pairs rated", "accuracy", "95% interval", "pairs"), "Accuracy")
    error = accuracy.calibration_error(bins)
    title = f"Calibration (expected error {error:.3f})"
    rows = [(f"{each.confidence:.3f}", *_cells(each.right)) for each in bins]
    say_table(rows, ("mean confidence", "right", "95% interval", "pairs"), title)


def _cells(share: Share) -> tuple[str, str, str]:
    return f"{share.share:.3f}", f"{share.low:.3f} to {share.high:.3f}", str(share.pairs)
