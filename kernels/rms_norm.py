"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

`x` is (..., C), `weight` is (C,). Statistics are fp32 whatever the dtype of `x`.
Casting order: "llama" (Meta's code) casts the normalised value back before the weight is
applied; "hf" does the same but returns the promoted dtype of weight and input, so an fp32
weight gives an fp32 result.
Source: Zhang & Sennrich 2019; Llama 2 paper, section 2.2.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama") -> Tensor:
    """Normalise the last dimension of `x` (..., C) and scale by `weight` (C,).

    Returns (..., C) in x's dtype (`cast="llama"`) or the promoted dtype (`cast="hf"`).
    Raises ValueError where the shapes or `cast` do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    if cast not in ("llama", "hf"):
        raise ValueError(f"cast is {cast!r}, expected 'llama' or 'hf'")
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * scale).to(x.dtype)
    y = normed * weight
    return y.to(x.dtype) if cast == "llama" else y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama"
) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its norm: returns (y, new residual), both (..., C)."""
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)}, residual {tuple(residual.shape)}: not equal")
    summed = residual + x
    return rms_norm(summed, weight, eps=eps, cast=cast), summed
