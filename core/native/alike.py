"""Sequences that begin alike, as K answers to one prompt do: what they share is run once.

S sequences, N tokens in all.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.core.native.engine import Engine
from puna.core.native.session import Session

LEAST = 8  # tokens that are worth a copy of their keys and values
FEW = 2048  # tokens at a time are as fast as any: more need new memory, whose pages cost half of it


class Group(NamedTuple):
    """Neighbours, `first` to `end`, whose first `shared` tokens are the same."""

    first: int
    end: int
    shared: int


def groups(sequences: Sequence[Sequence[int]]) -> list[Group]:
    """All sequences in their order. One joins the group before it if it has half of what that
    group shares; each has a token at least that is its own."""
    found: list[Group] = []
    for i, sequence in enumerate(sequences):
        if found:
            first, _, shared = found[-1]
            common = _common(sequences[first], sequence)
            alone = i == first + 1  # it shares with nobody yet
            if common >= LEAST and (alone or 2 * common >= shared):
                found[-1] = Group(first, i + 1, common if alone else min(shared, common))
                continue
        found.append(Group(i, i + 1, 0))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same from the first on, without the last of the shorter one."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)


def spared(found: Sequence[Group]) -> int:
    """Tokens that need not be run again."""
    return sum((end - first - 1) * shared for first, end, shared in found)


def last_outputs(
    engine: Engine, sequences: Sequence[Sequence[int]], found: Sequence[Group], max_tokens: int
) -> Tensor:
    """What the head says after each sequence's last token: (S, V) or (S, 1), fp32.

    The bits of a forward pass over each alone. `max_tokens` bounds how much is in memory at once,
    as rows of the longest sequence; a single one may be longer.
    """
    parts = []
    for part in _passes(sequences, found, max_tokens):
        first, end = part[0].first, part[-1].end
        with engine.session(end - first, max(map(len, sequences[first:end]))) as session:
            parts.append(_last_outputs(session, sequences, part))
    return torch.cat(parts)


def _passes(
    sequences: Sequence[Sequence[int]], found: Sequence[Group], max_tokens: int
) -> Iterator[list[Group]]:
    """The groups in parts of at least FEW and at most `max_tokens` tokens; one that does not fit
    alone is cut, and runs what it shares in each part again."""
    part: list[Group] = []
    longest = rows = 0
    for first, end, shared in found:
        if rows * longest >= FEW:
            yield part
            part, longest, rows = [], 0, 0
        part.append(Group(first, first, shared))
        for i in range(first, end):
            longest = max(longest, len(sequences[i]))
            if rows and (rows + 1) * longest > max_tokens:
                yield [group for group in part if group.first < group.end]
                part, longest, rows = [Group(i, i, shared)], len(sequences[i]), 0
            part[-1] = part[-1]._replace(end=i + 1)
            rows += 1
    if part:
        yield part


def _last_outputs(
    session: Session, sequences: Sequence[Sequence[int]], part: Sequence[Group]
) -> Tensor:
    offset = part[0].first
    several = [group for group in part if group.end - group.first > 1 and group.shared]
    if several:
        once = [(each.first - offset, sequences[each.first][: each.shared], 0) for each in several]
        session.logits(*_fed(once)[:3], torch.empty(0, dtype=torch.int64))
    rest = []
    for each in part:
        start = each.shared if each.end - each.first > 1 else 0
        for i in range(each.first, each.end):
            session.copy_row(each.first - offset, i - offset, start)
            rest.append((i - offset, sequences[i], start))
    return session.logits(*_fed(rest))


def _fed(rows: Sequence[tuple[int, Sequence[int], int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, rows, positions, last tokens' numbers) of sequences from a token on."""
    starts = np.array([start for _, _, start in rows])
    lengths = np.array([len(ids) for _, ids, _ in rows]) - starts
    ends = lengths.cumsum()
    tokens = (token for _, ids, start in rows for token in ids[start:])
    fed = (
        np.fromiter(tokens, np.int64, ends[-1]),
        np.repeat([row for row, _, _ in rows], lengths),
        np.arange(ends[-1]) - np.repeat(ends - lengths - starts, lengths),
        ends - 1,
    )
    found = tuple(torch.from_numpy(each) for each in fed)
    return found[0], found[1], found[2], found[3]
