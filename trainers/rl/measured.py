"""All that is measured of a reward model on one set of comparisons, and as JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from puna.trainers.data.packing import Pair, levels
from puna.trainers.rl.accuracy import (
    Bin,
    OfBatch,
    Share,
    baselines,
    by_batch,
    calibration,
    calibration_error,
    safety_shares,
    shares,
)
from puna.trainers.rl.unsafe import Detection, detections, histograms, unsafe_share


class Measured(NamedTuple):
    """What a reward model does on one set; what needs labels that it has not is empty."""

    shares: dict[str, Share]  # accuracy: "all" and by rating
    by_safety: dict[str, Share]  # accuracy by safety label
    longer: Share  # how often the longer answer was preferred
    batches: list[OfBatch]
    unsafe: Share  # the unsafe ones among all labelled answers
    detections: list[Detection]
    histograms: dict[str, list[int]]  # answers of a kind -> counts in equal bins of sigma(r)
    bins: list[Bin]  # calibration


def measure(scores: Tensor, pairs: Sequence[Pair]) -> Measured:
    """scores: (P, 2) raw, of the chosen and the rejected answer of each pair."""
    differences = scores[:, 0] - scores[:, 1]
    return Measured(
        shares(differences, levels(pairs), pairs),
        safety_shares(differences, pairs),
        baselines(pairs)["the longer answer"],
        by_batch(scores, pairs),
        unsafe_share(scores, pairs),
        detections(scores, pairs),
        histograms(scores, pairs),
        calibration(differences, [pair.prompt for pair in pairs]),
    )


def as_json(found: Measured) -> dict[str, Any]:
    """The same as plain values; what there was no label for is left out."""
    document: dict[str, Any] = {
        "accuracy": {name: share._asdict() for name, share in found.shares.items()},
        "accuracy_by_safety": {name: share._asdict() for name, share in found.by_safety.items()},
        "baselines": {"the longer answer": found.longer._asdict()},
        "by_batch": [
            each._asdict() | {"right": each.right._asdict(), "longer": each.longer._asdict()}
            for each in found.batches
        ],
        "score_histograms": found.histograms,
        "calibration": [
            {"confidence": each.confidence, "right": each.right._asdict()} for each in found.bins
        ],
        "calibration_error": calibration_error(found.bins),
    }
    if found.detections:
        document["unsafe_answers"] = {
            "share": answers(found.unsafe),
            "below": [
                {
                    "threshold": each.threshold,
                    "precision": answers(each.precision),
                    "recall": answers(each.recall),
                }
                for each in found.detections
            ],
        }
    return {name: value for name, value in document.items() if value not in ({}, [])}


def answers(share: Share | None) -> dict[str, Any] | None:
    """A share of single answers, not of pairs."""
    if share is None:
        return None
    return {"share": share.share, "low": share.low, "high": share.high, "answers": share.pairs}
