"""Batched sampling from a model: prompts of different lengths in, answers with log-probs out."""

from collections.abc import Callable
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
    on_token: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Continue each prompt (a list of ids) until EOS, `max_new_tokens` or the context's end.

    `prompt_ids` and `sample_ids` name the rows for the counter-based draw (default: 0, 1, ...
    and 0). `on_token(row, id)` is called as each token appears. Results come in the order of
    `prompts`. Raises ValueError for an empty prompt or one that fills the context.
    """
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < model.config.context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; it must have at least one and leave "
                f"room in the context of {model.config.context}"
            )
    device = model.head_weight.device
    ids = torch.tensor(prompt_ids if prompt_ids is not None else range(len(prompts)))
    samples = torch.tensor(sample_ids if sample_ids is not None else [0] * len(prompts))
    keys = row_keys(seed, round_index, ids, samples).to(device)
    results: list[Completion | None] = [None] * len(prompts)
    # Prompts of similar length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    sampler = Sampler(temperature, top_k, top_p)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Batch(model, [prompts[r] for r in rows], keys[rows], max_new_tokens)
        report = (lambda i, token, rows=rows: on_token(rows[i], token)) if on_token else None
        for row, completion in zip(rows, batch.run(sampler, eos_id, report), strict=True):
            results[row] = completion
    return [completion for completion in results if completion is not None]


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

    def run(
        self, sampler: Sampler, eos_id: int | None, report: Callable[[int, int], None] | None
    ) -> list[Completion]:
        rows = [i for i, limit in enumerate(self.limits) if limit > 0]
        if rows:
            self._decode(rows, sampler, eos_id, report)
        return [
            Completion(*parts)
            for parts in zip(self.tokens, self.logprobs, self.finished, strict=True)
        ]

    def _prefill(self, rows: list[int]) -> tuple[KVCache, Tensor]:
        """Run the prompts, padded on the right; returns the cache and each last hidden state."""
        longest = max(self.lengths[i] for i in rows)
        slots = max(self.lengths[i] + self.limits[i] for i in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        for slot, i in enumerate(rows):
            tokens[slot, : self.lengths[i]] = torch.tensor(self.prompts[i])
        dtype = self.model.head_weight.dtype
        cache = KVCache(self.model.config, len(rows), slots, device=self.device, dtype=dtype)
        hidden = self.model(tokens.to(self.device), cache=cache)
        if longest == 1:  # a single token was appended, not filled: same slots either way
            hidden = hidden[:, :1]
        cache.lengths = torch.tensor([self.lengths[i] for i in rows], device=self.device)
        last = hidden[torch.arange(len(rows), device=self.device), cache.lengths - 1]
        return cache, last

    def _decode(
        self,
        rows: list[int],
        sampler: Sampler,
        eos_id: int | None,
        report: Callable[[int, int], None] | None,
    ) -> None:
        cache, hidden = self._prefill(rows)
        keys = self.keys[rows]
        step = 0
        while True:
            drawn, logprobs = ops.sample(
                self.model.logits(hidden), seeds=step_seeds(keys, step), **sampler._asdict()
            )
            alive = self._record(rows, drawn.tolist(), logprobs.tolist(), eos_id, report)
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
        self,
        rows: list[int],
        drawn: list[int],
        logprobs: list[float],
        eos_id: int | None,
        report: Callable[[int, int], None] | None,
    ) -> list[int]:
        """Note one token a row; returns the slots (not rows) that go on."""
        alive = []
        for slot, i in enumerate(rows):
            self.tokens[i].append(drawn[slot])
            self.logprobs[i].append(logprobs[slot])
            if report:
                report(i, drawn[slot])
            self.finished[i] = drawn[slot] == eos_id
            if not self.finished[i] and len(self.tokens[i]) < self.limits[i]:
                alive.append(slot)
        return alive
