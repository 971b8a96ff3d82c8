"""Batched sampling by PyTorch, on any device: one batch of prompts, from first to last token."""

from collections.abc import Iterator

import torch
from torch import Tensor

from puna.core import ops
from puna.core.generation.kv_cache import KVCache
from puna.core.generation.sampling import Sampler, step_seeds
from puna.core.model import Transformer

KEEP_ABOVE = 0.75  # finished rows are dropped when no more than this share of the batch goes on


class Batch:
    """One batch of prompts being continued.

    Rows that finish stay in the cache, and are computed for nothing, until a quarter of it is
    theirs: dropping them copies the cache, which costs a row as much as several tokens.
    """

    def __init__(
        self, model: Transformer, prompts: list[list[int]], keys: Tensor, limits: list[int]
    ):
        self.model = model
        self.device = model.device
        self.lengths = [len(prompt) for prompt in prompts]
        self.limits = limits
        self.keys = keys
        self.prompts = prompts
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.finished = [False] * len(prompts)

    def _prefill(self, rows: list[int]) -> tuple[KVCache, Tensor]:
        """Run the prompts, padded on the right; returns the cache and each last hidden state.

        A prompt that stands in several rows (K samples of it) is run once and copied.
        """
        first = dict.fromkeys(tuple(self.prompts[i]) for i in rows)
        place = {prompt: slot for slot, prompt in enumerate(first)}
        longest = max(map(len, first))
        max_tokens = max(self.lengths[i] + self.limits[i] for i in rows)
        tokens = torch.zeros(len(first), longest, dtype=torch.int64)
        for slot, prompt in enumerate(first):
            tokens[slot, : len(prompt)] = torch.tensor(prompt)
        dtype = self.model.dtype
        cache = KVCache(self.model.config, len(first), max_tokens, device=self.device, dtype=dtype)
        hidden = self.model(tokens.to(self.device), cache=cache)
        copies = torch.tensor([place[tuple(self.prompts[i])] for i in rows], device=self.device)
        if len(first) < len(rows):
            cache.keep(copies)
        cache.lengths = torch.tensor([self.lengths[i] for i in rows], device=self.device)
        return cache, hidden[copies, cache.lengths - 1]

    def steps(self, sampler: Sampler, eos_id: int | None) -> Iterator[None]:
        """Draw one token for every unfinished row at each step."""
        rows = [i for i, limit in enumerate(self.limits) if limit > 0]
        if not rows:
            return
        cache, hidden = self._prefill(rows)
        keys = self.keys[rows]
        step = 0
        while True:
            drawn, logprobs = ops.sample(
                self.model.logits(hidden), seeds=step_seeds(keys, step), **sampler._asdict()
            )
            alive = self._record(rows, drawn.tolist(), logprobs.tolist(), eos_id)
            yield
            if not alive:
                return
            if len(alive) <= KEEP_ABOVE * len(rows):
                kept = torch.tensor(alive, device=self.device)
                rows = [rows[slot] for slot in alive]
                keys, drawn = keys[kept], drawn[kept]
                cache.keep(kept)
                alive = list(range(len(rows)))
            hidden = self.model(drawn[:, None], cache.lengths[:, None], cache=cache)[:, 0]
            moved = torch.zeros(len(rows), dtype=torch.int64)
            moved[alive] = 1  # a finished row writes to the same slot again and again
            cache.lengths = cache.lengths + moved.to(self.device)
            step += 1

    def _record(
        self, rows: list[int], drawn: list[int], logprobs: list[float], eos_id: int | None
    ) -> list[int]:
        """Note one token for each unfinished row; returns the slots (not rows) that go on."""
        alive = []
        for slot, i in enumerate(rows):
            if self.finished[i] or len(self.tokens[i]) == self.limits[i]:
                continue
            if logprobs[slot] != logprobs[slot]:  # a GPU's draw does not wait to be looked at
                raise ops.NoDistribution(slot)
            self.tokens[i].append(drawn[slot])
            self.logprobs[i].append(logprobs[slot])
            self.finished[i] = drawn[slot] == eos_id
            if not self.finished[i] and len(self.tokens[i]) < self.limits[i]:
                alive.append(slot)
        return alive
