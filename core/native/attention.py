"""`attention` in native code, forward and backward, for fp32 on the CPU.

Where `use_products` says bf16, the forward multiplies queries, keys, probabilities and values that
are rounded to it, and the backward, whose products are fp32, queries, keys and values that are.

Each segment of a packed batch is a piece of work of its own: nothing is padded, and what is kept
for the backward is q, k, v, the result and one number a token and head.
"""

from typing import Any

import torch
from torch import Tensor

from puna.core.native.loader import address, best_instructions, native, readable
from puna.core.native.products import products


def fits(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float | None) -> bool:
    """Whether native code can do it. Mistakes do not fit: the kernels explain them."""
    return (
        readable(q, k, v)
        and q.dim() == 4
        and k.shape == v.shape
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and k.shape[2] > 0
        and q.shape[2] % k.shape[2] == 0
        and q.shape[3] > 0
        and (scale is None or scale > 0)
        and (cu_seqlens is None or _covers(cu_seqlens, *q.shape[:2]))
        and best_instructions(q.shape[3]) is not None
    )


def _covers(cu_seqlens: Tensor, rows: int, tokens: int) -> bool:
    """Cuts from 0 to B*T that do not fall, one of them wherever a row begins."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        return False
    if cu_seqlens.device.type != "cpu" or len(cu_seqlens) < 2 or rows * tokens == 0:
        return False
    cuts = cu_seqlens.tolist()
    return (
        cuts[0] == 0
        and cuts[-1] == rows * tokens
        and all(a <= b for a, b in zip(cuts, cuts[1:], strict=False))
        and set(cuts).issuperset(range(0, rows * tokens, tokens))
    )


def cuts(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where segments begin and end (S+1,) int64; without `cu_seqlens` a row is one segment."""
    if cu_seqlens is None:
        return torch.arange(q.shape[0] + 1) * q.shape[1]
    return cu_seqlens.long().contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), log of the sum of e^score (B, T, H)) of what `fits`."""
    q, k, v = map(_by_token, (q, k, v))
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:3])
    native().attention(
        best_instructions(q.shape[3]),
        _described(q, k, v, cuts, scale, out, lse),
        torch.get_num_threads(),
    )
    return out, lse


def attention_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), the same bits with any number of threads."""
    q, k, v, d_out = map(_by_token, (q, k, v, d_out))
    dq, dk, dv = torch.empty(q.shape), torch.empty(k.shape), torch.empty(v.shape)
    native().attention_backward(
        best_instructions(q.shape[3]),
        _described(q, k, v, cuts, scale, out, lse),
        d_out.data_ptr(), d_out.stride(1), address(dq), address(dk), address(dv),
        torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _by_token(x: Tensor) -> Tensor:
    """x (B, T, H, D) with dense heads and one stride from any token to the next."""
    dense = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if dense and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def _described(
    q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, scale: float, out: Tensor, lse: Tensor
) -> Any:  # fmt: skip
    return native().Attention(
        q.shape[2], k.shape[2], q.shape[3], len(cuts) - 1, address(cuts), scale,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(1), k.stride(1), v.stride(1),
        address(out), address(lse),
        products() == "bf16" and best_instructions(q.shape[3]) == "avx512_bf16",
    )  # fmt: skip
