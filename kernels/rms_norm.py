"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

`x` is (..., C), `weight` is (C,). Statistics are fp32 whatever the dtype of `x`.
Casting order: "llama" (Meta's code) casts the normalised value back before the weight is
applied; "hf" does the same but returns the promoted dtype of weight and input, so an fp32
weight gives an fp32 result.
Source: Zhang & Sennrich 2019; Llama 2 paper, section 2.2.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama") -> Tensor:
    """Normalise the last dimension of `x` (..., C) and scale by `weight` (C,).

    Returns (..., C) in x's dtype (`cast="llama"`) or the promoted dtype (`cast="hf"`).
    Raises ValueError where the shapes or `cast` do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    if cast not in ("llama", "hf"):
        raise ValueError(f"cast is {cast!r}, expected 'llama' or 'hf'")
    if torch.is_grad_enabled():
        y = _RMSNorm.apply(x, weight, eps)
    else:  # an autograd.Function costs a decoding step as much as the norm itself
        y = _normalise(x, weight, eps)[0]
    return y.to(x.dtype) if cast == "llama" else y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama"
) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its norm: returns (y, new residual), both (..., C)."""
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)}, residual {tuple(residual.shape)}: not equal")
    summed = residual + x
    return rms_norm(summed, weight, eps=eps, cast=cast), summed


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y in the promoted dtype, 1 / rms(x) (..., 1) in at least fp32)."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, scale


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and g = dy * w: dx = (g - n * mean(g * n)) / rms(x), dw = sum(dy * n).

    By hand, because autograd's way through square, mean, rsqrt and two products took 2 to 4
    times as long (2048 x 288 and 4096 x 192, fp32, one thread of a CPU).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, upstream = x * scale, upstream.to(scale.dtype)
        wide_weight = weight.to(scale.dtype)
        both = upstream * normed
        d_weight = both.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        inner = (both @ wide_weight).div_(x.shape[-1]).unsqueeze(-1)
        d_x = (upstream * wide_weight).addcmul_(normed, inner, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_weight, None
