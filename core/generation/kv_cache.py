"""The key/value cache: keys and values of every token seen, (L, B, T, K, D).

In memory one head's tokens lie side by side, (L, B, K, T, D): attention reads each head from end
to end, and on a CPU stepping over the other heads' tokens costs up to four times as much.
"""

import torch
from torch import Tensor

from puna.core.config import ModelConfig

CACHE_BYTES = 8_000_000_000  # of keys and values at once on a CPU; a trainer's, on any device
# Tokens of prompts in one forward pass: a GPU has enough to do, and 7B's keys and values of them,
# which stand beside the cache until they are copied, are 2.1 GB (of 256 prompts of 1,024: 137).
RUN = 4096
# Of a GPU's free memory, to caches: the rest is for logits (256 rows of Llama 3's vocabulary are
# 131 MB, several times) and for what lies between blocks.
SHARE = 0.9


def bytes_a_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one row's keys and values."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


def room(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, longest_prompt: int = 1
) -> int:
    """Bytes that keys and values may take where nothing is asked for. On a GPU what is free now,
    less what running the prompts takes besides: whoever has other plans for that memory, another
    thread that generates, say, asks for less."""
    if device.type != "cuda":
        return CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    # PyTorch keeps what it frees, and gives it back before it is out of memory; not the rest of a
    # piece of which some is in use, though ("inactive split").
    stats = torch.cuda.memory_stats(device)
    reserved, active, split = (
        int(stats.get(f"{name}_bytes.all.current", 0))
        for name in ("reserved", "active", "inactive_split")
    )
    free += reserved - active - split
    a_token = (4 * config.dim + 3 * config.ffn_dim) * dtype.itemsize  # held inside a block
    prompts = max(RUN, longest_prompt) * (bytes_a_token(config, dtype) + a_token)
    return max(0, int(SHARE * free) - prompts)


def rows_within(cache_bytes: int, config: ModelConfig, dtype: torch.dtype, longest: int) -> int:
    """How many rows of `longest` tokens stand side by side; one always does."""
    return max(1, cache_bytes // bytes_a_token(config, dtype) // longest)


class KVCache:
    """Room for `max_tokens` tokens in each of `batch` rows, which fill to their own lengths."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layers, batch, config.n_kv_heads, max_tokens, config.head_dim)
        # Zeros, not empty: NaN left in memory would survive a masked softmax as 0 * NaN.
        self._k = torch.zeros(shape, device=device, dtype=dtype)
        self._v = torch.zeros(shape, device=device, dtype=dtype)
        self._rows = torch.arange(batch, device=device)
        self.set_lengths(torch.zeros_like(self._rows), 0)

    @property
    def k(self) -> Tensor:
        """Keys (L, B, T, K, D)."""
        return self._k.transpose(2, 3)

    @property
    def v(self) -> Tensor:
        """Values (L, B, T, K, D)."""
        return self._v.transpose(2, 3)

    @property
    def max_tokens(self) -> int:
        return self._k.shape[3]

    @property
    def lengths(self) -> Tensor:
        """Tokens that each row holds, (B,) int64; the model's caller moves them on."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        # Read once a step, not once a layer: on a GPU this waits for the device.
        self.set_lengths(lengths, int(lengths.max()) if lengths.numel() else 0)

    def set_lengths(self, lengths: Tensor, longest: int) -> None:
        """The same without a look at them, so that a GPU is not waited for: none is above
        `longest`."""
        self._lengths, self._longest = lengths, longest
        self.seen = lengths + 1

    def place(self, slots: Tensor, other: "KVCache", rows: Tensor) -> None:
        """Copy `rows` (W,) of another cache to the beginning of `slots` (W,), a layer at a time."""
        tokens = other.max_tokens
        for ours, theirs in ((self._k, other._k), (self._v, other._v)):
            for layer, source in zip(ours, theirs, strict=True):
                layer[slots, :, :tokens] = source[rows]

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the first tokens of every row: k and v (B, T, K, D)."""
        if k.shape[1] > self.max_tokens:
            raise ValueError(f"{k.shape[1]} tokens do not fit a cache of {self.max_tokens}")
        self.k[layer, :, : k.shape[1]] = k
        self.v[layer, :, : v.shape[1]] = v

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token a row (B, 1, K, D) at its length; returns the layer's caches, cut to
        the longest row."""
        keys, values = self.k[layer], self.v[layer]
        keys[self._rows, self._lengths] = k[:, 0]
        values[self._rows, self._lengths] = v[:, 0]
        return keys[:, : self._longest + 1], values[:, : self._longest + 1]

    def keep(self, rows: Tensor) -> None:
        """Take the rows given (B',): to drop finished answers, or to copy a prompt's cache.

        Dropped rows, the others in order, move up in place, a layer at a time, so that old and new
        never stand side by side; their memory goes with the cache.
        """
        if len(rows) < self._k.shape[1]:
            for layers in (self._k, self._v):
                for layer in layers:
                    layer[: len(rows)] = layer[rows]
            self._k, self._v = self._k[:, : len(rows)], self._v[:, : len(rows)]
        else:
            self._k = self._k[:, rows]
            self._v = self._v[:, rows]
        self._rows = torch.arange(len(rows), device=rows.device)
        self.set_lengths(self._lengths[rows], self._longest)
