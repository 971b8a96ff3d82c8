"""Forward passes over many sequences of different lengths, laid end to end without padding.

A batch is cut into micro-batches by tokens, so that memory is bounded whatever the lengths are.
Where parameters are sharded every rank has to run the same number of forward passes, or the
collectives inside them never meet: a rank that has run out of sequences runs its shortest one
again and throws the result away.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from puna.core import parallel
from puna.core.model import Transformer
from puna.trainers.data.packing import flat_sequences


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
    model: Transformer, sequences: Sequence[list[int]], max_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Run `model` over the sequences; yield per micro-batch (indices, hidden (N, C), starts).

    starts: (s + 1,) int64, where each of the s sequences begins in N. An empty list of indices
    comes with the hidden states of a stand-in: its outputs must not be used for anything but a
    gradient of zero. Raises ValueError for a sequence that is longer than the model's context.
    """
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths, default=0)
    if longest > model.config.context:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the model's context of "
            f"{model.config.context}; shorten the prompts or lower max_new_tokens"
        )
    device = next(model.parameters()).device
    shortest = min(range(len(lengths)), key=lengths.__getitem__, default=-1)
    for group in micro_batches(lengths, max_tokens):
        members = [sequences[i] for i in group] or [sequences[shortest] if lengths else [0]]
        tokens, positions, cu_seqlens = (x.to(device) for x in flat_sequences(members))
        hidden = model(tokens, positions=positions, cu_seqlens=cu_seqlens)[0]
        yield group, hidden, cu_seqlens.to(torch.int64)
