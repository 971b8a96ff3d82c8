"""Continuous batching on the native engine: a slot whose answer ends takes the next prompt.

One call draws for every slot at work, step after step until an answer ends. A slot that has just
been filled feeds its whole prompt, the others the token that they drew last. A prompt that several
slots take (K samples of it) is run once, before the step and without its last token; the others
copy its keys and values, and all feed that token. With a memory, a prompt is run from the first
token on that does not stand in its slot.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import ops
from puna.core.generation.memory import Memory, Name
from puna.core.generation.sampling import EosIds, Sampler, all_of, step_seeds
from puna.core.generation.stopping import Stops
from puna.core.native.engine import Engine
from puna.core.native.session import Session

STEPS = 16  # drawn in one call at most, so that Ctrl-C is heard: a second of a billion parameters

FILLED = 8  # slots are filled when one in so many is free: each time costs as much as some tokens


class Drawn(NamedTuple):
    """Tokens: of which prompt, which of its tokens, what, and its log-prob; all (S * A,)."""

    prompts: Tensor
    counts: Tensor
    tokens: Tensor
    logprobs: Tensor


class Remembered(NamedTuple):
    """A memory, which conversation each prompt is, and whose turn with the memory it is."""

    memory: Memory
    names: list[Name]
    turn: int

    def step(self) -> AbstractContextManager[None]:
        return self.memory.during(self.turn)

    def keep(self, number: int, tokens: Sequence[int]) -> None:
        """Note what has been run of a prompt and its answer."""
        with self.step():
            self.memory.keep(self.names[number], tokens)


class _Placed(NamedTuple):
    """A prompt that has just been given a slot."""

    slot: int
    prompt: int
    start: int  # tokens of it that stand in the slot


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
    eos_id: EosIds,
    slots: int,
    steps: int = STEPS,
    remembered: Remembered | None = None,
    stops: Stops | None = None,
) -> Iterator[Drawn]:
    """Draw from each prompt with its key (N,) until `eos_id`, its limit or, some tokens later, one
    of `stops`, `slots` at a time.

    Up to `steps` tokens of each slot come at once. Who has a memory says it what was run.
    """
    groups: dict[tuple[int, ...], list[int]] = {}  # the numbers of one and the same prompt
    for i, limit in enumerate(limits):
        if limit > 0:
            groups.setdefault(tuple(prompts[i]), []).append(i)
    if not groups:
        return
    slots = min(slots, sum(map(len, groups.values())))
    longest = max(len(prompt) + limits[i] for prompt, members in groups.items() for i in members)
    opened: AbstractContextManager[Session] = engine.session(slots, longest)
    if remembered is not None:
        with remembered.step():
            opened = nullcontext(remembered.memory.session(engine, slots, longest))
            slots = remembered.memory.slots
    with opened as session:
        given = prompts, list(groups.values()), keys, limits
        yield from _decode(session, *given, sampler, eos_id, slots, steps, remembered, stops)


def _decode(
    session: Session,
    prompts: list[list[int]],
    groups: list[list[int]],
    keys: Tensor,
    limits: list[int],
    sampler: Sampler,
    eos_id: EosIds,
    slots: int,
    steps: int,
    remembered: Remembered | None,
    stops: Stops | None,
) -> Iterator[Drawn]:
    order = [i for members in groups for i in members]
    first = {i: members[0] for members in groups for i in members}
    most = torch.tensor(limits)
    seeds = step_seeds(keys[:, None], torch.arange(max(limits)))
    free = list(range(slots))
    together = max(1, slots // FILLED)
    holds: dict[int, int] = {}  # slot -> whose prompt stands in it: the first with that text
    active = _Active(*(torch.empty(0, dtype=torch.int64) for _ in _Active._fields))
    waiting = deque(order)
    ends = torch.tensor(all_of(eos_id), dtype=torch.int64)
    if len(ends) > 1:
        steps = 1  # the engine itself looks for one
    step = nullcontext if remembered is None else remembered.step
    told: defaultdict[int, list[int]] = defaultdict(list)  # by prompt what was drawn, for `stops`
    while True:
        with step():
            new: list[_Placed] = []
            if len(free) >= together or not len(active.slots):
                new, ready = _admit(session, prompts, first, waiting, free, holds, remembered)
                active = _join(active, prompts, ready + new)
            if not len(active.slots):
                return
            left = int((most[active.prompts] - active.counts).min())
            ahead = torch.arange(1 if sampler.truncates else min(steps, left))[:, None]
            tokens, logprobs = _draw(
                session,
                *_feed(active, prompts, new),
                seeds=seeds[active.prompts, active.counts + ahead],
                sampler=sampler,
                eos_id=int(ends[0]) if len(ends) else None,
            )
        count, last = len(tokens), tokens[-1]
        yield Drawn(
            active.prompts.repeat(count),
            (active.counts + ahead[:count]).flatten(),
            tokens.flatten(),
            logprobs.flatten(),
        )
        counts = active.counts + count
        active = active._replace(positions=active.positions + count, counts=counts, tokens=last)
        done = counts >= most[active.prompts]
        if len(ends):
            done |= torch.isin(last, ends)
        if stops is not None:
            for number, ids in zip(active.prompts.tolist(), tokens.T.tolist(), strict=True):
                told[number] += ids
            found = [stops.found(number, told[number]) for number in active.prompts.tolist()]
            done |= torch.tensor(found)
        if done.any():
            free += active.slots[done].tolist()
            active = _Active(*(part[~done] for part in active))


def _admit(
    session: Session,
    prompts: list[list[int]],
    first: dict[int, int],
    waiting: deque[int],
    free: list[int],
    holds: dict[int, int],
    remembered: Remembered | None,
) -> tuple[list[_Placed], list[_Placed]]:
    """Fill free slots: (those whose prompt the step runs, those that have it but for one token)."""
    new: list[_Placed] = []
    ready: list[_Placed] = []
    run: list[_Placed] = []  # of the ready: before the others, which copy them
    copies: list[tuple[int, int, int]] = []  # (from slot, to slot, tokens), after that
    pending: set[int] = set()  # slots that are filled by one or the other
    while free and waiting:
        i = waiting.popleft()
        placed = _take(i, prompts[i], free, remembered)
        slot = placed.slot
        holds.pop(slot, None)
        source = next((at for at, held in holds.items() if held == first[i]), None)
        holds[slot] = first[i]
        if source in pending:
            copies.append((source, slot, len(prompts[i]) - 1))
            pending.add(slot)
        elif source is not None:  # at once: a free slot may be given away before this is over
            session.copy_row(source, slot, len(prompts[i]) - 1)
        elif free and waiting and first[waiting[0]] == first[i] and len(prompts[i]) > 1:
            run.append(placed)
            pending.add(slot)
        else:
            new.append(placed)
            continue
        ready.append(placed)
    fed = [(each.slot, prompts[each.prompt][:-1], each.start) for each in run]
    if any(start < len(ids) for _, ids, start in fed):
        none = torch.empty(0, dtype=torch.int64)
        session.logits(*_packed(fed), none)
    for copy in copies:
        session.copy_row(*copy)
    return new, ready


def _take(i: int, prompt: list[int], free: list[int], remembered: Remembered | None) -> _Placed:
    if remembered is None:
        return _Placed(free.pop(), i, 0)
    slot, known = remembered.memory.place(remembered.names[i], prompt, free)
    return _Placed(slot, i, known)


def _packed(rows: list[tuple[int, list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, slots, positions) of prompts from a token on, one behind the other.

    By lists: torch's repeat_interleave would be a parallel region, for a handful of numbers.
    """
    fed = [
        (token, slot, place)
        for slot, ids, start in rows
        for place, token in enumerate(ids[start:], start)
    ]
    tokens, slots, positions = torch.tensor(fed).T.contiguous()
    return tokens, slots, positions


def _join(active: _Active, prompts: list[list[int]], placed: list[_Placed]) -> _Active:
    if not placed:
        return active
    rows = [[slot, i, len(prompts[i]) - 1, 0, prompts[i][-1]] for slot, i, _ in placed]
    more = torch.tensor(rows).unbind(1)
    return _Active(*(torch.cat(parts) for parts in zip(active, more, strict=True)))


def _feed(
    active: _Active, prompts: list[list[int]], new: list[_Placed]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, rows, positions, wanted): one token a slot; of the last slots, `new` prompts."""
    old = len(active.slots) - len(new)
    if not new:
        return active.tokens, active.slots, active.positions, torch.arange(old)
    tokens, rows, positions = _packed([(slot, prompts[i], start) for slot, i, start in new])
    ends = torch.tensor([len(prompts[i]) - start for _, i, start in new]).cumsum(0) - 1
    return (
        torch.cat((active.tokens[:old], tokens)),
        torch.cat((active.slots[:old], rows)),
        torch.cat((active.positions[:old], positions)),
        torch.cat((torch.arange(old), old + ends)),
    )


def _draw(
    session: Session,
    tokens: Tensor,
    rows: Tensor,
    positions: Tensor,
    wanted: Tensor,
    *,
    seeds: Tensor,
    sampler: Sampler,
    eos_id: int | None,
) -> tuple[Tensor, Tensor]:
    """(tokens, logprobs), both (S, A), drawn after feeding."""
    fed = tokens, rows, positions, wanted
    if sampler.truncates:
        drawn = ops.sample(session.logits(*fed), seeds=seeds[0], **sampler._asdict())
        return drawn[0][None], drawn[1][None]
    return session.draw(*fed, seeds=seeds, temperature=sampler.temperature, eos_id=eos_id)
