"""Continuous batching by PyTorch, on any device: a slot whose answer ends takes the next prompt.

Shapes are fixed and a step never waits for the device: which answers have ended is looked at every
few steps. On a GPU a step is replayed as a CUDA graph. A prompt that several slots take (K samples
of it) is run once and copied.
"""

import functools
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import ops
from puna.core.generation.graphs import Graphs, replays
from puna.core.generation.kv_cache import RUN, KVCache
from puna.core.generation.sampling import EosIds, Sampler, all_of, step_seeds
from puna.core.generation.stopping import Stops
from puna.core.model import Transformer

LOOK = 8  # steps between two looks: an ended slot is computed for nothing until the next
FILLED = 8  # slots are filled when one in so many is free: each time runs prompts by themselves
ROOM = 256  # tokens that a graph looks back on, doubled as they grow: few graphs, none much too far
SHRINK = 0.5  # the slots become fewer when, with no prompt left, this share of them is at work


class Ended(NamedTuple):
    """An answer: of which prompt, its ids and their log-probs."""

    prompt: int
    tokens: list[int]
    logprobs: list[float]


class _State(NamedTuple):
    """What the device knows of each slot, (S,) each but for the answers, (S, M)."""

    last: Tensor  # the token drawn last, fed next
    lengths: Tensor  # tokens in the cache
    counts: Tensor  # tokens drawn
    limits: Tensor  # of those, at most
    keys: Tensor  # of the draws
    going: Tensor  # whether the answer goes on
    tokens: Tensor
    logprobs: Tensor


class Slots:
    """Answers of at most `most` tokens, continued side by side in a cache of rows of `longest`."""

    def __init__(
        self,
        model: Transformer,
        count: int,
        longest: int,
        most: int,
        sampler: Sampler,
        eos_id: EosIds,
    ):
        self.model, self.sampler = model, sampler
        device = model.device
        self.eos_ids = torch.tensor(all_of(eos_id) or [-1], device=device)
        self.cache = KVCache(model.config, count, longest, device=device, dtype=model.dtype)
        last, lengths, counts, limits, keys = torch.zeros(
            5, count, dtype=torch.int64, device=device
        )
        going = torch.zeros(count, dtype=torch.bool, device=device)
        tokens = torch.zeros(count, most, dtype=torch.int64, device=device)
        logprobs = torch.zeros(count, most, device=device)
        self.state = _State(last, lengths, counts, limits, keys, going, tokens, logprobs)
        self.holds: list[int | None] = [None] * count  # whose answer stands in a slot
        self.reach = 0  # no slot's length is above it: known without asking the device
        self.graphs = Graphs(model) if replays(model) else None

    def fill(
        self, placed: Sequence[tuple[int, int]], prompts: Sequence[Sequence[int]], keys: Tensor,
        limits: Sequence[int],
    ) -> None:  # fmt: skip
        """Begin the prompts with these (slot, number) pairs: run them and draw their first token.
        keys (N,) and limits are of all prompts."""
        device = self.model.device
        ran = [self._run(some, prompts) for some in pieces(placed, prompts, most_tokens(device))]
        slots = torch.tensor([slot for slot, _ in placed], device=device)
        numbers = [number for _, number in placed]
        lengths = torch.tensor([len(prompts[number]) for number in numbers], device=device)
        for name, values in (
            ("lengths", lengths),
            ("counts", torch.zeros_like(lengths)),
            ("limits", torch.tensor([limits[number] for number in numbers], device=device)),
            ("keys", keys[torch.tensor(numbers)].to(device)),
            ("going", torch.ones_like(lengths, dtype=torch.bool)),
        ):
            getattr(self.state, name)[slots] = values
        for slot, number in placed:
            self.holds[slot] = number
        self.reach = max(self.reach, *(len(prompts[number]) for number in numbers))
        self._draw(torch.cat(ran), slots)

    def _run(self, placed: Sequence[tuple[int, int]], prompts: Sequence[Sequence[int]]) -> Tensor:
        """One forward pass of prompts, whose keys and values go to their slots: the hidden state at
        the end of each (W, C)."""
        device = self.model.device
        first = dict.fromkeys(tuple(prompts[number]) for _, number in placed)
        place = {prompt: row for row, prompt in enumerate(first)}
        longest = max(map(len, first))
        tokens = torch.zeros(len(first), longest, dtype=torch.int64)
        for prompt, row in place.items():
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        cache = KVCache(
            self.model.config, len(first), longest, device=device, dtype=self.model.dtype
        )
        ends = [row * longest + len(prompt) - 1 for prompt, row in place.items()]
        last = torch.tensor(ends, device=device)
        hidden = self.model(tokens.to(device), cache=cache, wanted=last)[0]
        rows = torch.tensor([place[tuple(prompts[number])] for _, number in placed], device=device)
        slots = torch.tensor([slot for slot, _ in placed], device=device)
        self.cache.place(slots, cache, rows)
        return hidden[rows]

    def step(self) -> None:
        """One token more in every slot whose answer goes on."""
        if self.graphs is None:
            self._step(self.reach)
        else:
            room = max(ROOM, 1 << self.reach.bit_length())
            reach = min(room, self.cache.max_tokens) - 1
            self.graphs.run(reach, functools.partial(self._step, reach))
        self.reach = min(self.reach + 1, self.cache.max_tokens - 1)

    def _step(self, reach: int) -> None:
        """With nothing in it that changes from step to step but what tensors hold."""
        state = self.state
        self.cache.set_lengths(state.lengths, reach)
        hidden = self.model(state.last[:, None], state.lengths[:, None], cache=self.cache)[:, 0]
        state.lengths.add_(state.going)
        self._draw(hidden, torch.arange(len(self.holds), device=hidden.device))

    def _draw(self, hidden: Tensor, slots: Tensor) -> None:
        """A token after each hidden state (W, C), of the `slots` (W,)."""
        state = self.state
        counts, going = state.counts[slots], state.going[slots]
        drawn, logprobs = ops.sample(
            self.model.logits(hidden),
            seeds=step_seeds(state.keys[slots], counts),
            **self.sampler._asdict(),
        )
        at = counts.clamp(max=state.tokens.shape[1] - 1)  # where an ended answer writes nothing
        state.tokens[slots, at] = torch.where(going, drawn, state.tokens[slots, at])
        state.logprobs[slots, at] = torch.where(going, logprobs, state.logprobs[slots, at])
        state.last[slots] = drawn
        counts = counts + going
        state.counts[slots] = counts
        ended = torch.isin(drawn, self.eos_ids) | (counts >= state.limits[slots])
        state.going[slots] = going & ~ended

    def stop(self, stops: Stops) -> None:
        """End the answers that hold one of the strings."""
        going, counts = self.state.going.tolist(), self.state.counts.tolist()
        for slot, held in enumerate(self.holds):
            if held is not None and going[slot]:
                ids = self.state.tokens[slot, : counts[slot]].tolist()
                self.state.going[slot] = not stops.found(held, ids)

    def look(self, stops: Stops | None = None) -> tuple[list[Ended], list[int]]:
        """Wait for the device: the answers that have ended since the last look, and the slots that
        are free. Raises NoDistribution for a log-prob that is NaN."""
        if stops is not None:
            self.stop(stops)
        state = self.state
        going, lengths = state.going.tolist(), state.lengths.tolist()
        taken = [slot for slot, held in enumerate(self.holds) if held is not None]
        done = [slot for slot in taken if not going[slot]]
        self.reach = max((lengths[slot] for slot in taken if going[slot]), default=0)
        ended: list[Ended] = []
        if done:
            rows = torch.tensor(done, device=state.going.device)
            parts = (state.tokens, state.logprobs, state.counts)
            for slot, ids, scores, count in zip(
                done, *(part[rows].tolist() for part in parts), strict=True
            ):
                held = self.holds[slot]
                assert held is not None
                if any(score != score for score in scores[:count]):
                    raise ops.NoDistribution(slot)
                ended.append(Ended(held, ids[:count], scores[:count]))
                self.holds[slot] = None
            state.lengths[rows] = 0  # a free slot is computed, too, and costs little so
        return ended, [slot for slot, held in enumerate(self.holds) if held is None]

    def shrink(self) -> None:
        """Keep the slots that are at work, and no others."""
        kept = [slot for slot, held in enumerate(self.holds) if held is not None]
        rows = torch.tensor(kept, device=self.model.device)
        self.cache.keep(rows)
        self.state = _State(*(part[rows] for part in self.state))
        self.holds = [self.holds[slot] for slot in kept]
        self.graphs = Graphs(self.model) if self.graphs else None  # of other shapes


def most_tokens(device: torch.device) -> int:
    """Of prompts in one forward pass. On a CPU all: how many there are decides the last bits."""
    return RUN if device.type == "cuda" else sys.maxsize


def pieces(
    placed: Sequence[tuple[int, int]], prompts: Sequence[Sequence[int]], most: int
) -> Iterator[list[tuple[int, int]]]:
    """(slot, number) pairs in their order, in parts whose prompts, padded, are at most `most`
    tokens, or one prompt; what several take in a row is counted once."""
    part: list[tuple[int, int]] = []
    longest = distinct = 0
    before: Sequence[int] = ()
    for pair in placed:
        prompt = prompts[pair[1]]
        if prompt != before:
            before, longest, distinct = prompt, max(longest, len(prompt)), distinct + 1
            if part and distinct * longest > most:
                yield part
                part, longest, distinct = [], len(prompt), 1
        part.append(pair)
    yield part


def continued(
    model: Transformer,
    prompts: list[list[int]],
    keys: Tensor,
    limits: list[int],
    sampler: Sampler,
    eos_id: EosIds,
    count: int,
    stops: Stops | None = None,
) -> Iterator[Ended]:
    """Answers to all prompts with a limit above 0, as they end, `count` at a time."""
    groups: dict[tuple[int, ...], list[int]] = {}  # one and the same prompt's samples side by side
    for number, limit in enumerate(limits):
        if limit > 0:
            groups.setdefault(tuple(prompts[number]), []).append(number)
    # Prompts of similar length are run together: less padding.
    waiting = deque(number for prompt in sorted(groups, key=len) for number in groups[prompt])
    if not waiting:
        return
    count = min(count, len(waiting))
    longest = max(len(prompts[number]) + limits[number] for number in waiting)
    slots = Slots(model, count, longest, max(limits), sampler, eos_id)
    free = list(range(count))
    while waiting or len(free) < len(slots.holds):
        if waiting and (len(free) * FILLED >= count or len(free) == count):
            placed = [(slot, waiting.popleft()) for slot in free[: len(waiting)]]
            slots.fill(placed, prompts, keys, limits)
        elif not waiting and len(slots.holds) - len(free) <= SHRINK * len(slots.holds):
            slots.shrink()
        for _ in range(LOOK):
            slots.step()
        ended, free = slots.look(stops)
        yield from ended
