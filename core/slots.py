"""Continuous batching on the native engine: a slot whose answer ends takes the next prompt.

Every active slot feeds one token a step, the last of its prompt or the last drawn. All but the
last token of the prompts that arrive together are run before, as one packed call; a prompt that
some slot already holds (K samples of it) is copied from there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import ops
from puna.core.native import Engine
from puna.core.sampling import Sampler, step_seeds


class Drawn(NamedTuple):
    """One step's tokens: of which prompt, which of its tokens, what, and its log-prob; all (A,)."""

    prompts: Tensor
    counts: Tensor
    tokens: Tensor
    logprobs: Tensor


class _Active(NamedTuple):
    """The slots at work: (A,) int64 each."""

    slots: Tensor
    prompts: Tensor
    positions: Tensor  # of the token that is fed next
    counts: Tensor  # tokens drawn so far
    tokens: Tensor  # fed next


def decode(
    engine: Engine,
    prompts: list[list[int]],
    keys: Tensor,
    limits: list[int],
    sampler: Sampler,
    eos_id: int | None,
    slots: int,
) -> Iterator[Drawn]:
    """Draw from each prompt with its key (N,) until `eos_id` or its limit, `slots` at a time."""
    groups: dict[tuple[int, ...], list[int]] = {}  # the numbers of one and the same prompt
    for i, limit in enumerate(limits):
        if limit > 0:
            groups.setdefault(tuple(prompts[i]), []).append(i)
    order = [i for members in groups.values() for i in members]
    if not order:
        return
    first = {i: members[0] for members in groups.values() for i in members}
    slots = min(slots, len(order))
    engine.reserve(slots, max(len(prompts[i]) + limits[i] for i in order))
    most = torch.tensor(limits)
    seeds = step_seeds(keys[:, None], torch.arange(max(limits)))
    waiting = iter(order)
    free = list(range(slots))
    holds: list[int | None] = [None] * slots  # whose prompt is in each: the first with that text
    active = _Active(*(torch.empty(0, dtype=torch.int64) for _ in _Active._fields))
    while True:
        arriving = [(slot, i) for slot, i in zip(free, waiting, strict=False)]
        if arriving:
            free = free[len(arriving) :]
            active = _join(active, _admit(engine, prompts, first, arriving, holds))
        if not len(active.slots):
            return
        tokens, logprobs = _step(engine, active, seeds[active.prompts, active.counts], sampler)
        yield Drawn(active.prompts, active.counts, tokens, logprobs)
        counts = active.counts + 1
        active = active._replace(positions=active.positions + 1, counts=counts, tokens=tokens)
        done = counts >= most[active.prompts]
        if eos_id is not None:
            done |= tokens == eos_id
        if done.any():
            free += active.slots[done].tolist()
            active = _Active(*(part[~done] for part in active))


def _join(active: _Active, more: _Active) -> _Active:
    if not len(active.slots):
        return more
    return _Active(*(torch.cat(parts) for parts in zip(active, more, strict=True)))


def _admit(
    engine: Engine,
    prompts: list[list[int]],
    first: dict[int, int],
    arriving: list[tuple[int, int]],
    holds: list[int | None],
) -> _Active:
    """Put each (slot, prompt number) into the cache, all but its last token."""
    run: list[tuple[int, list[int]]] = []
    copies: list[tuple[int, int, int]] = []
    for slot, _ in arriving:  # what they held is overwritten
        holds[slot] = None
    holder = {i: slot for slot, i in enumerate(holds) if i is not None}
    for slot, i in arriving:
        source = holder.setdefault(first[i], slot)
        if source != slot:
            copies.append((source, slot, len(prompts[i]) - 1))
        elif len(prompts[i]) > 1:
            run.append((slot, prompts[i][:-1]))
        holds[slot] = first[i]
    if run:
        sizes = torch.tensor([len(ids) for _, ids in run])
        engine.forward(
            torch.tensor([token for _, ids in run for token in ids]),
            torch.tensor([slot for slot, _ in run]).repeat_interleave(sizes),
            torch.cat([torch.arange(len(ids)) for _, ids in run]),
            torch.empty(0, dtype=torch.int64),
        )
    for source, slot, length in copies:
        engine.copy_row(source, slot, length)
    numbers = torch.tensor([[slot, i, len(prompts[i]) - 1, 0, prompts[i][-1]]
                            for slot, i in arriving])  # fmt: skip
    return _Active(*(column.contiguous() for column in numbers.unbind(1)))


def _step(
    engine: Engine, active: _Active, seeds: Tensor, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """(tokens, logprobs), both (A,), drawn after feeding each slot its token."""
    everyone = torch.arange(len(active.slots))
    fed = active.tokens, active.slots, active.positions, everyone
    if sampler.top_k == 0 and sampler.top_p == 1.0:
        step = engine.forward(*fed, seeds=seeds, temperature=sampler.temperature)
        assert step.tokens is not None and step.logprobs is not None
        return step.tokens, step.logprobs
    logits = engine.forward(*fed).logits
    assert logits is not None
    return ops.sample(logits, seeds=seeds, **sampler._asdict())
