"""Sequences of ids as the batches that training reads: rows of T tokens, or pairs laid flat.

Three kinds, all with random access, so that a run resumes from its step number alone: the rows
of a step are a pure function of the data, the seed and how many were visited (`visits.rows_at`).

- `PackedRows`: dialogues. Whole sequences fill rows by best-fit decreasing, once; the order of
  the rows is shuffled anew each epoch.
- `CorpusRows`: pretraining documents, end to end, cut into rows wherever a row ends.
- `pair_batch`: preference pairs without padding, their prompts once.

A target is the next id of the same segment: nothing is predicted across a segment, attention
(`cu_seqlens`) does not cross it, and positions restart in it. B rows, T tokens, S segments, P
pairs, N tokens in all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.core.documents import count_of
from puna.core.shared import Shared, in_twos
from puna.core.text.chat import encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.corpus import Corpus, check_ids, token_dtype
from puna.trainers.data.formats import RATINGS, Preference
from puna.trainers.data.readers import Skipped
from puna.trainers.data.split import opening

WeightedIds = tuple[Sequence[int], Sequence[float]]

SAFE_LABELS = {"chosen_safe": (1.0, 0.0), "both_safe": (1.0, 1.0), "both_unsafe": (0.0, 0.0)}
UNKNOWN = (float("nan"), float("nan"))
MOST = 0.9  # of a batch's tokens: where more are learned, picking them out gains nothing


class LMBatch(NamedTuple):
    """Rows for next-token prediction; padding is a segment of its own with weight 0."""

    tokens: Tensor
    """(B, T) int64, 0 in the padding"""
    targets: Tensor
    """(B, T) int64, the id after each token; 0 where there is none"""
    weights: Tensor
    """(B, T) float32, how much each target counts; 0 where there is none"""
    positions: Tensor
    """(B, T) int64, from 0 in each segment"""
    cu_seqlens: Tensor
    """(S+1,) int32, where segments begin in the flattened B*T, which they cover completely"""
    wanted: Tensor | None = None
    """(W,) int64, which of the flattened B*T have a weight; None: most, or nobody has looked. Who
    gives weight to others sets it to None, too: `next_token_loss` sees these alone"""


class Pair(NamedTuple):
    """A comparison in ids: the whole dialogue with each of the two answers, EOS included."""

    chosen: list[int]
    rejected: list[int]
    rating: str | None = None
    safety: str | None = None
    prompt: str = ""  # how its dialogue begins: pairs that share it are no independent trials
    batch: int | None = None  # the week or round in which it was collected


class PairBatch(NamedTuple):
    """Both sides of P pairs, c0, r0, c1, r1, ...; what a pair shares is there once."""

    tokens: Tensor
    """(1, N) int64"""
    positions: Tensor
    """(1, N) int64"""
    cu_seqlens: Tensor
    """(2P+1,) int32, where sides begin among the rows of attention"""
    last: Tensor
    """(2P,) int64, each side's last token"""
    shared: Shared
    """the rows of attention"""
    margins: Tensor
    """(P,) float32, m(r) of Eq. 2; 0 where the rating is unknown"""
    ratings: Tensor
    """(P,) int64, index into RATINGS; -1 where unknown"""
    safe: Tensor
    """(2P,) float32, 1 safe, 0 unsafe, NaN unknown; in the order of the sequences"""
    weights: Tensor
    """(P,) float32, 1, or 0 for a pair that only fills a rank's part"""
    safety_weights: Tensor
    """(2P,) float32, of each answer in the auxiliary loss"""

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(**{name: part.to(device) for name, part in self._asdict().items()})


class PackedRows:
    """Sequences of (ids, weights) in rows of T tokens: `len(rows)`, `rows.batch(indices)`.

    A sequence of n ids takes n-1 places: its last id is only ever a target. `skipped` counts the
    sequences that are left out: those that do not fit a row and those without a weighted target;
    `where` says of each sequence where it comes from. With `truncate` the end of those that do not
    fit is cut off, which is noted. A row holds sequences of one of the `groups`,
    a name for each sequence, and the rows of a group, `group_rows` of them, stand together, in the
    order in which the names are met first. Raises ValueError where no sequence is left.
    """

    def __init__(
        self,
        sequences: Sequence[WeightedIds],
        row_tokens: int,
        *,
        vocab_size: int,
        where: Sequence[str] = (),
        groups: Sequence[str] = (),
        truncate: bool = False,
    ) -> None:
        self.row_tokens = row_tokens
        self.skipped = Skipped()
        long: list[str] = []
        ids: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        members: dict[str, list[int]] = {}
        for index, (sequence, sequence_weights) in enumerate(sequences):
            assert len(sequence) == len(sequence_weights), "one weight for each id"
            place = (where[index] if where else "") or f"sequence {index + 1}"
            if truncate and len(sequence) - 1 > row_tokens:
                long.append(place)
                sequence = sequence[: row_tokens + 1]  # the last id is only ever a target
                sequence_weights = sequence_weights[: row_tokens + 1]
            if len(sequence) - 1 > row_tokens:
                self.skipped.add(f"longer than the {row_tokens} tokens of a row", place)
            elif not any(sequence_weights[1:]):
                self.skipped.add("no token to learn", place)
            else:
                members.setdefault(groups[index] if groups else "", []).append(len(ids))
                ids.append(np.asarray(sequence, dtype=token_dtype(vocab_size)))
                weights.append(np.asarray(sequence_weights, dtype=np.float32))
        self.skipped.notes += cut_to(long, f"the {row_tokens:,} tokens of a row")
        if not ids:
            found = self.skipped.reasons().replace("\n", "; ") or "there is none"
            way = "give other data"
            if any(reason.startswith("longer") for reason in self.skipped):
                way = "raise row_tokens, at most to the model's context"
            raise ValueError(f"no sequence to train on: {found}; {way}")
        self._starts = np.cumsum([0] + [len(sequence) for sequence in ids])
        self._ids = np.concatenate(ids)
        self._weights = np.concatenate(weights)
        self.rows: list[list[int]] = []
        self.group_rows: dict[str, int] = {}
        for name, inside in members.items():
            bins = best_fit([len(ids[i]) - 1 for i in inside], row_tokens)
            self.rows += [[inside[place] for place in each] for each in bins]
            self.group_rows[name] = len(bins)

    def __len__(self) -> int:
        return len(self.rows)

    def described(self, noun: str) -> str:
        """How many of what the noun names in how many rows."""
        count = count_of(len(self._starts) - 1, noun)
        rows = count_of(len(self.rows), "packed row")
        return f"{count} in {rows} of {count_of(self.row_tokens, 'token')}"

    def batch(self, indices: Sequence[int] | np.ndarray) -> LMBatch:
        """The rows with these indices, B = len(indices)."""
        batch = _EmptyBatch(len(indices), self.row_tokens)
        for row, index in enumerate(indices):
            place = row * self.row_tokens
            for sequence in self.rows[index]:
                start, end = self._starts[sequence], self._starts[sequence + 1] - 1
                batch.fill(
                    place,
                    self._ids[start:end],
                    self._ids[start + 1 : end + 1],
                    self._weights[start + 1 : end + 1],
                )
                place += int(end - start)
            batch.pad(place, (row + 1) * self.row_tokens)
        return batch.finish()


class CorpusRows:
    """A corpus in rows of T tokens: `len(rows)`, `rows.batch(indices)`.

    Row r of a shard holds its tokens r*T to (r+1)*T - 1, documents end to end; a shard's last row
    is padded. A document that a row's end cuts goes on in the next row as a segment of its own. The
    token after a row's last one is its target; a document's last token has none.
    """

    def __init__(self, corpus: Corpus, row_tokens: int) -> None:
        self.corpus = corpus
        self.row_tokens = row_tokens
        rows = [-(-len(shard) // row_tokens) for shard in corpus.shards]
        self._first = np.cumsum([0, *rows])  # row with which each shard begins, then how many

    def __len__(self) -> int:
        return int(self._first[-1])

    def batch(self, indices: Sequence[int] | np.ndarray) -> LMBatch:
        """The rows with these indices, B = len(indices). Raises ValueError for an id outside the
        vocabulary."""
        batch = _EmptyBatch(len(indices), self.row_tokens)
        for row, index in enumerate(indices):
            tokens = self._tokens(int(index))
            end = min(len(tokens), self.row_tokens)
            is_start = tokens == self.corpus.bos_id
            borders = [0, *(np.flatnonzero(is_start[1:end]) + 1).tolist(), end]
            place = row * self.row_tokens
            for left, right in zip(borders[:-1], borders[1:], strict=True):
                ends = right == len(tokens) or is_start[right]
                targets = tokens[left + 1 : right if ends else right + 1]
                batch.fill(place, tokens[left:right], targets, 1.0)
                place += right - left
            batch.pad(place, (row + 1) * self.row_tokens)
        return batch.finish()

    def _tokens(self, index: int) -> np.ndarray:
        """A row and the token after it, where its shard has one."""
        number = int(np.searchsorted(self._first, index, "right")) - 1
        begin = (index - int(self._first[number])) * self.row_tokens
        tokens = self.corpus.shards[number][begin : begin + self.row_tokens + 1]
        check_ids(tokens, self.corpus.vocab_size, f"row {index + 1} of the corpus")
        return tokens


class _EmptyBatch:
    """An LMBatch being filled, flattened to B*T."""

    def __init__(self, n_rows: int, row_tokens: int) -> None:
        self.shape = (n_rows, row_tokens)
        size = n_rows * row_tokens
        self.tokens = np.zeros(size, np.int64)
        self.targets = np.zeros(size, np.int64)
        self.weights = np.zeros(size, np.float32)
        self.positions = np.zeros(size, np.int64)
        self.starts = [0]
        self.counter = np.arange(row_tokens)

    def fill(
        self, place: int, tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray | float
    ) -> None:
        """A segment at `place`; it may have one target less than tokens."""
        end = place + len(tokens)
        self.tokens[place:end] = tokens
        self.targets[place : place + len(targets)] = targets
        self.weights[place : place + len(targets)] = weights
        self.positions[place:end] = self.counter[: len(tokens)]
        self.starts.append(end)

    def pad(self, place: int, end: int) -> None:
        """The rest of a row as a segment without targets."""
        if place < end:
            self.positions[place:end] = self.counter[: end - place]
            self.starts.append(end)

    def finish(self) -> LMBatch:
        tokens, targets, weights, positions = (
            torch.from_numpy(array).view(self.shape)
            for array in (self.tokens, self.targets, self.weights, self.positions)
        )
        cu_seqlens = torch.tensor(self.starts, dtype=torch.int32)
        return LMBatch(tokens, targets, weights, positions, cu_seqlens, self.wanted())

    def wanted(self) -> Tensor | None:
        found = np.flatnonzero(self.weights)
        return torch.from_numpy(found) if 0 < len(found) < MOST * self.weights.size else None


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `capacity`: longest first, each into the fullest bin it fits.

    Every length is at most `capacity`. An integer's bit c is set while some bin has c places
    left, so that finding a bin takes one shift: a million sequences take seconds.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[index]
        assert length <= capacity
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[number].append(index)
        else:
            room, number = capacity, len(bins)
            bins.append([index])
        left = room - length
        if left:
            with_room[left].append(number)
            rooms |= 1 << left
    return bins


def cut_to(long: Sequence[str], room: str) -> list[str]:
    """A sentence on those that were cut, where there are any."""
    return [f"cut {len(long):,} to {room} (first {long[0]})"] if long else []


def encode_pairs(
    tokenizer: Tokenizer,
    preferences: Sequence[Preference],
    context: int,
    *,
    truncate: bool = False,
) -> tuple[list[Pair], Skipped]:
    """Preferences in ids; those with a side longer than `context` tokens are skipped and counted,
    or with `truncate` cut there, where the prompt leaves room and the two answers still differ.

    Raises ValueError where no pair is left.
    """
    pairs, skipped = _encode_pairs(tokenizer, preferences, context, truncate)
    if not pairs:
        reasons = skipped.reasons().replace("\n", "; ") or "there is none"
        raise ValueError(f"no pair to train on: {reasons}")
    return pairs, skipped


def encode_held_out(
    tokenizer: Tokenizer,
    preferences: Sequence[Preference],
    context: int,
    *,
    truncate: bool = False,
) -> tuple[list[Pair], Skipped]:
    """`encode_pairs` of what is only measured: that none is left is noted and stops nobody."""
    pairs, skipped = _encode_pairs(tokenizer, preferences, context, truncate)
    if not pairs:
        skipped.notes.append("the held-out accuracy is not measured: no held-out pair fits")
    return pairs, skipped


def _encode_pairs(
    tokenizer: Tokenizer, preferences: Sequence[Preference], context: int, truncate: bool
) -> tuple[list[Pair], Skipped]:
    pairs: list[Pair] = []
    skipped = Skipped()
    long: list[str] = []
    for index, row in enumerate(preferences):
        prompt = encode_prompt(tokenizer, row.messages)
        chosen = prompt + encode_answer(tokenizer, row.chosen)
        rejected = prompt + encode_answer(tokenizer, row.rejected)
        place = row.where or f"pair {index + 1}"
        is_long = max(len(chosen), len(rejected)) > context
        if is_long and truncate:
            chosen, rejected = chosen[:context], rejected[:context]
        if is_long and not truncate:
            skipped.add(f"longer than the context of {context} tokens", place)
        elif is_long and chosen == rejected:
            skipped.add(f"the answers do not differ within the context of {context} tokens", place)
        else:
            long += [place] * is_long
            opened = opening(row.messages)
            pairs.append(Pair(chosen, rejected, row.rating, row.safety, opened, row.batch))
    skipped.notes += cut_to(long, f"the context of {context:,} tokens")
    return pairs, skipped


def unlabelled(pairs: Sequence[Pair], margin: str, safety_weight: float) -> list[str]:
    """Sentences on options that have nothing to act on in some of the pairs."""
    notes = []
    ungraded = sum(pair.rating is None for pair in pairs)
    if margin != "none" and ungraded:
        notes.append(
            f"no rating in {ungraded:,} of {count_of(len(pairs), 'pair')}: there the margin is 0, "
            f"whatever margin = {margin!r} says"
        )
    unsafe = sum(pair.safety is None for pair in pairs)
    if safety_weight > 0 and unsafe:
        notes.append(
            f"no safety label in {unsafe:,} of {count_of(len(pairs), 'pair')}: there safety_weight "
            f"= {safety_weight:g} does nothing"
        )
    return notes


def levels(pairs: Sequence[Pair]) -> Tensor:
    """(P,) int64: each pair's rating as an index into RATINGS, -1 where it has none."""
    found = [-1 if pair.rating is None else RATINGS.index(pair.rating) for pair in pairs]
    return torch.tensor(found, dtype=torch.int64)


def pair_batch(pairs: Sequence[Pair], margins: dict[str, float]) -> PairBatch:
    """Pairs as one batch; `margins` is m(r) for each rating, a table of `losses.MARGINS`."""
    sides = in_twos([side for pair in pairs for side in (pair.chosen, pair.rejected)])
    labels = [UNKNOWN if pair.safety is None else SAFE_LABELS[pair.safety] for pair in pairs]
    return PairBatch(
        *sides,
        margins=torch.tensor(
            [0.0 if pair.rating is None else margins[pair.rating] for pair in pairs]
        ),
        ratings=levels(pairs),
        safe=torch.tensor(labels, dtype=torch.float32).flatten(),
        weights=torch.ones(len(pairs)),
        safety_weights=torch.ones(2 * len(pairs)),
    )
