"""The derivatives of what native code computes: one autograd.Function an operation.

Each takes what its `fits` has accepted. A second derivative is refused. Shapes are those of the
functions called here. A backward multiplies what its forward did (`products`).
"""

import functools
from collections.abc import Callable

import torch

from puna.core.native import (
    attention,
    cross_entropy,
    elementwise,
    feed_forward,
    linear,
    logprobs,
)
from puna.core.native.products import products, use_products
from puna.kernels.derivatives import first_only


def same_products(backward: Callable) -> Callable:
    """A backward with the products that were in force in its forward."""

    @functools.wraps(backward)
    def multiplying(ctx, *upstream):
        with use_products(ctx.products):
            return backward(ctx, *upstream)

    return multiplying


class Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.products = products()
        return tuple(linear.linear(x, weight) for weight in weights)

    @staticmethod
    @first_only
    @same_products
    def backward(ctx, *d_ys):
        x, *weights = ctx.saved_tensors
        wants_x, *wanted = ctx.needs_input_grad
        d_weights = (
            linear.weight_gradient(x, d_y) if wants else None
            for wants, d_y in zip(wanted, d_ys, strict=True)
        )
        return linear.input_gradient(weights, d_ys) if wants_x else None, *d_weights


class FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down):
        y, *kept = feed_forward.feed_forward(x, gate, up, down, keep=True)
        ctx.save_for_backward(x, gate, up, down, *kept)
        ctx.products = products()
        return y

    @staticmethod
    @first_only
    @same_products
    def backward(ctx, d_y):
        x, gate, up, down, gates, ups = ctx.saved_tensors
        return feed_forward.gradients(x, gate, up, down, gates, ups, d_y)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = elementwise.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @first_only
    def backward(ctx, d_y):
        x, weight, scale = ctx.saved_tensors
        return *elementwise.rms_norm_gradient(x, weight, scale, d_y), None


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return elementwise.swiglu(gate, up)

    @staticmethod
    @first_only
    def backward(ctx, d_y):
        gate, up = ctx.saved_tensors
        return elementwise.swiglu_gradient(gate, up, d_y)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        # An output that leads to the inputs and holds nothing: it lies where cos does.
        place = cos.untyped_storage(), cos.storage_offset(), (min(1, cos.numel()),)
        token = cos.new_empty(0).set_(*place)
        ctx.save_for_backward(cos, sin, token)
        return *elementwise.rope(q, k, cos, sin), token

    @staticmethod
    @first_only
    def backward(ctx, d_q, d_k, _):
        cos, sin, _ = ctx.saved_tensors
        return *elementwise.rope(d_q, d_k, cos, sin, back=True), None, None


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cuts, scale):
        out, lse = attention.attention(q, k, v, cuts, scale)
        ctx.save_for_backward(q, k, v, cuts, out, lse)
        ctx.products = products()
        ctx.scale = scale
        return out

    @staticmethod
    @first_only
    @same_products
    def backward(ctx, d_out):
        q, k, v, cuts, out, lse = ctx.saved_tensors
        found = attention.attention_gradient(q, k, v, cuts, out, lse, d_out, ctx.scale)
        return *found, None, None


class LossSum(torch.autograd.Function):
    """Gradients are formed in the forward pass, where the logits are."""

    @staticmethod
    def forward(ctx, rows, weight, labels, scale, z_loss, differentiate):
        wanted = [differentiate and needed for needed in ctx.needs_input_grad[:2]]
        total, *gradients = cross_entropy.loss_sum(rows, weight, labels, scale, z_loss, *wanted)
        token = rows.new_empty(0)  # leads to the inputs, and holds none of them
        ctx.save_for_backward(*gradients, token)
        return total, token

    @staticmethod
    @first_only
    def backward(ctx, upstream, _):
        gradients = (None if d is None else d * upstream for d in ctx.saved_tensors[:2])
        return *gradients, None, None, None, None


class LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, labels, temperature):
        found = logprobs.logprobs(rows, weight, labels, temperature)
        ctx.save_for_backward(rows, weight, labels, *found)
        ctx.products = products()
        ctx.temperature = temperature
        return found.logprobs, found.entropy

    @staticmethod
    @first_only
    @same_products
    def backward(ctx, d_logprobs, d_entropy):
        rows, weight, labels, *found = ctx.saved_tensors
        gradients = logprobs.gradient(
            rows, weight, labels, ctx.temperature, logprobs.LogProbs(*found),
            d_logprobs, d_entropy, ctx.needs_input_grad[:2],
        )  # fmt: skip
        return *gradients, None, None
