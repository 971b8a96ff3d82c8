"""Forward passes over many sequences of different lengths, laid end to end without padding.

A batch is cut into micro-batches by tokens, so that memory is bounded whatever the lengths are.
Where parameters are sharded every rank has to run the same number of forward passes, or the
collectives inside them never meet: a rank that has run out of sequences runs its shortest one
again and throws the result away. S sequences, N tokens in all, C model width.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from puna.core import parallel
from puna.core.model import Transformer
from puna.core.native import alike
from puna.core.native.engine import engine_for_now


def flat_sequences(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences laid end to end: tokens (1, N), positions (1, N), cu_seqlens (S+1,) int32."""
    lengths = [len(sequence) for sequence in sequences]
    assert all(lengths), "a sequence without tokens"
    starts = np.cumsum([0, *lengths])
    tokens = np.fromiter((t for sequence in sequences for t in sequence), np.int64, starts[-1])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return (
        torch.from_numpy(tokens)[None],
        torch.from_numpy(positions)[None],
        torch.from_numpy(starts.astype(np.int32)),
    )


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, in order, in groups of at most `max_tokens` (one may be longer).

    The groups cover every sequence once; empty groups at the end are there only to keep ranks
    in step.
    """
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= length
    return groups + [[] for _ in range(parallel.all_max(len(groups)) - len(groups))]


def forward_groups(
    model: Transformer, sequences: Sequence[list[int]], spans: Sequence[range], max_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Run `model` over the sequences; yield per micro-batch (indices, hidden (W, C)), of the tokens
    in each sequence's span, end to end.

    An empty list of indices comes with one state of a stand-in: its outputs must not be used for
    anything but a gradient of zero. Raises ValueError for a sequence that is longer than the
    model's context.
    """
    _check_context(model, sequences)
    lengths = [len(sequence) for sequence in sequences]
    device = next(model.parameters()).device
    shortest = min(range(len(lengths)), key=lengths.__getitem__, default=-1)
    for group in micro_batches(lengths, max_tokens):
        members = [sequences[i] for i in group] or [sequences[shortest] if lengths else [0]]
        flat = flat_sequences(members)
        read = _places(flat[2], [spans[i] for i in group] or [range(1)])
        tokens, positions, cu_seqlens, wanted = (x.to(device) for x in (*flat, read))
        yield group, model(tokens, positions, cu_seqlens, wanted=wanted)[0]


def _places(cu_seqlens: Tensor, spans: Sequence[range]) -> Tensor:
    """(W,) int64: where the tokens of each sequence's span stand among all."""
    starts = cu_seqlens.tolist()
    return torch.cat(
        [torch.arange(s + r.start, s + r.stop) for s, r in zip(starts, spans, strict=False)]
    )


def _check_context(model: Transformer, sequences: Sequence[list[int]]) -> None:
    longest = max(map(len, sequences), default=0)
    if longest > model.config.context:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the model's context of "
            f"{model.config.context}; shorten the prompts or lower max_new_tokens"
        )


@torch.no_grad()
def score(model: Transformer, sequences: Sequence[list[int]], *, max_tokens: int = 16384) -> Tensor:
    """Raw scores (S,), fp32, of whole dialogues (prompt and answer ids), on the model's device.

    Each is read at the sequence's last token, the same place as in training: EOS if the answer
    has one. Nothing is padded, so there is no padding to mistake for it. `max_tokens` bounds one
    forward pass. Where neighbours begin alike, as K answers to a prompt do, the native engine runs
    that part once, to the same bits. Raises ValueError for a language model or an empty sequence.
    """
    if model.head != "score":
        raise ValueError("this checkpoint has a language-model head; scoring needs a reward model")
    if any(not sequence for sequence in sequences):
        raise ValueError("an empty sequence cannot be scored")
    if (shared := _by_engine(model, sequences, max_tokens)) is not None:
        return shared
    device = next(model.parameters()).device
    scores = torch.empty(len(sequences), dtype=torch.float32, device=device)
    last = [range(len(sequence) - 1, len(sequence)) for sequence in sequences]
    for group, hidden in forward_groups(model, sequences, last, max_tokens):
        found = model.logits(hidden)[:, 0]
        if group:
            scores[torch.tensor(group, device=device)] = found.float()
    return scores


def _by_engine(
    model: Transformer, sequences: Sequence[list[int]], max_tokens: int
) -> Tensor | None:
    """The scores (S,), if a quarter of the tokens or more need not be run again; else None."""
    if model.device.type != "cpu":
        return None  # before anything is compared
    found = alike.groups(sequences)
    if 4 * alike.spared(found) < sum(map(len, sequences)) or not sequences:
        return None
    _check_context(model, sequences)
    engine = engine_for_now(model)
    if engine is None:
        return None
    return alike.last_outputs(engine, sequences, found, max_tokens)[:, 0]


@torch.no_grad()
def logprobs(
    model: Transformer, sequences: Sequence[list[int]], *, max_tokens: int = 16384
) -> list[Tensor]:
    """Of S sequences of n ids each, the log-probs (n - 1,) fp32 of all ids but the first, nats."""
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    but_last = [range(len(sequence) - 1) for sequence in sequences]
    for group, hidden in forward_groups(model, sequences, but_last, max_tokens):
        if not group:
            continue
        following = [token for i in group for token in sequences[i][1:]]
        targets = torch.tensor(following, dtype=torch.int64, device=hidden.device)
        scored, _ = model.logprobs(hidden, targets)
        for i, part in zip(group, scored.split([len(but_last[i]) for i in group]), strict=True):
            found[i] = part.float()
    return found
