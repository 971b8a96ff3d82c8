"""Sizes of tiles and slices of the linear losses, and the product that adds up in fp32."""

import torch
from torch import Tensor

from .. import backend


def tiles(x: Tensor) -> dict[str, int]:
    """Sizes of a tile of logits: by device and dtype alone, so that rows stay what they are."""
    if x.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8}
    known = backend.architecture(x.device)
    if known.startswith("gfx"):
        return {**tile, "num_stages": 2}  # 48 of 64 KB of shared memory
    if known in ("sm_90", "sm_100", "sm_103"):
        return {**tile, "num_stages": 4}  # 192 of 227 KB; the backward spills a few bytes a tile
    return {**tile, "BLOCK_N": 128, "num_stages": 3}  # 256 columns would spill on an A100


def near(x: Tensor) -> Tensor:
    """The matrix with neighbouring columns next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b if `first`, else out += a @ b; summed in fp32 where `out` is."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif a.is_cuda and torch.version.hip is None:
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        product = (a @ b) if a.is_cuda else a.to(out.dtype) @ b.to(out.dtype)
        out.copy_(product) if first else out.add_(product)


def slices(length: int, row_bytes: int, limit: int, multiple: int) -> list[tuple[int, int]]:
    """`length` cut into equal pieces of at most `limit` bytes, in multiples (one at least)."""
    most = max(multiple, limit // max(row_bytes, 1) // multiple * multiple)
    pieces = -(-length // most)
    step = -(-length // max(pieces, 1) // multiple) * multiple
    return [(start, min(start + step, length)) for start in range(0, length, step or 1)]


def kept(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)
