"""How often a reward model orders two answers as people did, how sure that figure is, and whether
the model's own confidence can be believed.

P pairs; a difference is r_chosen - r_rejected, so that sigma(difference) is the probability that
the model gives to the people's choice (Eq. 1).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core.documents import count_of
from puna.trainers.data.formats import RATINGS, SAFETY
from puna.trainers.data.packing import Pair

Z = 1.959964  # 95% of a normal distribution lie within so many standard deviations
BINS = 5  # of the model's confidence, from 0.5 to 1


class Share(NamedTuple):
    """A share of trials, with its 95% interval."""

    share: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.share:.3f} (95% interval {self.low:.3f} to {self.high:.3f})"


def wilson(hits: float, count: int, independent: float | None = None) -> Share:
    """hits / count with Wilson's interval, which stays within 0..1 and is sound for few trials.

    `independent`: so many independent trials would say as much (left out: all of them are).
    """
    if count == 0:
        return Share(math.nan, 0.0, 1.0, 0)
    share, n = hits / count, count if independent is None else independent
    scale = 1 + Z * Z / n
    middle = (share + Z * Z / (2 * n)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Share(share, min(low, share), max(high, share), count)  # rounding at 0 and 1


def clustered(hits: Tensor, clusters: Sequence[Hashable]) -> Share:
    """The mean of `hits` (N,), with Wilson's interval for as many independent trials as have the
    spread that is seen between clusters: trials on one prompt stand or fall together."""
    sums: dict[Hashable, float] = {}
    mean = float(hits.mean()) if len(hits) else math.nan
    for hit, cluster in zip(hits.tolist(), clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + hit - mean
    spread = sum(value * value for value in sums.values())
    plain = len(hits) ** 2 * mean * (1 - mean)  # of independent trials: their count is n
    independent = plain / spread if spread > 0 else len(sums)
    return wilson(float(hits.sum()), len(hits), min(independent, len(hits)))


def right(differences: Tensor) -> Tensor:
    """(P,) float64: 1 where the chosen answer scores higher, 0.5 for equal scores."""
    return (differences > 0).double() + 0.5 * (differences == 0).double()


def shares(
    differences: Tensor, ratings: Tensor, pairs: Sequence[Pair] | None = None
) -> dict[str, Share]:
    """Share of pairs ordered right: "all" and for each rating that occurs.

    differences: (P,); ratings: (P,) int64, index into RATINGS, -1 where unknown. With the `pairs`
    themselves, intervals know which of them share a prompt.
    """
    hits = right(differences)
    prompts = range(len(hits)) if pairs is None else [pair.prompt for pair in pairs]
    found = {"all": clustered(hits, prompts)}
    for level, name in enumerate(RATINGS):
        inside = (ratings == level).nonzero()[:, 0].tolist()
        if inside:
            found[name] = clustered(hits[inside], [prompts[i] for i in inside])
    return found


def safety_shares(differences: Tensor, pairs: Sequence[Pair]) -> dict[str, Share]:
    """Share of pairs ordered right for each safety label that occurs (Table 29's columns)."""
    hits = right(differences)
    found = {}
    for label in SAFETY:
        inside = [i for i, pair in enumerate(pairs) if pair.safety == label]
        if inside:
            found[label] = clustered(hits[inside], [pairs[i].prompt for i in inside])
    return found


class OfBatch(NamedTuple):
    """The pairs that were collected in one week or round."""

    batch: int
    right: Share
    longer: Share  # how often the longer answer was preferred
    ratings: dict[str, float]  # rating -> share of the batch's rated pairs (Fig. 25)
    score: float  # mean sigma(r) of all its answers (in the spirit of Fig. 26)


def by_batch(scores: Tensor, pairs: Sequence[Pair]) -> list[OfBatch]:
    """Accuracy and difficulty of each batch that occurs, in order: where people see less and less
    of a difference, so does a reward model (Figs. 6 and 25). scores: (P, 2), chosen and rejected.
    """
    hits = right(scores[:, 0] - scores[:, 1])
    found = []
    for batch in sorted({pair.batch for pair in pairs if pair.batch is not None}):
        inside = [i for i, pair in enumerate(pairs) if pair.batch == batch]
        own = [pairs[i] for i in inside]
        rated = [pair.rating for pair in own if pair.rating is not None]
        found.append(
            OfBatch(
                batch,
                clustered(hits[inside], [pair.prompt for pair in own]),
                baselines(own)["the longer answer"],
                {name: rated.count(name) / len(rated) for name in RATINGS if name in rated},
                float(torch.sigmoid(scores[inside].double()).mean()),
            )
        )
    return found


def baselines(pairs: Sequence[Pair]) -> dict[str, Share]:
    """What needs no model to be right: how often the longer answer (in tokens) was preferred."""
    longer = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    hits = right(torch.tensor(longer, dtype=torch.float64))
    return {"the longer answer": clustered(hits, [pair.prompt for pair in pairs])}


def accuracies(differences: Tensor, ratings: Tensor) -> dict[str, float]:
    """`shares` without their intervals."""
    return {name: found.share for name, found in shares(differences, ratings).items()}


def sentences(found: Mapping[str, Share], what: str) -> str:
    """One line for each share: the figure, its interval and how many pairs it rests on; then
    chance, which is what a coin gets."""
    names = {name: what if name == "all" else f"  {name.replace('_', ' ')}" for name in found}
    width = max(map(len, names.values()))
    lines = [
        f"{names[name]:<{width}}  {share}, {count_of(share.pairs, 'pair')}"
        for name, share in found.items()
    ]
    return "\n".join([*lines, f"{'  chance':<{width}}  0.500"])


class Bin(NamedTuple):
    """Pairs of which the model is about equally sure."""

    confidence: float  # its mean probability for the answer that it scores higher
    right: Share  # how often that was the people's choice


def calibration(differences: Tensor, prompts: Sequence[Hashable] | None = None) -> list[Bin]:
    """The pairs in bins of the model's confidence sigma(|difference|), empty bins left out.

    A calibrated model is right as often as it is confident. Scores trained with a margin (Eq. 2)
    are pushed apart further than that (paper A.3.3: calibrating them is left to future work).
    With the pairs' `prompts`, intervals know which of them share one.
    """
    prompts = range(len(differences)) if prompts is None else prompts
    confidence = torch.sigmoid(differences.double().abs())
    which = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    hits = right(differences)
    bins = []
    for number in range(BINS):
        inside = (which == number).nonzero()[:, 0].tolist()
        if inside:
            share = clustered(hits[inside], [prompts[i] for i in inside])
            bins.append(Bin(float(confidence[inside].mean()), share))
    return bins


def calibration_error(bins: list[Bin]) -> float:
    """Mean distance between confidence and share right, over pairs (expected calibration error)."""
    total = sum(each.right.pairs for each in bins)
    return sum(each.right.pairs * abs(each.confidence - each.right.share) for each in bins) / total
