"""Log-probability of given tokens, and the entropy, under a linear head.

    logits[n] = h[n] . W^T / temperature,  logp[n] = log softmax(logits[n])[target[n]]
    entropy[n] = - sum_v p[n, v] log p[n, v]

hidden (N, C), weight (V, C), targets (N,). N x V is never held: rows are done in chunks, and
the backward forms the logits again. This is the boundary between the model and every RLHF
loss, which stay plain PyTorch above it.
"""

import torch
from torch import Tensor

from ..backend import choose, registered
from ..checks import check_number
from ..derivatives import differentiable
from ..sample import COLDEST, HOTTEST
from ..surroundings import product, refuse_transforms
from .cross_entropy import _check_labels, _check_shapes, _chunks, _propagate, flat_labels
from .softmax import linear_softmax


@product(2)
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), both (...,), of `targets` (...,) given `hidden` (..., C).

    fp32 results (fp64 for fp64 inputs). Gradients flow to `hidden` and `weight` from both outputs.
    Raises ValueError for shapes, labels or a temperature (1e-30 to 1e30) that do not fit.
    """
    refuse_transforms(hidden, weight, targets)
    _check_shapes(hidden, weight, targets)
    check_number("temperature", temperature, COLDEST, HOTTEST)
    labels = flat_labels(targets)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if choose(hidden, weight) == "triton":
        _check_labels(labels, weight)
        logprobs, _, entropy, _ = linear_softmax(flat, weight, labels, None, temperature, True)
    else:
        logprobs, entropy = _reference(flat, weight, labels, float(temperature))
    return logprobs.view(targets.shape), entropy.view(targets.shape)


def _distribution(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, probabilities) of one chunk; on CPUs softmax beats exp of the first."""
    logits = hidden @ weight.T
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, -1), torch.softmax(logits, -1)


def _fake(hidden, weight, labels, temperature):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    made = hidden.new_empty(len(hidden), dtype=wide)
    return made, made.new_empty(made.shape)


@registered(_fake)
def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), both (N,), of rows `hidden` (N, C)."""
    _check_labels(labels, weight)
    logprobs, entropy = _fake(hidden, weight, labels, temperature)
    for rows in _chunks(len(labels), weight.shape[0]):
        logp, probs = _distribution(hidden[rows], weight, temperature)
        logprobs[rows] = logp.gather(1, labels[rows, None]).squeeze(1)
        entropy[rows] = -probs.mul_(logp).sum(-1)
    return logprobs, entropy


def _backward_fake(
    hidden, weight, labels, entropy, d_logprobs, d_entropy, temperature, wants_hidden, wants_weight
):
    d_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    return d_hidden, weight.new_empty(weight.shape if wants_weight else (0,))


@registered(_backward_fake)
def linear_logprobs_reference_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor,
    temperature: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(d_hidden (N, C), d_weight (V, C)), empty where not wanted."""
    d_hidden = torch.empty_like(hidden) if wants_hidden else None
    d_weight = torch.zeros_like(weight, dtype=entropy.dtype) if wants_weight else None
    for rows in _chunks(len(labels), weight.shape[0]):
        logp, probs = _distribution(hidden[rows], weight, temperature)
        # d logp_y / d logits = onehot - p;  d entropy / d logits = -p (logp + entropy)
        grad = logp.add_(entropy[rows, None]).mul_(-d_entropy[rows, None])
        grad.sub_(d_logprobs[rows, None]).mul_(probs)
        grad.scatter_add_(1, labels[rows, None], d_logprobs[rows, None].to(grad.dtype))
        _propagate(grad.div_(temperature), hidden, weight, rows, d_hidden, d_weight)
    return (
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight.to(weight.dtype),
    )


def _save(ctx, inputs, output):
    hidden, weight, labels, ctx.temperature = inputs
    ctx.save_for_backward(hidden, weight, labels, output[1])


def _backward(ctx, d_logprobs, d_entropy):
    wants = ctx.needs_input_grad[:2]
    grads = linear_logprobs_reference_backward(
        *ctx.saved_tensors, d_logprobs, d_entropy, ctx.temperature, *wants
    )
    return *(grad if want else None for grad, want in zip(grads, wants, strict=True)), None, None


_reference = differentiable(linear_logprobs_reference, _save, _backward)
