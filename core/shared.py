"""Sequences that begin alike, in twos: what both share is computed once, in training, too.

Of a comparison's two dialogues the whole prompt is the same: a third of all tokens with short
ones, nearly half with long ones. Only attention sees both whole; it gets the queries, keys and
values of what they share twice, and each token takes the output of its first row, so that forward
passes have the bits of two dialogues laid end to end. P pairs, N tokens, M >= N rows in attention.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Shared(NamedTuple):
    """Which token each row of attention is of. A token has one row or two."""

    rows: Tensor
    """(M,) int64: the row's token"""
    first: Tensor
    """(M,) float32: 1 where the row is its token's first, 0 where it is the second"""
    own: Tensor
    """(N, 2) int64: the token's rows, the only one twice"""
    twice: Tensor
    """(N, 2) float32: 1, and 1 for those that have a second row, 0 for the others"""

    def to(self, device: torch.device) -> "Shared":
        return Shared(*(each.to(device) for each in self))

    def padded(self, more: int) -> "Shared":
        """With so many tokens behind all others, each with one row."""
        rows, first, own, twice = self
        count = torch.arange(more, device=rows.device)
        return Shared(
            torch.cat([rows, len(own) + count]),
            torch.cat([first, first.new_ones(more)]),
            torch.cat([own, (len(rows) + count)[:, None].expand(-1, 2)]),
            torch.cat([twice, twice.new_tensor([[1.0, 0.0]]).expand(more, -1)]),
        )


class Twos(NamedTuple):
    """2P sequences as one forward pass takes them."""

    tokens: Tensor
    """(1, N) int64"""
    positions: Tensor
    """(1, N) int64"""
    cu_seqlens: Tensor
    """(2P + 1,) int32, where sequences begin among the rows of attention"""
    last: Tensor
    """(2P,) int64, each sequence's last token"""
    shared: Shared


def in_twos(sequences: Sequence[Sequence[int]]) -> Twos:
    """Sequences 0 and 1, 2 and 3, ... beside each other: the first whole, then what is the
    second's own."""
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    again: list[np.ndarray] = []  # the rows that are a token's second
    last: list[int] = []
    n = m = 0
    for one, other in zip(sequences[0::2], sequences[1::2], strict=True):
        a, b = np.asarray(one, np.int64), np.asarray(other, np.int64)
        assert len(a) and len(b), "a sequence without tokens"
        alike = _alike(a, b)
        tokens += [a, b[alike:]]
        positions += [np.arange(len(a)), np.arange(alike, len(b))]
        whole = np.arange(n, n + len(a))
        of_other = np.append(whole[:alike], np.arange(n + len(a), n + len(a) + len(b) - alike))
        rows += [whole, of_other]
        again.append(np.arange(m + len(a), m + len(a) + alike))
        last += [whole[-1], of_other[-1]]
        n, m = n + len(a) + len(b) - alike, m + len(a) + len(b)
    starts = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    return Twos(
        torch.from_numpy(np.concatenate(tokens))[None],
        torch.from_numpy(np.concatenate(positions))[None],
        torch.from_numpy(starts),
        torch.tensor(last),
        _shared(np.concatenate(rows), np.concatenate(again), n),
    )


def _shared(rows: np.ndarray, again: np.ndarray, tokens: int) -> Shared:
    first = np.ones(len(rows), np.float32)
    first[again] = 0
    own = np.flatnonzero(first)[np.argsort(rows[first > 0])]  # of each token, its first row
    own = np.stack([own, own], 1)
    own[rows[again], 1] = again
    twice = np.ones((tokens, 2), np.float32)
    twice[:, 1] = own[:, 0] != own[:, 1]
    return Shared(*(torch.from_numpy(each) for each in (rows, first, own, twice)))


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids are the same from the first on."""
    least = min(len(a), len(b))
    other = np.flatnonzero(a[:least] != b[:least])
    return int(other[0]) if len(other) else least


def spread(x: Tensor, shared: Shared) -> Tensor:
    """The rows of attention (1, M, ...) of tokens (1, N, ...)."""
    return _Spread.apply(x, *shared)


def gathered(y: Tensor, shared: Shared) -> Tensor:
    """The tokens (1, N, ...) of the rows of attention (1, M, ...): each token's first."""
    return _Gathered.apply(y, *shared)


def of_wanted(x: Tensor, wanted: Tensor | None) -> Tensor:
    """x (B, T, ...), or (1, W, ...) of the tokens numbered `wanted` (W,) in the flattened B*T."""
    return x if wanted is None else x.flatten(0, 1)[None].index_select(1, wanted)


# PyTorch's own gradient of an index adds row by row: 0.3 ms for 800 rows, sixteen times a step of
# four layers. Here a gradient's row is a sum of two or of one, times 1 or 0, which is one pass.
class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *shared: Tensor) -> Tensor:
        ctx.save_for_backward(*shared)
        return x.index_select(1, shared[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, _, own, twice = ctx.saved_tensors
        return _summed(dy, own, twice), None, None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *shared: Tensor) -> Tensor:
        ctx.save_for_backward(*shared)
        return y.index_select(1, shared[2][:, 0])

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        rows, first, _, _ = ctx.saved_tensors
        return _summed(dz, rows[:, None], first[:, None]), None, None, None, None


def _summed(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Row i is the sum of x's (1, R, ...) rows indices[i] times weights[i], both (I, 1 or 2)."""
    table = x.reshape(x.shape[1], -1)
    sums = embedding_bag(indices, table, mode="sum", per_sample_weights=weights.to(x.dtype))
    return sums.view(1, -1, *x.shape[2:])
