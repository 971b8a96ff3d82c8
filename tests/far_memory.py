"""Tensors larger than memory, for offsets past 32 bits: only the pages touched exist."""

import mmap

import pytest
import torch
from torch import Tensor

NORESERVE = 0x4000  # Linux; Python's mmap names it from 3.13 on


def spread(x: Tensor, apart: int) -> Tensor:
    """x (1, T, 1, D) with its tokens `apart` elements from each other, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("interpreted only: a GPU has no memory that is not there")
    tokens, size = x.shape[1], x.shape[3]
    bytes_of_it = x.element_size() * ((tokens - 1) * apart + size)
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        pages = mmap.mmap(-1, bytes_of_it, flags=flags)
    except OSError:
        pytest.skip(f"no room for {bytes_of_it >> 30} GB of addresses")
    wide = torch.as_strided(
        torch.frombuffer(pages, dtype=x.dtype), x.shape, (tokens * apart, apart, size, 1)
    )
    return wide.copy_(x)
