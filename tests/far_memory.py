"""Tensors of more than 2^31 elements, for offsets past 32 bits: on a CPU only the pages touched
exist, on a GPU all of them (some gigabytes)."""

import mmap

import pytest
import torch
from torch import Tensor

NORESERVE = 0x4000  # Linux; Python's mmap names it from 3.13 on


def spread(x: Tensor, apart: int) -> Tensor:
    """x (1, T, 1, D) with its tokens `apart` elements from each other."""
    tokens, size = x.shape[1], x.shape[3]
    elements = (tokens - 1) * apart + size
    strides = tokens * apart, apart, size, 1
    if x.is_cuda:
        if torch.cuda.mem_get_info(x.device)[0] < 2 * x.element_size() * elements:
            pytest.skip("no room on the GPU")
        memory = torch.zeros(elements, dtype=x.dtype, device=x.device)
        return memory.as_strided(x.shape, strides).copy_(x)
    bytes_of_it = x.element_size() * elements
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        pages = mmap.mmap(-1, bytes_of_it, flags=flags)
    except OSError:
        pytest.skip(f"no room for {bytes_of_it >> 30} GB of addresses")
    return torch.frombuffer(pages, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)
