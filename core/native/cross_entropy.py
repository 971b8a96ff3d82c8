"""`linear_cross_entropy` with the softmax, the loss and its gradient in one native pass.

For fp32 on the CPU, reductions "mean" and "sum"; everything else is the kernels' business. What lay
between the three matrix products (five passes over all logits, a fresh chunk of memory each) is
one pass over a chunk that is used again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from puna.core.native.linear import matmul
from puna.core.native.loader import address, best_instructions, extension, native, readable

# Logits held at once, 32 MB. With less, what is copied of the weights for each chunk counts: 16 MB
# took 1.1 times as long, 64 as long (2048 x 288 by 32000).
CHUNK_ELEMENTS = 1 << 23


def with_loss(
    hidden: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What counts of hidden (..., C): rows (N, C), labels (N,), weights in the sum (N,)."""
    labels = targets.reshape(-1)
    scale = torch.ones(labels.shape) if weights is None else weights.detach().reshape(-1).float()
    scale = scale.masked_fill(labels == ignore_index, 0.0)
    rows = scale.nonzero().squeeze(-1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(rows) < len(flat):
        flat, labels, scale = flat.index_select(0, rows), labels[rows], scale[rows]
    return flat.contiguous(), labels.contiguous(), scale.contiguous()


def fits(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, reduction: str
) -> bool:
    """Whether the native pass can do it. Mistakes do not fit: the kernels explain them."""
    return (
        readable(hidden, weight)
        and targets.is_cpu
        and targets.dtype == torch.int64
        and weight.dim() == 2
        and len(weight) > 0
        and hidden.shape[:-1] == targets.shape
        and hidden.shape[-1] == weight.shape[-1]
        and (weights is None or weights.shape == targets.shape)
        and reduction in ("mean", "sum")
        and extension() is not None
    )


def chunks(rows: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, their logits (n, V)) of rows (N, C); the logits' memory is used again."""
    count, vocabulary = len(rows), len(weight)
    step = max(1, min(CHUNK_ELEMENTS // vocabulary, count))
    held = rows.new_empty(step, vocabulary)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield part, matmul(rows[part], weight.T, held[: part.stop - start])


def loss_sum(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    z_loss: float,
    wants_rows: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weighted sum of the losses, its gradients of rows (N, C) and weight (V, C) if wanted)."""
    count, vocabulary = len(rows), len(weight)
    d_rows = torch.empty_like(rows) if wants_rows else None
    d_weight = torch.zeros_like(weight) if wants_weight and not count else None
    if wants_weight and count:
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    instructions = best_instructions()
    losses = torch.empty(count)
    for part, logits in chunks(rows, weight):
        native().softmax_loss(
            instructions, len(logits), vocabulary, address(logits), address(labels[part]),
            address(scale[part]), z_loss, address(losses[part]), torch.get_num_threads(),
        )  # fmt: skip
        if d_rows is not None:
            matmul(logits, weight, d_rows[part])
        if d_weight is not None:
            matmul(logits.T, rows[part], d_weight, add=part.start > 0)
    return losses @ scale, d_rows, d_weight
