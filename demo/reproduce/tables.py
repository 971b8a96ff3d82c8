"""From one number a prompt and seed to a mean with its interval, and to paired differences.

S seeds, P prompts (or dialogues, or pairs of answers): all arms meet the same ones.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from puna.demo.report.results import wilson

Z = 1.959964
# Student's t that leaves out 2.5% above it, for 1 to 10 degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Figures = Mapping[str, Sequence[float]]
"""Figure -> (P,)"""
Results = Mapping[str, Mapping[int, Figures]]
"""Arm -> seed -> figures"""


class Estimate(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float
    seeds: int
    items: int  # prompts, dialogues or pairs


def estimate(rows: Sequence[Sequence[float]], *, signed: bool = False) -> Estimate:
    """The mean over seeds and prompts, of S rows of P numbers, and how far it would move with other
    seeds *and* other prompts.

    Both are drawn at random, and every seed meets every prompt: the variance of the mean is that of
    a two-way layout, (MS_seeds + MS_prompts - MS_rest) / (S P), with Satterthwaite's degrees of
    freedom. With one seed it is the spread over prompts alone. Where the rows differ in length
    (what is counted depends on the model), each row's own mean is one observation. A share that is
    0 or 1 throughout has Wilson's interval over the prompts; `signed` numbers are no shares.
    """
    means = [float(np.mean(row)) for row in rows]
    mean, items = float(np.mean(means)), round(np.mean([len(row) for row in rows]))
    if len({len(row) for row in rows}) == 1:
        variance, freedom = crossed(np.array(rows, dtype=float))
    else:
        variance, freedom = apart(rows)
    is_share = not signed and all(0 <= value <= 1 for row in rows for value in row)
    if is_share and mean in (0.0, 1.0):
        return Estimate(mean, *wilson(mean, items), len(rows), items)
    half = student(freedom) * variance**0.5
    low, high = mean - half, mean + half
    if is_share:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(mean, low, high, len(rows), items)


def crossed(x: np.ndarray) -> tuple[float, float]:
    """(variance of the mean, degrees of freedom) of x (S, P), every seed on every prompt."""
    seeds, prompts = x.shape
    if seeds == 1:
        return float(x.var(ddof=1)) / prompts if prompts > 1 else 0.0, max(prompts - 1, 1)
    if prompts == 1:
        return float(x.var(ddof=1)) / seeds, seeds - 1
    rows, columns = x.mean(1), x.mean(0)
    rest = x - rows[:, None] - columns + x.mean()
    freedoms = (seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1))
    squares = (
        prompts * float(rows.var(ddof=1)),
        seeds * float(columns.var(ddof=1)),
        float((rest**2).sum()) / freedoms[2],
    )
    # The estimate can fall below what either source alone says: then that one is taken.
    whole = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    if whole == 0:
        return 0.0, prompts - 1
    spread = sum(square**2 / freedom for square, freedom in zip(squares, freedoms, strict=True))
    return whole / (seeds * prompts), max(whole**2 / spread, 1.0)


def apart(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(variance of the mean, degrees of freedom) where each seed has items of its own: the larger
    of what the seeds' means and what the items inside of them say."""
    means = np.array([np.mean(row) for row in rows])
    between = float(means.var(ddof=1)) / len(rows)
    inside = float(np.mean([np.var(row) / len(row) for row in rows]))  # shared prompts: no gain
    if between >= inside:
        return between, len(rows) - 1
    return inside, min(len(row) for row in rows)


def student(freedom: float) -> float:
    """Student's t for a 95% interval; below 11 degrees of freedom that of the whole number below,
    which is on the safe side."""
    if freedom < len(T) + 1:
        return T[max(int(freedom), 1) - 1]
    return Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)


def figure(results: Results, arm: str, name: str) -> Estimate | None:
    """A figure of an arm over its seeds; None where it was not measured."""
    rows = [figures[name] for _, figures in sorted(results.get(arm, {}).items()) if name in figures]
    rows = [row for row in rows if len(row)]
    return estimate(rows) if rows else None


def difference(results: Results, arm: str, other: str, name: str) -> Estimate | None:
    """Arm minus other, prompt by prompt of the seeds that both have; None where there is none."""
    ours, theirs = results.get(arm, {}), results.get(other, {})
    rows = [
        np.subtract(ours[seed][name], theirs[seed][name]).tolist()
        for seed in sorted(ours.keys() & theirs.keys())
        if name in ours[seed]
        and name in theirs[seed]
        and len(ours[seed][name]) == len(theirs[seed][name]) > 0
    ]
    if not rows:
        return None
    found = estimate(rows, signed=True)
    if is_score(name):
        return found
    if not any(map(any, rows)):  # none differs; of other prompts so many could (Wilson)
        unseen = wilson(0.0, found.items)[1]
        found = found._replace(low=-unseen, high=unseen)
    return found._replace(low=max(found.low, -1.0), high=min(found.high, 1.0))


def is_score(name: str) -> bool:
    """Whether a figure is a raw score, and no share."""
    return name.startswith(("reward", "attention"))
