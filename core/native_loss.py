"""`linear_cross_entropy` with the softmax, the loss and its gradient in one native pass.

For fp32 on the CPU, reductions "mean" and "sum"; everything else is the kernels' business. The
three matrix products stay with the BLAS; what lay between them (five passes over all logits, a
fresh chunk of memory each) is one pass over a chunk that is used again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.core.extension import extension

# Logits held at once, 64 MB. The larger the chunk, the better the BLAS: (2048 x 288) by 32000,
# 128 rows at a time took 1.6 times as long as 1024 (the softmax's two threads waiting included).
CHUNK_ELEMENTS = 1 << 24


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    z_loss: float,
) -> Tensor:
    """As `kernels.linear_cross_entropy`, for what `fits`."""
    labels = targets.reshape(-1)
    scale = torch.ones(labels.shape) if weights is None else weights.detach().reshape(-1).float()
    scale = scale.masked_fill(labels == ignore_index, 0.0)
    rows = scale.nonzero().squeeze(-1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(rows) < len(flat):
        flat, labels, scale = flat.index_select(0, rows), labels[rows], scale[rows]
    total = _Summed.apply(
        flat.contiguous(), weight, labels.contiguous(), scale, z_loss, torch.is_grad_enabled()
    )
    return total / scale.sum().clamp_min(1e-30) if reduction == "mean" else total


def fits(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, reduction: str
) -> bool:
    """Whether the native pass can do it. Mistakes do not fit: the kernels explain them."""
    return (
        hidden.device.type == weight.device.type == targets.device.type == "cpu"
        and hidden.dtype == weight.dtype == torch.float32
        and targets.dtype == torch.int64
        and weight.dim() == 2
        and len(weight) > 0
        and hidden.shape[:-1] == targets.shape
        and hidden.shape[-1] == weight.shape[-1]
        and (weights is None or weights.shape == targets.shape)
        and reduction in ("mean", "sum")
        and extension() is not None
    )


class _Summed(torch.autograd.Function):
    """Weighted sum of the losses; gradients are formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, z_loss, differentiate):
        wants_hidden, wants_weight = (differentiate and w for w in ctx.needs_input_grad[:2])
        count, vocabulary = len(hidden), len(weight)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight and not count else None
        if wants_weight and count:
            d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        native = extension()
        assert native is not None
        instructions = native.instruction_sets()[0]
        losses = torch.empty(count)
        step = max(1, min(CHUNK_ELEMENTS // vocabulary, count))
        held = torch.empty(step, vocabulary)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            logits = torch.mm(hidden[part], weight.T, out=held[: part.stop - start])
            native.softmax_loss(
                instructions, len(logits), vocabulary, logits.data_ptr(), labels[part].data_ptr(),
                scale[part].data_ptr(), z_loss, losses[part].data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[part])
            if d_weight is not None:
                torch.addmm(d_weight, logits.T, hidden[part], beta=1 if start else 0, out=d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        return losses @ scale

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        d_hidden, d_weight = (None if d is None else d * upstream for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None
