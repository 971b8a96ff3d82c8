"""Log-probability of given tokens, and the entropy, under a linear head.

    logits[n] = h[n] . W^T / temperature,  logp[n] = log softmax(logits[n])[target[n]]
    entropy[n] = - sum_v p[n, v] log p[n, v]

hidden (N, C), weight (V, C), targets (N,). N x V is never held: rows are done in chunks, and
the backward forms the logits again. This is the boundary between the model and every RLHF
loss, which stay plain PyTorch above it.
"""

import torch
from torch import Tensor

from ..backend import choose
from ..derivatives import first_only
from ..surroundings import product, refuse_transforms
from .cross_entropy import _check_labels, _check_shapes, _chunks, _propagate, flat_labels
from .softmax import linear_softmax


@product(2)
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), both (...,) fp32, of `targets` (...,) given `hidden` (..., C).

    Gradients flow to `hidden` and `weight` from both outputs. Raises ValueError for shapes,
    labels or a temperature that do not fit.
    """
    refuse_transforms()
    _check_shapes(hidden, weight, targets)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, it must be above 0")
    labels = flat_labels(targets)
    _check_labels(labels, weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if choose(hidden) == "triton":
        logprobs, _, entropy, _ = linear_softmax(flat, weight, labels, None, temperature, True)
    else:
        logprobs, entropy = _LogProbs.apply(flat, weight, labels, temperature)
    return logprobs.view(targets.shape), entropy.view(targets.shape)


def _distribution(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, probabilities) of one chunk; on CPUs softmax beats exp of the first."""
    logits = hidden @ weight.T
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, -1), torch.softmax(logits, -1)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(labels), dtype=wide, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for rows in _chunks(len(labels), weight.shape[0]):
            logp, probs = _distribution(hidden[rows], weight, temperature)
            logprobs[rows] = logp.gather(1, labels[rows, None]).squeeze(1)
            entropy[rows] = -probs.mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @first_only
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, labels, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = (
            torch.zeros_like(weight, dtype=entropy.dtype) if ctx.needs_input_grad[1] else None
        )
        for rows in _chunks(len(labels), weight.shape[0]):
            logp, probs = _distribution(hidden[rows], weight, ctx.temperature)
            # d logp_y / d logits = onehot - p;  d entropy / d logits = -p (logp + entropy)
            grad = logp.add_(entropy[rows, None]).mul_(-d_entropy[rows, None])
            grad.sub_(d_logprobs[rows, None]).mul_(probs)
            grad.scatter_add_(1, labels[rows, None], d_logprobs[rows, None].to(grad.dtype))
            _propagate(grad.div_(ctx.temperature), hidden, weight, rows, d_hidden, d_weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None
