"""A head of many rows for one hidden state, and losses and log-probabilities of a head that has to
be called, from its whole logits.

The fused operations never hold the (N, V) logits; a head with a hook or an adapter hands them
over. What is returned and raised is as `ops.linear_cross_entropy` and `ops.linear_logprobs` do.
"""

import torch
from torch import Tensor, nn

from puna.core import ops


def one_row(hidden: Tensor, weight: Tensor) -> Tensor:
    """One hidden state (..., C) times a large head (V, C), block by block: (..., V).

    The BLAS takes one row for a matrix-vector product and reads the weights at a third of the
    memory's speed. 32000 x 288, one thread: 1.7 ms for 4.3.
    """
    blocks = 32
    if weight.shape[0] % blocks or weight.numel() < 1 << 21:  # small ones stay in the caches
        return ops.linear(hidden, weight)
    column = hidden.reshape(1, -1).t().expand(blocks, -1, -1)
    product = torch.bmm(weight.view(blocks, -1, weight.shape[1]), column)
    return product.view(*hidden.shape[:-1], -1)


def cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """Loss of predicting `targets` (...,) int64 from `hidden` (..., C): () or, "none", (...,).

    Rows of weight zero are zeros before the head sees them: they may hold anything. fp32 (fp64
    for fp64). Raises ValueError for shapes, labels or a reduction that do not fit.
    """
    _check(hidden, targets)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(
            f"weights are {tuple(weights.shape)}, targets {tuple(targets.shape)}: not equal"
        )
    scale = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.detach()
    dropped = (targets == ignore_index) | (scale == 0)
    logits = _wide(head(hidden.masked_fill(dropped.unsqueeze(-1), 0.0)))
    scale = scale.to(logits.dtype).masked_fill(dropped, 0.0)
    losses = -_picked(logits.log_softmax(-1), targets.masked_fill(dropped, 0))
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    losses = losses * scale
    if reduction == "none":
        return losses
    total = losses.sum()
    return ops.mean_of(total, scale) if reduction == "mean" else total


def logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), both (...,), of `targets` (...,) int64 given `hidden` (..., C).

    fp32 (fp64 for fp64). Raises ValueError for shapes, labels or a temperature that do not fit.
    """
    _check(hidden, targets)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, it must be above 0")
    logp = (_wide(head(hidden)) / temperature).log_softmax(-1)
    # A hook may forbid tokens: 0 * -inf would be NaN, here and in the gradient.
    entropy = -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)
    return _picked(logp, targets), entropy


def _check(hidden: Tensor, targets: Tensor) -> None:
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} do not fit "
            "(..., C), (...)"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, expected torch.int64")


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _picked(logp: Tensor, targets: Tensor) -> Tensor:
    """logp (..., V) of `targets` (...,): (...,); labels are looked at where that costs no wait."""
    if targets.is_cpu and targets.numel() and not ops.traced():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= logp.shape[-1]:
            raise ValueError(f"targets run from {low} to {high}, the head has {logp.shape[-1]}")
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
