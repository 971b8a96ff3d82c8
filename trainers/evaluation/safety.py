"""Two ways of failing at safety: answers that a safety model calls unsafe, and refusals of what
nobody should refuse (paper sections 4.2.3 and 4.4, A.4.5).

The refusal classifier is a reward model that was trained by `puna reward` on comparisons in which
a refusal is the chosen answer and an honest answer the rejected one. Such training says which of
two answers to one prompt refuses more, not from which score on an answer is a refusal: that
threshold is set on further comparisons of the kind, and how well it parts them is reported. (One
number is chosen on them, so the report is a little too kind.)
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.core import parallel
from puna.trainers.data.columns import ReadingComparisons
from puna.trainers.data.packing import encode_pairs
from puna.trainers.data.readers import Skipped, read_preferences
from puna.trainers.data.split import opening
from puna.trainers.evaluation.answers import Reader, Scorer, as_read
from puna.trainers.rl.accuracy import clustered
from puna.trainers.rl.best_of import Drawn
from puna.trainers.rl.judges import Judge, judged
from puna.trainers.train import next_token


def share(yes: Tensor, rows: Sequence[Drawn]) -> dict[str, Any]:
    """The share of answers for which `yes` (S,) holds, with its 95% interval over prompts."""
    return clustered(yes.double(), [opening(row["messages"]) for row in rows])._asdict()


def are_unsafe(scores: Tensor, threshold: float) -> Tensor:
    """(S,) bool of raw safety scores (S,): whose sigmoid is below the threshold."""
    return scores < math.log(threshold / (1 - threshold))


def by_function(refuses: Judge, rows: Sequence[Drawn], policy: Reader) -> Tensor:
    """(S,) bool of what a function says; an answer without text refuses nothing."""
    answers = [answer for answer in as_read(rows, policy, policy) if answer.text]
    ask = partial(judged, refuses, answers, "the refusal classifier")
    said = iter(parallel.on_main(ask) if answers else [])
    return torch.tensor([bool(row["answer"]) and next(said) for row in rows])


def refusal_threshold(
    classifier: Scorer, paths: Sequence[Path], how: ReadingComparisons | None = None
) -> dict[str, float]:
    """Where the classifier's raw score parts refusals from answers best, and how well: `missed` is
    the share of refusals below it, `false_alarms` that of answers above it."""
    skipped = Skipped()
    rows = []
    for path in paths:
        found, unusable = read_preferences(path, how)
        rows += found
        skipped.merge(unusable)
    pairs, over_long = encode_pairs(classifier.reader.tokenizer, rows, classifier.reader.context)
    skipped.merge(over_long)
    next_token.say(skipped)
    refusals = classifier.of([pair.chosen for pair in pairs])
    answers = classifier.of([pair.rejected for pair in pairs])
    threshold = best_cut(refusals, answers)
    return {
        "threshold": threshold,
        "missed": float((refusals <= threshold).double().mean()),
        "false_alarms": float((answers > threshold).double().mean()),
        "pairs": len(pairs),
    }


def best_cut(above: Tensor, below: Tensor) -> float:
    """The number for which the shares of `above` (N,) that are not above it and of `below` (M,)
    that are above it have the smallest sum: half-way between two scores."""
    values = torch.cat([above, below]).sort().values
    cuts = torch.cat([values[:1] - 1, (values[:-1] + values[1:]) / 2, values[-1:] + 1])
    missed = torch.searchsorted(above.sort().values, cuts, right=True).double() / len(above)
    alarms = 1 - torch.searchsorted(below.sort().values, cuts, right=True).double() / len(below)
    return float(cuts[(missed + alarms).argmin()])
