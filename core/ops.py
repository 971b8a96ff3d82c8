"""The operations as the engine uses them: what `kernels` offers, under one import.

`use_backend` also takes "native" here: the operations and the generation of `puna.core._C`.
"""

import torch
from torch import Tensor

from puna import kernels
from puna.core.native import attention as native_attention
from puna.core.native import cross_entropy as native_loss
from puna.core.native import elementwise as native_elementwise
from puna.core.native import feed_forward as native_feed_forward
from puna.core.native import linear as native_linear
from puna.core.native import logprobs as native_logprobs
from puna.kernels import add_rms_norm as add_rms_norm
from puna.kernels import decode_attention as decode_attention
from puna.kernels import gae as gae
from puna.kernels import rope_tables as rope_tables
from puna.kernels import sample as sample
from puna.kernels import use_backend as use_backend
from puna.kernels.backend import BACKENDS, first_only
from puna.kernels.backend import forced as forced
from puna.kernels.backend import traced as traced
from puna.kernels.sample import mix64 as mix64

BACKENDS.add("native")


def _native() -> bool:
    # Traced tensors (torch.compile, fake ones) have no memory to hand to the extension.
    return forced() in ("auto", "native") and not traced()


def _differentiated(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


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
        return _Linears.apply(x, *weights)
    return tuple(native_linear.linear(x, weight) for weight in weights)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return tuple(native_linear.linear(x, weight) for weight in weights)

    @staticmethod
    @first_only
    def backward(ctx, *d_ys):
        x, *weights = ctx.saved_tensors
        wants_x, *wanted = ctx.needs_input_grad
        d_weights = (
            native_linear.weight_gradient(x, d_y) if wants else None
            for wants, d_y in zip(wanted, d_ys, strict=True)
        )
        return native_linear.input_gradient(weights, d_ys) if wants_x else None, *d_weights


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) (..., C) of x (..., C), gate and up (F, C), down (C, F)."""
    if not (_native() and native_feed_forward.fits(x, gate, up, down)):
        return linear(swiglu(linear(x, gate), linear(x, up)), down)
    if _differentiated(x, gate, up, down):
        return _FeedForward.apply(x, gate, up, down)
    return native_feed_forward.feed_forward(x, gate, up, down, keep=False)[0]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down):
        y, *kept = native_feed_forward.feed_forward(x, gate, up, down, keep=True)
        ctx.save_for_backward(x, gate, up, down, *kept)
        return y

    @staticmethod
    @first_only
    def backward(ctx, d_y):
        x, gate, up, down, gates, ups = ctx.saved_tensors
        return native_feed_forward.gradients(x, gate, up, down, gates, ups, d_y)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama") -> Tensor:
    """`kernels.rms_norm`, or the native one for fp32 on the CPU."""
    if not (_native() and native_elementwise.fits_rms_norm(x, weight, cast)):
        return kernels.rms_norm(x, weight, eps=eps, cast=cast)
    if _differentiated(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return native_elementwise.rms_norm(x, weight, eps)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = native_elementwise.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @first_only
    def backward(ctx, d_y):
        x, weight, scale = ctx.saved_tensors
        return *native_elementwise.rms_norm_gradient(x, weight, scale, d_y), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`kernels.swiglu`, or the native one for fp32 on the CPU."""
    if not (_native() and native_elementwise.fits_swiglu(gate, up)):
        return kernels.swiglu(gate, up)
    if _differentiated(gate, up):
        return _SwiGLU.apply(gate, up)
    return native_elementwise.swiglu(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return native_elementwise.swiglu(gate, up)

    @staticmethod
    @first_only
    def backward(ctx, d_y):
        gate, up = ctx.saved_tensors
        return native_elementwise.swiglu_gradient(gate, up, d_y)


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
        return _Rope.apply(q, k, cos, sin)
    return native_elementwise.rope(q, k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return native_elementwise.rope(q, k, cos, sin)

    @staticmethod
    @first_only
    def backward(ctx, d_q, d_k):
        cos, sin = ctx.saved_tensors
        return *native_elementwise.rope(d_q, d_k, cos, sin, back=True), None, None


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
        return _Attention.apply(q, k, v, cuts, scale)
    return native_attention.attention(q, k, v, cuts, scale)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cuts, scale):
        out, lse = native_attention.attention(q, k, v, cuts, scale)
        ctx.save_for_backward(q, k, v, cuts, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @first_only
    def backward(ctx, d_out):
        q, k, v, cuts, out, lse = ctx.saved_tensors
        found = native_attention.attention_gradient(q, k, v, cuts, out, lse, d_out, ctx.scale)
        return *found, None, None


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
    total = _LossSum.apply(rows, weight, labels, scale, z_loss, _differentiated(hidden, weight))
    return total / scale.sum().clamp_min(1e-30) if reduction == "mean" else total


class _LossSum(torch.autograd.Function):
    """Gradients are formed in the forward pass, where the logits are."""

    @staticmethod
    def forward(ctx, rows, weight, labels, scale, z_loss, differentiate):
        wanted = [differentiate and needed for needed in ctx.needs_input_grad[:2]]
        total, *gradients = native_loss.loss_sum(rows, weight, labels, scale, z_loss, *wanted)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @first_only
    def backward(ctx, upstream):
        gradients = (None if d is None else d * upstream for d in ctx.saved_tensors)
        return *gradients, None, None, None, None


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`kernels.linear_logprobs`, or the native one for fp32 on the CPU."""
    if not (_native() and native_logprobs.fits(hidden, weight, targets, temperature)):
        return kernels.linear_logprobs(hidden, weight, targets, temperature=temperature)
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if _differentiated(hidden, weight):
        found = _LogProbs.apply(rows, weight, labels, float(temperature))
    else:
        found = native_logprobs.logprobs(rows, weight, labels, float(temperature))[:2]
    return found[0].view(targets.shape), found[1].view(targets.shape)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, labels, temperature):
        found = native_logprobs.logprobs(rows, weight, labels, temperature)
        ctx.save_for_backward(rows, weight, labels, *found)
        ctx.temperature = temperature
        return found.logprobs, found.entropy

    @staticmethod
    @first_only
    def backward(ctx, d_logprobs, d_entropy):
        rows, weight, labels, *found = ctx.saved_tensors
        gradients = native_logprobs.gradient(
            rows, weight, labels, ctx.temperature, native_logprobs.LogProbs(*found),
            d_logprobs, d_entropy, ctx.needs_input_grad[:2],
        )  # fmt: skip
        return *gradients, None, None
