"""The key/value cache: keys and values of every token seen, (L, B, T, K, D)."""

import torch
from torch import Tensor

from puna.core.config import ModelConfig


class KVCache:
    """Room for `slots` tokens in each of `batch` rows, rows filled to their own lengths."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
        # Zeros, not empty: NaN left in memory would survive a masked softmax as 0 * NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the first tokens of every row: k and v (B, T, K, D)."""
        if k.shape[1] > self.slots:
            raise ValueError(f"{k.shape[1]} tokens do not fit a cache of {self.slots} slots")
        self.k[layer, :, : k.shape[1]] = k
        self.v[layer, :, : v.shape[1]] = v

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token a row (B, 1, K, D) at its length; returns the layer's caches, cut to
        the longest row. `lengths` itself is moved on once a step, by the model's caller."""
        rows = torch.arange(k.shape[0], device=k.device)
        self.k[layer, rows, self.lengths] = k[:, 0]
        self.v[layer, rows, self.lengths] = v[:, 0]
        longest = int(self.lengths.max()) + 1
        return self.k[layer, :, :longest], self.v[layer, :, :longest]

    def keep(self, rows: Tensor) -> None:
        """Take the rows given (B',): to drop finished answers, or to copy a prompt's cache."""
        self.k, self.v = self.k[:, rows].contiguous(), self.v[:, rows].contiguous()
        self.lengths = self.lengths[rows]
