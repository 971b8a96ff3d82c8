"""Linear layers in native code: the three matrix products of training, for fp32 on the CPU.

A row's result is the same bits whatever the other rows and however many threads. `use_products`
says what is multiplied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.core.native.loader import best_instructions, native, readable
from puna.core.native.products import products

# With fewer, most of a tile is empty, and the BLAS reads the weights faster.
FEWEST_ROWS = 8
FAST = ("avx512_bf16", "avx512", "avx2")  # elsewhere the BLAS has better kernels


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether native code is the faster way. Mistakes do not fit: PyTorch explains them."""
    return (
        readable(x, weight)
        and weight.dim() == 2
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]
        and not _few(x, weight)
        and best_instructions() in FAST
    )


def _few(x: Tensor, weight: Tensor) -> bool:
    """Whether x is a step of decoding, one token a row, and of few rows. Short sequences (B, T, I)
    and the rows of a score head are none: they get the bits that they get among others."""
    step = x.dim() != 3 or x.shape[1] == 1
    return step and len(weight) > 1 and x.shape[:-1].numel() < FEWEST_ROWS


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) W^T (I, O): (..., O)."""
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(rows), len(weight))
    return matmul(rows, weight.T, y).view(*x.shape[:-1], len(weight))


def input_gradient(weights: Sequence[Tensor], d_ys: Sequence[Tensor]) -> Tensor:
    """dx (..., I) of each weight's (O, I) dy (..., O), summed."""
    shape, inputs = d_ys[0].shape[:-1], weights[0].shape[1]
    d_x = d_ys[0].new_empty(shape.numel(), inputs)
    for number, (weight, d_y) in enumerate(zip(weights, d_ys, strict=True)):
        matmul(d_y.reshape(-1, len(weight)), weight, d_x, add=number > 0)
    return d_x.view(*shape, inputs)


def weight_gradient(x: Tensor, d_y: Tensor) -> Tensor:
    """dW (O, I) of x (..., I) and d_y (..., O)."""
    x, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    return matmul(d_y.T, x, x.new_empty(d_y.shape[1], x.shape[1]))


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out (M, N), which lies without gaps, = a (M, K) b (K, N), or out + that with `add`."""
    assert out.is_contiguous()
    assert out.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
    if best_instructions() not in FAST:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    native().matmul(
        best_instructions(), *out.shape, a.shape[1],
        (a.data_ptr(), *a.stride()), (b.data_ptr(), *b.stride()),
        out.data_ptr(), add, products() == "bf16", torch.get_num_threads(),
    )  # fmt: skip
    return out
