"""Continuous batching on the native engine: a slot whose answer ends takes the next prompt.

One call a step: every slot at work feeds the token that it drew last, a slot that has just been
filled its whole prompt. A prompt that some slot already holds (K samples of it) is not run again:
its keys and values are copied, and the last token alone is fed.
"""

from collections import deque
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
    free = list(range(slots))
    holds: dict[int, int] = {}  # slot -> whose prompt stands in it: the first with that text
    active = _Active(*(torch.empty(0, dtype=torch.int64) for _ in _Active._fields))
    waiting = deque(order)
    while True:
        new, copied = _admit(engine, prompts, first, waiting, free, holds)
        active = _join(active, prompts, copied + new)
        if not len(active.slots):
            return
        tokens, logprobs = _step(
            engine,
            *_feed(active, [prompts[i] for _, i in new]),
            seeds=seeds[active.prompts, active.counts],
            sampler=sampler,
        )
        yield Drawn(active.prompts, active.counts, tokens, logprobs)
        counts = active.counts + 1
        active = active._replace(positions=active.positions + 1, counts=counts, tokens=tokens)
        done = counts >= most[active.prompts]
        if eos_id is not None:
            done |= tokens == eos_id
        if done.any():
            free += active.slots[done].tolist()
            active = _Active(*(part[~done] for part in active))


Placed = list[tuple[int, int]]  # (slot, prompt number)


def _admit(
    engine: Engine,
    prompts: list[list[int]],
    first: dict[int, int],
    waiting: deque[int],
    free: list[int],
    holds: dict[int, int],
) -> tuple[Placed, Placed]:
    """Fill free slots: prompts to be run, and prompts copied from where they stand.

    A copy of a prompt that is only now to be run waits for the next step.
    """
    new: Placed = []
    copied: Placed = []
    running: set[int] = set()
    while free and waiting and first[waiting[0]] not in running:
        i = waiting.popleft()
        slot = free.pop()
        holds.pop(slot, None)
        source = next((at for at, held in holds.items() if held == first[i]), None)
        if source is None:
            new.append((slot, i))
            running.add(first[i])
        else:
            engine.copy_row(source, slot, len(prompts[i]) - 1)
            copied.append((slot, i))
        holds[slot] = first[i]
    return new, copied


def _join(active: _Active, prompts: list[list[int]], placed: Placed) -> _Active:
    if not placed:
        return active
    rows = [[slot, i, len(prompts[i]) - 1, 0, prompts[i][-1]] for slot, i in placed]
    more = torch.tensor(rows).unbind(1)
    return _Active(*(torch.cat(parts) for parts in zip(active, more, strict=True)))


def _feed(active: _Active, new: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, rows, positions, wanted): one token a slot; of the last slots, `new` prompts."""
    old = len(active.slots) - len(new)
    if not new:
        return active.tokens, active.slots, active.positions, torch.arange(old)
    # By lists: torch's repeat_interleave would be a parallel region, for a handful of numbers.
    slots = active.slots[old:].tolist()
    fed = [
        (token, slot, position)
        for slot, prompt in zip(slots, new, strict=True)
        for position, token in enumerate(prompt)
    ]
    tokens, rows, positions = torch.tensor(fed).unbind(1)
    ends = torch.tensor([len(prompt) for prompt in new]).cumsum(0) - 1
    return (
        torch.cat((active.tokens[:old], tokens)),
        torch.cat((active.slots[:old], rows)),
        torch.cat((active.positions[:old], positions)),
        torch.cat((torch.arange(old), old + ends)),
    )


def _step(
    engine: Engine,
    tokens: Tensor,
    rows: Tensor,
    positions: Tensor,
    wanted: Tensor,
    *,
    seeds: Tensor,
    sampler: Sampler,
) -> tuple[Tensor, Tensor]:
    """(tokens, logprobs), both (A,), drawn after feeding."""
    if sampler.top_k == 0 and sampler.top_p == 1.0:
        step = engine.forward(
            tokens, rows, positions, wanted, seeds=seeds, temperature=sampler.temperature
        )
        assert step.tokens is not None and step.logprobs is not None
        return step.tokens, step.logprobs
    logits = engine.forward(tokens, rows, positions, wanted).logits
    assert logits is not None
    return ops.sample(logits, seeds=seeds, **sampler._asdict())
