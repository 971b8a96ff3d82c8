"""Random numbers for sampling: each draw is a function of who draws it, and of nothing else.

The draw for token t of sample k of prompt i in round r is a hash of (seed, r, i, k, t). So
what is sampled does not depend on batch size, order, or how many processes share the work.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import ops


class Sampler(NamedTuple):
    """How to draw: temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def row_keys(seed: int, round_index: int, prompts: Tensor, samples: Tensor) -> Tensor:
    """One int64 key a row, from prompt numbers and sample numbers, both (B,) int64."""
    key = ops.mix64(torch.full_like(prompts, seed))
    for part in (torch.full_like(prompts, round_index), prompts, samples):
        key = ops.mix64(key ^ part)
    return key


def step_seeds(keys: Tensor, t: int | Tensor) -> Tensor:
    """Seeds (B,) for the t-th token of the answers with these keys (B,)."""
    return ops.mix64(keys ^ torch.as_tensor(t, dtype=torch.int64, device=keys.device))
