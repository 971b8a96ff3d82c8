"""In which order a run visits its rows: a pure function of their number, the seed and the step."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

STORED = 1 << 22  # rows whose order is held, 32 MB of it; that of more is computed, row by row
ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15


def rows_at(n: int, seed: int, places: range) -> np.ndarray:
    """int64: the rows, of n, that are visited at these places of all epochs, one after the other.

    The epochs follow each other without a gap: a batch may end one and begin the next, so that
    every row is visited once an epoch whatever the batch size is. Raises ValueError for n = 0.
    """
    if n < 1:
        raise ValueError("there are no rows to train on")
    epochs, inside = np.divmod(np.asarray(places), n)
    return np.concatenate(
        [visited(n, seed, int(epoch), inside[epochs == epoch]) for epoch in np.unique(epochs)]
    )


def rows_in_order(sizes: Sequence[int], epochs: int, seed: int, places: range) -> np.ndarray:
    """As `rows_at`, where the rows are in parts of these sizes and each part is visited `epochs`
    times before the next one begins."""
    visits = np.cumsum([0, *(size * epochs for size in sizes)])
    found = []
    for place in places:
        part = int(np.searchsorted(visits, place, "right")) - 1
        epoch, inside = divmod(place - int(visits[part]), sizes[part])
        row = visited(sizes[part], seed, epoch, np.array([inside]))
        found.append(sum(sizes[:part]) + int(row[0]))
    return np.asarray(found, dtype=np.int64)


def visited(n: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    """The rows, of n, that epoch number `epoch` visits at these places (0 to n - 1).

    Up to STORED rows it is the order of earlier versions, so their runs go on as they began.
    """
    return epoch_order(n, seed, epoch)[places] if n <= STORED else shuffled(n, seed, epoch, places)


@lru_cache(maxsize=2)  # a step needs at most the epoch that ends and the one that begins
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64, read-only: a random order of n rows."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


def shuffled(n: int, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    """A random order of n rows at these places alone: no row is held (2T tokens in rows of 4,096
    are 488M rows, 3.9 GB of order).

    A Feistel network over the next even number of bits permutes up to 4n numbers; one that lands
    outside is sent through again, which ends within n since a permutation goes in circles.
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    keys = np.random.default_rng((seed, epoch)).integers(0, 1 << 63, ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        found[outside] = permuted(found[outside], half, keys)
        outside = found >= n
    return found.astype(np.int64)


def permuted(numbers: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of 2 * half bits."""
    mask = np.uint64((1 << half) - 1)
    left, right = numbers >> np.uint64(half), numbers & mask
    for key in keys:
        left, right = right, left ^ (mixed(right + key) & mask)
    return (left << np.uint64(half)) | right


def mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: every bit of the result depends on every bit of the number."""
    numbers = numbers * np.uint64(GOLDEN)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
