"""Rows of one's own with others mixed in, as the paper mixes public comparisons in (3.2.2)."""

from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, TypeVar

import numpy as np

from puna.core.documents import count_of
from puna.trainers.data.readers import Skipped
from puna.trainers.train.ranges import ShareOf

Item = TypeVar("Item")
MixShare = Annotated[float, ShareOf(whole="what is trained on")]


def mixed(
    own: Sequence[Item],
    others: Sequence[Item],
    held: Sequence[Item],
    share: float | None,
    seed: int,
    group: Callable[[Item], Hashable],
    skipped: Skipped,
) -> list[Item]:
    """All of `own` and so many of `others` that these are `share` of the whole, or all of them
    where it is None; what it came to is a note in `skipped`.

    None is taken twice: where there are too few, their share is smaller. None is taken whose
    `group` (how it begins) is held out.
    """
    barred = {group(item) for item in held}
    free = [item for item in others if group(item) not in barred]
    taken = draw_share(free, len(own), share, seed)
    found = len(taken) / (len(own) + len(taken))
    both = f"{count_of(len(own), 'own row')} and {len(taken):,} of {count_of(len(others), 'other')}"
    note = f"mix: {both}, {found:.1%}"
    if share is not None and len(taken) < wanted(len(own), share):
        note += f" of all where {share:.1%} is asked for: there are no more, and none counts twice"
    if barred and len(free) < len(others):
        count = count_of(len(others) - len(free), "other")
        note += f"; {count} left out for beginning as one that is held out"
    skipped.notes.append(note)
    return [*own, *taken]


def wanted(own: int, share: float) -> int:
    """How many others make `share` of the whole beside so many of one's own."""
    return round(share / (1 - share) * own)


def draw_share(others: Sequence[Item], own: int, share: float | None, seed: int) -> list[Item]:
    """A random draw without repetition, in the order of `others`. With the same seed a smaller
    share is part of a larger one, so that runs with more and more of it can be compared."""
    if share is None:
        return list(others)
    order = np.random.default_rng((seed, 1)).permutation(len(others))
    return [others[i] for i in sorted(order[: wanted(own, share)].tolist())]
