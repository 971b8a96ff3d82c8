"""Batched sampling from a model: prompts of different lengths in, answers with log-probs out."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import ops
from puna.core.kv_cache import KVCache
from puna.core.model import Transformer
from puna.core.sampling import row_keys, step_seeds


class Completion(NamedTuple):
    tokens: list[int]  # the answer's ids, EOS included where it was drawn
    logprobs: list[float]  # one a token: tempered, untruncated, fp32
    finished: bool  # False: cut off by max_new_tokens or the context


class Sampler(NamedTuple):
    """How to draw: temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    round_index: int = 0,
    prompt_ids: list[int] | None = None,
    sample_ids: list[int] | None = None,
    batch_size: int = 256,
) -> list[Completion]:
    """Continue each prompt (a list of ids) until EOS, `max_new_tokens` or the context's end.

    `prompt_ids` and `sample_ids` name the rows for the counter-based draw (default: 0, 1, ...
    and 0). Results come in the order of `prompts`. Raises ValueError for an empty prompt or one
    that fills the context.
    """
    _check(model, prompts)
    device = model.head_weight.device
    numbers = prompt_ids if prompt_ids is not None else range(len(prompts))
    ids = torch.tensor(numbers, dtype=torch.int64)
    draws = sample_ids if sample_ids is not None else [0] * len(prompts)
    samples = torch.tensor(draws, dtype=torch.int64)
    keys = row_keys(seed, round_index, ids, samples).to(device)
    results: list[Completion | None] = [None] * len(prompts)
    # Prompts of similar length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    sampler = Sampler(temperature, top_k, top_p)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Batch(model, [prompts[r] for r in rows], keys[rows], max_new_tokens)
        for _ in batch.steps(sampler, eos_id):
            pass
        for row, completion in zip(rows, batch.completions(), strict=True):
            results[row] = completion
    return [completion for completion in results if completion is not None]


@torch.inference_mode()
def stream(
    model: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    round_index: int = 0,
) -> Iterator[int]:
    """The ids of `generate(model, [prompt], ...)`, each as soon as it is drawn."""
    _check(model, [prompt])
    first = torch.zeros(1, dtype=torch.int64)
    keys = row_keys(seed, round_index, first, first).to(model.head_weight.device)
    batch = _Batch(model, [prompt], keys, max_new_tokens)
    for _ in batch.steps(Sampler(temperature, top_k, top_p), eos_id):
        yield batch.tokens[0][-1]


def _check(model: Transformer, prompts: list[list[int]]) -> None:
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < model.config.context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; it must have at least one and leave "
                f"room in the context of {model.config.context}"
            )


class _Batch:
    """One batch of prompts being continued; rows that finish are dropped from the cache."""

    def __init__(
        self, model: Transformer, prompts: list[list[int]], keys: Tensor, max_new_tokens: int
    ):
        self.model = model
        self.device = model.head_weight.device
        self.lengths = [len(prompt) for prompt in prompts]
        context = model.config.context
        self.limits = [min(max_new_tokens, context - n) for n in self.lengths]
        self.keys = keys
        self.prompts = prompts
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.finished = [False] * len(prompts)

    def completions(self) -> list[Completion]:
        parts = zip(self.tokens, self.logprobs, self.finished, strict=True)
        return [Completion(*each) for each in parts]

    def _prefill(self, rows: list[int]) -> tuple[KVCache, Tensor]:
        """Run the prompts, padded on the right; returns the cache and each last hidden state.

        A prompt that stands in several rows (K samples of it) is run once and copied.
        """
        first = dict.fromkeys(tuple(self.prompts[i]) for i in rows)
        place = {prompt: slot for slot, prompt in enumerate(first)}
        longest = max(map(len, first))
        slots = max(self.lengths[i] + self.limits[i] for i in rows)
        tokens = torch.zeros(len(first), longest, dtype=torch.int64)
        for slot, prompt in enumerate(first):
            tokens[slot, : len(prompt)] = torch.tensor(prompt)
        dtype = self.model.head_weight.dtype
        cache = KVCache(self.model.config, len(first), slots, device=self.device, dtype=dtype)
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
            if len(alive) < len(rows):
                kept = torch.tensor(alive, device=self.device)
                rows = [rows[slot] for slot in alive]
                keys, drawn = keys[kept], drawn[kept]
                cache.keep(kept)
            hidden = self.model(drawn[:, None], cache.lengths[:, None], cache=cache)[:, 0]
            cache.lengths += 1
            step += 1

    def _record(
        self, rows: list[int], drawn: list[int], logprobs: list[float], eos_id: int | None
    ) -> list[int]:
        """Note one token a row; returns the slots (not rows) that go on."""
        alive = []
        for slot, i in enumerate(rows):
            self.tokens[i].append(drawn[slot])
            self.logprobs[i].append(logprobs[slot])
            self.finished[i] = drawn[slot] == eos_id
            if not self.finished[i] and len(self.tokens[i]) < self.limits[i]:
                alive.append(slot)
        return alive
