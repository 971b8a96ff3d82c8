"""The operations as the engine uses them: what `kernels` offers, under one import.

The native back end, `puna.core._C`, is added here: for fp32 on the CPU it comes first, and what it
differentiates is in `native.autograd`. `use_products` lets it multiply such tensors as bf16.
"""

import torch
from torch import Tensor

from puna import kernels
from puna.core.native import attention as native_attention
from puna.core.native import autograd
from puna.core.native import cross_entropy as native_loss
from puna.core.native import elementwise as native_elementwise
from puna.core.native import feed_forward as native_feed_forward
from puna.core.native import linear as native_linear
from puna.core.native import logprobs as native_logprobs
from puna.core.native.products import multiplies_bf16 as multiplies_bf16
from puna.core.native.products import products as products
from puna.core.native.products import use_products as use_products
from puna.kernels import backend
from puna.kernels import decode_attention as decode_attention
from puna.kernels import gae as gae
from puna.kernels import rope_tables as rope_tables
from puna.kernels import sample as sample
from puna.kernels.attention.forward import WIDEST
from puna.kernels.backend import debug as debug
from puna.kernels.backend import forced as forced
from puna.kernels.backend import traced as traced
from puna.kernels.linear_loss.cross_entropy import flat_labels as flat_labels
from puna.kernels.linear_loss.cross_entropy import mean_of as mean_of
from puna.kernels.sample import NoDistribution as NoDistribution
from puna.kernels.sample import check_settings as check_settings
from puna.kernels.sample import mix64 as mix64
from puna.kernels.surroundings import transformed as transformed


class use_backend(backend.use_backend):
    """`kernels.use_backend`, which also takes "native": the operations and the generation of
    `puna.core._C`. That is forced until `kernels.use_backend` names another in between.

    Raises ValueError for an unknown name.
    """

    names = backend.BACKENDS | {"native"}


def _native() -> bool:
    # Traced tensors (torch.compile, fake ones) and a transform's have no memory to hand to the
    # extension, and autocast asks for other products than fp32's.
    if forced() not in ("auto", "native") or traced():
        return False
    return not (transformed() or torch.is_autocast_enabled("cpu"))


def _differentiated(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def waits(head_dim: int, *weights: Tensor) -> bool:
    """Whether a step of decoding with these weights waits for its device: the references look at
    values."""
    return backend.choose(*weights) != "triton" or head_dim > WIDEST


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) times the transpose of weight (O, I): (..., O). Native for fp32 on the CPU."""
    return linears(x, weight)[0]


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`linear` of the same x (..., I) by several weights (O, I).

    Their gradients of x are summed while they are formed: apart, PyTorch adds them afterwards.
    """
    if not (_native() and all(native_linear.fits(x, weight) for weight in weights)):
        return tuple(torch.nn.functional.linear(x, weight) for weight in weights)
    if _differentiated(x, *weights):
        return autograd.Linears.apply(x, *weights)
    return tuple(native_linear.linear(x, weight) for weight in weights)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) (..., C) of x (..., C), gate and up (F, C), down (C, F)."""
    if not (_native() and native_feed_forward.fits(x, gate, up, down)):
        return linear(swiglu(linear(x, gate), linear(x, up)), down)
    if _differentiated(x, gate, up, down):
        return autograd.FeedForward.apply(x, gate, up, down)
    return native_feed_forward.feed_forward(x, gate, up, down, keep=False)[0]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama") -> Tensor:
    """`kernels.rms_norm`, or the native one for fp32 on the CPU."""
    if not (_native() and native_elementwise.fits_rms_norm(x, weight, cast)):
        return kernels.rms_norm(x, weight, eps=eps, cast=cast)
    if _differentiated(x, weight):
        return autograd.RMSNorm.apply(x, weight, eps)
    return native_elementwise.rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama"
) -> tuple[Tensor, Tensor]:
    """`kernels.add_rms_norm`, or a sum and the native norm for fp32 on the CPU."""
    if not (_native() and native_elementwise.fits_rms_norm(x, weight, cast)):
        return kernels.add_rms_norm(x, residual, weight, eps=eps, cast=cast)
    summed = residual + x
    return rms_norm(summed, weight, eps=eps, cast=cast), summed


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`kernels.swiglu`, or the native one for fp32 on the CPU."""
    if not (_native() and native_elementwise.fits_swiglu(gate, up)):
        return kernels.swiglu(gate, up)
    if _differentiated(gate, up):
        return autograd.SwiGLU.apply(gate, up)
    return native_elementwise.swiglu(gate, up)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`kernels.rope`, or the native one for fp32 on the CPU, half-split, without positions."""
    if not (_native() and native_elementwise.fits_rope(q, k, cos, sin, positions, interleaved)):
        return kernels.rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    if _differentiated(q, k):
        return autograd.Rope.apply(q, k, cos, sin)[:2]
    return native_elementwise.rope(q, k, cos, sin)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`kernels.attention`, or the native one for fp32 on the CPU."""
    if not (_native() and native_attention.fits(q, k, v, cu_seqlens, scale)):
        return kernels.attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale)
    cuts = native_attention.cuts(q, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if _differentiated(q, k, v):
        return autograd.Attention.apply(q, k, v, cuts, scale)
    return native_attention.attention(q, k, v, cuts, scale)[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """`kernels.linear_cross_entropy`, or the native one for fp32 on the CPU, "mean" and "sum"."""
    if not (_native() and native_loss.fits(hidden, weight, targets, weights, reduction)):
        return kernels.linear_cross_entropy(
            hidden, weight, targets, weights=weights, ignore_index=ignore_index,
            reduction=reduction, z_loss=z_loss,
        )  # fmt: skip
    rows, labels, scale = native_loss.with_loss(hidden, targets, weights, ignore_index)
    learns = _differentiated(hidden, weight)
    total, _ = autograd.LossSum.apply(rows, weight, labels, scale, z_loss, learns)
    return mean_of(total, scale) if reduction == "mean" else total


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_logprobs`, or the native one for fp32 on the CPU."""
    if not (_native() and native_logprobs.fits(hidden, weight, targets, temperature)):
        return kernels.linear_logprobs(hidden, weight, targets, temperature=temperature)
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), flat_labels(targets)
    if _differentiated(hidden, weight):
        found = autograd.LogProbs.apply(rows, weight, labels, float(temperature))
    else:
        found = native_logprobs.logprobs(rows, weight, labels, float(temperature))[:2]
    return found[0].view(targets.shape), found[1].view(targets.shape)
