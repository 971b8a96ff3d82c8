"""How a model's RoPE was stretched to a longer context than it was trained with at first.

Linear: all frequencies are divided by one factor (Chen et al. 2023). llama3: only the slow ones
are, with a smooth passage between (Llama 3.1's reference code).
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LARGEST_FACTOR = 1e6


class RopeScaling(NamedTuple):
    """The settings, called as in Hugging Face's config.json."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def check(self) -> None:
        """ValueError for numbers that scale nothing."""
        if not 1 <= self.factor <= LARGEST_FACTOR:
            raise ValueError(f"rope_scaling's factor is {self.factor}; it must be 1 to 1e6")
        if self.rope_type == "llama3" and not (
            0 < self.low_freq_factor < self.high_freq_factor < LARGEST_FACTOR
            and 1 <= self.original_max_position_embeddings < 1 << 30
        ):
            raise ValueError(
                "rope_scaling's low_freq_factor must be above 0 and below high_freq_factor, and "
                "original_max_position_embeddings at least 1"
            )

    def divisors(self, head_dim: int, theta: float) -> Tensor:
        """What each pair's frequency is divided by: (D/2,) fp64 for heads of size D."""
        if self.rope_type == "linear":
            return torch.full((head_dim // 2,), self.factor, dtype=torch.float64)
        frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # how much of the frequency stays
        return 1 / ((1 - kept) / self.factor + kept)
