"""How a model's RoPE was stretched to a longer context than it was trained with at first.

Linear: all frequencies are divided by one factor (Chen et al. 2023). llama3: only the slow ones
are, with a smooth passage between (Llama 3.1's reference code). yarn: the same with a passage that
is straight in the pair's number, and larger scores (Peng et al. 2023).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LARGEST_FACTOR = 1e6
# What each kind reads of the settings; the others stay at their defaults.
FIELDS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
    ),
}


class RopeScaling(NamedTuple):
    """The settings, called as in Hugging Face's config.json."""

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0  # cos and sin are multiplied by it
    beta_fast: float = 32.0  # turns within the first context above which a pair stays as it is
    beta_slow: float = 1.0  # and below which it is slowed by the whole factor
    truncate: bool = True  # whether the passage begins and ends at whole pairs

    def check(self, theta: float) -> None:
        """ValueError for numbers that scale nothing."""
        if self.rope_type == "yarn" and theta <= 1:
            raise ValueError(f"rope_theta is {theta}; with YaRN it must be above 1")
        if not 1 <= self.factor <= LARGEST_FACTOR:
            raise ValueError(f"rope_scaling's factor is {self.factor}; it must be 1 to 1e6")
        if self.rope_type != "linear" and not (
            1 <= self.original_max_position_embeddings < 1 << 30
        ):
            raise ValueError(
                "rope_scaling's original_max_position_embeddings is "
                f"{self.original_max_position_embeddings}; it must be 1 to 2^30"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor < LARGEST_FACTOR:
            raise ValueError(
                "rope_scaling's low_freq_factor must be above 0 and below high_freq_factor"
            )
        if not 0 < self.beta_slow <= self.beta_fast < LARGEST_FACTOR:
            raise ValueError("rope_scaling's beta_slow must be above 0 and at most beta_fast")
        if not 0 < self.attention_factor < LARGEST_FACTOR:
            raise ValueError(
                f"rope_scaling's attention_factor is {self.attention_factor}; it must be above 0 "
                "and below 1e6"
            )

    def settings(self) -> dict[str, Any]:
        """What config.json says of this kind."""
        return {name: getattr(self, name) for name in ("rope_type", *FIELDS[self.rope_type])}

    def divisors(self, head_dim: int, theta: float) -> Tensor:
        """What each pair's frequency is divided by: (D/2,) fp64 for heads of size D, on the CPU
        also where a model is being built on another device."""
        pairs = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
        if self.rope_type == "linear":
            return torch.full_like(pairs, self.factor)
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * theta ** (-2 * pairs / head_dim)
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = ((turns / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        else:
            first, last = self._passage(head_dim, theta)
            kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
        return 1 / ((1 - kept) / self.factor + kept)  # kept: how much of the frequency stays

    def _passage(self, head_dim: int, theta: float) -> tuple[float, float]:
        """YaRN: the last pair that stays as it is and the first that is slowed wholly."""

        def pair(turns: float) -> float:
            """The (fractional) pair that turns so often within the first context."""
            per_radian = self.original_max_position_embeddings / (turns * 2 * math.pi)  # tokens
            return head_dim * math.log(per_radian) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The upper bound is D - 1, not D/2 - 1, in YaRN's code and in everyone's since.
        first, last = max(first, 0), min(last, head_dim - 1)
        return first, last + 0.001 if first == last else last


def yarn_attention(factor: float, mscale: float | None, all_dim: float | None) -> float:
    """YaRN's factor on cos and sin where a config states none: 0.1 ln(factor) + 1, or the
    quotient of two such where it has `mscale` and `mscale_all_dim`."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1.0)
