"""Cross-entropy of a linear head, without ever holding all N x V logits.

    loss[n] = w[n] * (logsumexp_v(h[n] . W[v]) - h[n] . W[target[n]] + z_loss * logsumexp^2)

hidden (N, C), weight (V, C), targets (N,). Rows without loss are dropped before the product.
The rest is done a chunk of rows at a time: the chunk's logits are formed, reduced and
thrown away. With a scalar reduction the gradients are formed in the forward pass (three
matrix products in all); with "none" the backward forms the logits again (four).

On a GPU, which rows have a loss is asked once a call (`nonzero` waits for the device): the price
of not multiplying the others. Triton's "none", evaluation, and fp16, whose gradients could
overflow before the upstream gradient has scaled them, go through `linear_softmax`.
"""

import torch
from torch import Tensor

from ..backend import choose, debug, visible
from ..checks import check_device, check_number
from ..derivatives import first_only, opaque
from ..surroundings import product, valueless
from .cross_entropy_sum import summed_cross_entropy
from .softmax import linear_softmax

CHUNK_ELEMENTS = 1 << 23  # logits held at once: 32 MB in fp32


@product(2)
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
    """Loss of predicting `targets` (...,) from `hidden` (..., C) with head `weight` (V, C).

    `weights` (...,) scales each token's loss; zero and `ignore_index` drop it. "mean" divides
    by the sum of the weights (0 if all are dropped), "sum" does not, "none" returns (...,).
    The weights are constants: no gradient flows to them.
    fp32 result (fp64 for fp64 inputs). Raises ValueError for shapes, labels or a `z_loss` that do
    not fit, and for a "mean" over weights whose sum is negative (where it costs no wait; elsewhere
    it is NaN).
    """
    _check_shapes(hidden, weight, targets)
    check_number("z_loss", z_loss)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), flat_labels(targets)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = torch.ones_like(labels, dtype=wide)
    if weights is not None:
        if weights.shape != targets.shape:
            raise ValueError(
                f"weights are {tuple(weights.shape)}, targets {tuple(targets.shape)}: not equal"
            )
        check_device("weights", weights, hidden.device)
        scale = weights.detach().reshape(-1).contiguous().to(wide)
    scale = scale.masked_fill(labels == ignore_index, 0.0)
    if choose(hidden, weight) == "triton":
        return _triton(flat, weight, labels, scale, reduction, z_loss).view(
            targets.shape if reduction == "none" else ()
        )
    loss = linear_cross_entropy_reference(flat, weight, labels, scale, reduction, z_loss)
    return loss.view(targets.shape) if reduction == "none" else loss


def flat_labels(targets: Tensor) -> Tensor:
    """targets (...,) as (N,), next to each other: kernels read them there, and `reshape` alone
    keeps the stride of a column or of one label for all."""
    return targets.reshape(-1).contiguous()


def mean_of(total: Tensor, scale: Tensor) -> Tensor:
    """total / the sum of the weights `scale` (N,), 0 where nothing counts.

    Raises ValueError for a negative sum where the CPU can see it; elsewhere that gives NaN.
    """
    weight = scale.sum()
    if visible(weight) and weight < 0:
        raise ValueError(
            f"the weights' sum is {float(weight)}: a mean needs one of at least 0; take the sum"
        )
    return total / weight.clamp_min(torch.finfo(scale.dtype).tiny).where(weight >= 0, torch.nan)


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if (
        hidden.dim() == 0
        or weight.dim() != 2
        or hidden.shape[:-1] != targets.shape
        or hidden.shape[-1] != weight.shape[1]
        or weight.shape[1] == 0
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit (..., C), (V, C), (...), C at least 1"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, expected torch.int64")
    if len(weight) == 0:
        raise ValueError("weight has no rows, expected one for each token of the vocabulary")
    for name, other in (("weight", weight), ("targets", targets)):
        if other.device != hidden.device:
            raise ValueError(f"{name} is on {other.device}, hidden on {hidden.device}: not equal")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}: not the same dtype")


def _check_labels(labels: Tensor, weight: Tensor) -> None:
    seen = labels.device.type == "cpu" or debug()  # elsewhere it would wait for the device
    if seen and not torch.compiler.is_compiling() and not valueless(labels) and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"targets run from {low} to {high}, the head has {weight.shape[0]} rows"
            )


def _no_loss(flat, weight, labels, scale, reduction, z_loss):
    return scale.new_empty(scale.shape if reduction == "none" else ())


@opaque(_no_loss)
def linear_cross_entropy_reference(
    flat: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, reduction: str, z_loss: float
) -> Tensor:
    """The loss of rows `flat` (N, C), of which those with a weight in `scale` (N,) are kept."""
    rows = scale.nonzero().squeeze(-1)
    few, labels, scale = flat.index_select(0, rows), labels[rows], scale[rows]
    _check_labels(labels, weight)
    if reduction == "none":
        losses = _PerToken.apply(few, weight, labels, z_loss) * scale
        return losses.new_zeros(len(flat)).index_copy(0, rows, losses)
    total, _ = _Summed.apply(few, weight, labels, scale, z_loss, torch.is_grad_enabled())
    return total if reduction == "sum" else mean_of(total, scale)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float):
    """(losses, probs, logsumexp) of one chunk, in at least fp32.

    The logsumexp is read off the softmax: its largest probability is 1 / sum(exp(l - max l)).
    On CPUs torch's softmax is several times faster than its exp and logsumexp.
    """
    logits = hidden @ weight.T
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    probs = torch.softmax(logits, -1)
    norm = logits.amax(-1) - probs.amax(-1).log()
    losses = norm - logits.gather(1, labels[:, None]).squeeze(1)
    return losses + z_loss * norm.square() if z_loss else losses, probs, norm


def _chunk_grad(probs: Tensor, norm: Tensor, labels: Tensor, upstream: Tensor, z_loss: float):
    """d loss / d logits, written over `probs`."""
    if z_loss:
        probs.mul_((1 + 2 * z_loss * norm)[:, None])
    probs.scatter_add_(1, labels[:, None], probs.new_full((len(labels), 1), -1.0))
    return probs.mul_(upstream[:, None])


class _Summed(torch.autograd.Function):
    """Weighted sum of the losses; gradients are formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, z_loss, differentiate):
        wants = [differentiate and needed for needed in ctx.needs_input_grad[:2]]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=scale.dtype) if wants[1] else None
        total = scale.new_zeros(())
        for rows in _chunks(len(labels), weight.shape[0]):
            losses, probs, norm = _chunk_loss(hidden[rows], weight, labels[rows], z_loss)
            total += losses @ scale[rows]
            if any(wants):
                grad = _chunk_grad(probs, norm, labels[rows], scale[rows], z_loss)
                _propagate(grad, hidden, weight, rows, d_hidden, d_weight)
        token = total.new_empty(0)  # leads to the inputs, and holds none of them
        ctx.save_for_backward(d_hidden, d_weight, token)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total, token

    @staticmethod
    @first_only
    def backward(ctx, upstream, _):
        grads = zip(ctx.saved_tensors[:2], ctx.dtypes, strict=True)
        d_hidden, d_weight = (
            None if grad is None else (grad.to(upstream.dtype) * upstream).to(dtype)
            for grad, dtype in grads
        )
        return d_hidden, d_weight, None, None, None, None


class _PerToken(torch.autograd.Function):
    """One loss a row, right under any upstream gradient: the backward forms logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.z_loss = z_loss
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        out = torch.empty(len(labels), dtype=wide, device=hidden.device)
        for rows in _chunks(len(labels), weight.shape[0]):
            out[rows] = _chunk_loss(hidden[rows], weight, labels[rows], z_loss)[0]
        return out

    @staticmethod
    @first_only
    def backward(ctx, upstream):
        hidden, weight, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = (
            torch.zeros_like(weight, dtype=upstream.dtype) if ctx.needs_input_grad[1] else None
        )
        for rows in _chunks(len(labels), weight.shape[0]):
            _, probs, norm = _chunk_loss(hidden[rows], weight, labels[rows], ctx.z_loss)
            grad = _chunk_grad(probs, norm, labels[rows], upstream[rows], ctx.z_loss)
            _propagate(grad, hidden, weight, rows, d_hidden, d_weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _propagate(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: slice,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """From one chunk's d loss / d logits: fill `d_hidden[rows]`, add to `d_weight`.

    The weight's gradient is summed over chunks in fp32 whatever the operands are.
    """
    grad = grad.to(hidden.dtype)
    if d_hidden is not None:
        d_hidden[rows] = grad @ weight
    if d_weight is None:
        return
    if grad.dtype == d_weight.dtype:
        d_weight.addmm_(grad.T, hidden[rows])
    else:
        d_weight += grad.T @ hidden[rows]


# Triton


def _triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, reduction: str, z_loss: float
) -> Tensor:
    """(N,) or (); `scale` is zero where a row has no loss."""
    compiling = torch.compiler.is_compiling()
    rows = None  # all of them, as far as shapes tell
    if compiling or not valueless(scale):
        rows = scale.nonzero().squeeze(-1)
        _check_labels(labels[rows], weight)
        # Under torch.compile their number is unknown, and so is whether it is all of them.
        if not compiling and len(rows) == len(scale):
            rows = None
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if reduction == "none" or not learns or hidden.dtype == torch.float16:
        logp, lse, _, _ = linear_softmax(hidden, weight, labels, rows, 1.0, False)
        losses = (z_loss * lse.square() - logp if z_loss else -logp) * scale
        if reduction == "none":
            return losses
        total = losses.sum()
    else:
        wants = hidden.requires_grad, weight.requires_grad
        total, *_ = summed_cross_entropy(hidden, weight, labels, scale, rows, z_loss, *wants)
    return mean_of(total, scale) if reduction == "mean" else total
