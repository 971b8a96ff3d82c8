"""Model shapes: one frozen dataclass and the table of sizes.

The paper names the sizes but not their dimensions; those are in Meta's `params.json`
(34B was never released: its row is Code Llama 34B's, which continued it).
"""

import math
from dataclasses import dataclass

from torch import Tensor

from puna.core.rope_scaling import RopeScaling

WIDEST_HEAD = 1 << 16
LONGEST = 1 << 20  # tokens: the rotation tables of a whole context are made at once
LARGEST_MULTIPLIER = 1e6  # of the FFN width; the 70B model has 1.3
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "context")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a Llama's parameter shapes and its arithmetic."""

    dim: int  # C, model width
    n_layers: int
    n_heads: int  # H, query heads
    n_kv_heads: int  # K, key/value heads; H is a multiple of K
    ffn_dim: int  # F, width of the SwiGLU hidden layer
    vocab_size: int  # V
    context: int = 4096  # longest sequence the model is meant for, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # of a context that was stretched
    head_size: int | None = None  # D where it is not C / H
    attention_bias: bool = False  # whether q, k, v and the output's projection have biases
    qkv_bias: bool = False  # whether only q, k and v have them: Qwen2

    def __post_init__(self) -> None:
        for name in SHAPE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.context > LONGEST:
            raise ValueError(
                f"the context is {self.context} tokens; it must be at most {LONGEST}: state a "
                "shorter one"
            )
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rope_theta)
        if self.head_size is not None:
            if not 1 <= self.head_size <= WIDEST_HEAD:
                raise ValueError(f"head_size is {self.head_size}; it must be 1 to {WIDEST_HEAD}")
            if self.head_size * self.n_heads == self.dim:
                object.__setattr__(self, "head_size", None)  # said twice: still the same model
        elif self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias and qkv_bias are both set; set one of them")
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} must be even: RoPE rotates pairs")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.dim // self.n_heads

    @property
    def q_dim(self) -> int:
        """H D, width of all queries; C but for a head size of its own."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """K D, width of all keys."""
        return self.n_kv_heads * self.head_dim

    @property
    def biased(self) -> tuple[str, ...]:
        """Attention's projections that have biases."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return names if self.attention_bias else names[: 3 * self.qkv_bias]

    def rope_divisors(self) -> Tensor | None:
        """What each pair's frequency is divided by, (D/2,); None: by nothing."""
        scaling = self.rope_scaling
        return None if scaling is None else scaling.divisors(self.head_dim, self.rope_theta)


def ffn_width(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """F from `params.json`'s fields: 2/3 of 4*dim, scaled, rounded up to `multiple_of`.

    Raises ValueError for numbers that give no width.
    """
    if multiple_of < 1 or not 0 < (1.0 if multiplier is None else multiplier) < LARGEST_MULTIPLIER:
        raise ValueError(
            f"multiple_of is {multiple_of} and ffn_dim_multiplier {multiplier}; both must be above "
            f"0, the second below {LARGEST_MULTIPLIER:g}"
        )
    width = 2 * (4 * dim) // 3
    if multiplier is not None:
        width = int(multiplier * min(width, 1 << 62))  # a float holds no more
    return multiple_of * -(-width // multiple_of)


SIZES: dict[str, ModelConfig] = {
    "7b": ModelConfig(4096, 32, 32, 32, 11008, 32000),
    "13b": ModelConfig(5120, 40, 40, 40, 13824, 32000),
    "34b": ModelConfig(8192, 48, 64, 8, 22016, 32000),
    "70b": ModelConfig(8192, 80, 64, 8, 28672, 32000),
    # small ones: for laptops, tests and benchmarks
    "15m": ModelConfig(288, 6, 6, 6, 768, 32000, context=256),
    "demo": ModelConfig(192, 6, 6, 2, 512, 1024, context=1024),
    "110m": ModelConfig(768, 12, 12, 12, 2048, 32000, context=1024),
    "1b": ModelConfig(2048, 22, 32, 4, 5632, 32000, context=2048),
    "mini": ModelConfig(128, 4, 4, 2, 352, 1024, context=1024),
    "micro": ModelConfig(64, 4, 4, 2, 176, 1024, context=1024),
}


def size(name: str) -> ModelConfig:
    """The shape called `name`; ValueError listing the known ones otherwise."""
    if name not in SIZES:
        raise ValueError(f"unknown model size '{name}'; known sizes: {', '.join(SIZES)}")
    return SIZES[name]


def block_parameters(config: ModelConfig) -> int:
    """Number of parameters of one block."""
    q, kv = config.q_dim, config.kv_dim
    biases = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": config.dim}
    attention = 2 * config.dim * (q + kv) + sum(biases[name] for name in config.biased)
    return attention + 3 * config.dim * config.ffn_dim + 2 * config.dim


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters with the untied language-model head."""
    blocks = config.n_layers * block_parameters(config)
    return blocks + config.dim + 2 * config.vocab_size * config.dim
