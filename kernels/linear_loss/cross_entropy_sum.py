"""The weighted sum of a linear head's cross-entropies with its gradients at once, in Triton.

hidden (N, C), weight (V, C), labels (N,), scale (N,): each row's weight in the sum. A chunk of
rows at a time: one product gives the chunk's logits, one kernel turns them in place into the
losses and d loss / d logits, two products give d_hidden's rows and what the chunk adds to dW.
"""

import torch
from torch import Tensor

from ..backend import cast as to
from ..backend import jit, on_device, registered, tl, traced, triton
from ..derivatives import differentiable
from .softmax import softmax_gradients
from .tiles import add_product, kept, near, slices

CHUNK_BYTES = 192 << 20  # logits held at once


@jit(do_not_specialize_on_alignment=["LABELS", "SCALE", "TOTAL"])  # one number a row
def cross_entropy_kernel(
    # pointers
    LOGITS, LABELS, SCALE, LOSS, LARGEST, TOTAL,
    # sizes
    vocabulary, padded, z_loss,
    # compile-time settings
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's loss and the two parts of its logsumexp; its gradient is written over its logits.

    Rows are `padded` columns apart, so that every load is aligned; the padding holds anything.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * padded
    label, scale = tl.load(LABELS + row), tl.load(SCALE + row)
    largest = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < padded, other=0.0).to(tl.float32)
        target += tl.where(columns == label, z, 0.0)
        z = tl.where(columns < vocabulary, z, -float("inf"))
        new = tl.maximum(largest, z)
        total = total * tl.exp(largest - new) + tl.exp(z - new)
        largest = new
    top = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - top), 0)
    lse = top + tl.log(total)
    loss = tl.log(total) - (tl.sum(target, 0) - top)
    loss = tl.where(loss < 0.0, 0.0, loss)  # only by rounding
    loss = tl.where((label >= 0) & (label < vocabulary), loss, float("nan"))
    tl.store(LOSS + row, (loss + z_loss * lse * lse) * scale)
    tl.store(LARGEST + row, top)
    tl.store(TOTAL + row, total)
    a = scale * (1.0 + 2.0 * z_loss * lse) + 0.0 * loss  # a label outside is NaN here too
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < padded, other=0.0).to(tl.float32)
        d_z = tl.exp(z - top) * (a / total) - tl.where(columns == label, scale, 0.0)
        tl.store(logits + columns, to(d_z, LOGITS.dtype.element_ty), mask=columns < padded)


@jit
def scale_kernel(
    # pointers
    X, FACTOR,
    # sizes
    size,
    # compile-time settings
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x *= factor, in place; nothing is read or written where the factor is 1."""
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + place, mask=place < size).to(tl.float32)
        tl.store(X + place, to(x * factor, X.dtype.element_ty), mask=place < size)


def _summed_fake(hidden, weight, labels, scale, rows, z_loss, wants_hidden, wants_weight):
    d_hidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    d_weight = weight.new_empty(weight.shape if wants_weight else (0,))
    return scale.new_empty(()), d_hidden, d_weight


@registered(_summed_fake)
def linear_cross_entropy_summed(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    z_loss: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum of the losses () fp32, d_hidden (N, C), d_weight (V, C)), empty if unwanted.

    dW is summed over the chunks in fp32. That would take twice the memory of a 16-bit gradient;
    so while there are several chunks, half of its rows are summed in all of its memory, and the
    other half is formed afterwards, a slice of the vocabulary at a time over all rows, from
    logits computed again: half a product more, and no memory.
    """
    _, d_hidden, d_weight = _summed_fake(
        hidden, weight, labels, scale, rows, z_loss, wants_hidden, wants_weight
    )
    vocabulary, width = weight.shape
    n_rows = len(hidden) if rows is None else len(rows)
    if rows is not None:
        d_hidden.zero_()
    if n_rows == 0:
        return scale.new_zeros(()), d_hidden.zero_(), d_weight.zero_()
    weight, labels, scale = near(weight), kept(labels, rows), kept(scale, rows).contiguous()
    losses = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
    stats = torch.empty(2, n_rows, dtype=torch.float32, device=hidden.device)
    padded = -(-vocabulary // 64) * 64
    chunks = slices(n_rows, padded * hidden.element_size(), CHUNK_BYTES, 128)
    held = torch.empty(chunks[0][1], padded, dtype=hidden.dtype, device=hidden.device)
    halved = wants_weight and len(chunks) > 1 and weight.dtype != torch.float32
    first, summed = vocabulary, d_weight
    if halved:
        first = vocabulary // 2
        summed = d_weight.view(-1)[: 2 * first * width].view(torch.float32).view(first, width)
    for start, stop in chunks:
        some = None if rows is None else rows[start:stop]
        few = hidden[start:stop] if some is None else hidden.index_select(0, some)
        logits = held[: stop - start, :vocabulary]
        torch.mm(few, weight.T, out=logits)
        with on_device(hidden):
            cross_entropy_kernel[(stop - start,)](
                # pointers
                logits, labels[start:stop], scale[start:stop], losses[start:stop],
                stats[0, start:stop], stats[1, start:stop],
                # sizes
                vocabulary, padded, z_loss,
                # settings
                BLOCK=min(4096, triton.next_power_of_2(vocabulary)), num_warps=8,
            )  # fmt: skip
        if wants_hidden and some is None:
            torch.mm(logits, weight, out=d_hidden[start:stop])
        elif wants_hidden:
            d_hidden.index_copy_(0, some, logits @ weight)
        if wants_weight:
            add_product(summed, logits[:, :first].T, few, start == 0)
    if halved:
        del held, logits
        d_weight[:first] = summed.to(weight.dtype)  # a copy before it lands where it came from
        factors = scale * (1 + 2 * z_loss * (stats[0] + stats[1].log())), None, -scale
        few = near(kept(hidden, rows))
        softmax_gradients(few, weight, labels, stats, factors, 1.0, first, None, d_weight)
    return losses.sum(), d_hidden, d_weight


def _save(ctx, inputs, output):
    hidden, weight, labels, scale, rows, z_loss, *wants = inputs
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.settings = z_loss, *wants
    ctx.traced = traced()
    if ctx.traced:
        ctx.save_for_backward(*grads)
    else:
        # Not saved: the backward scales them in place and gives them away, so that a second
        # copy of dW is never held. Should there be a second backward, they are formed again.
        ctx.formed = grads
        ctx.save_for_backward(hidden, weight, labels, scale, rows)


def _backward(ctx, upstream, *_):
    if ctx.traced:
        grads = [(grad.float() * upstream).to(grad.dtype) for grad in ctx.saved_tensors]
    else:
        grads, ctx.formed = ctx.formed, None
        if grads is None:
            _, *grads = linear_cross_entropy_summed(*ctx.saved_tensors, *ctx.settings)
        for grad in grads:
            _scale(grad, upstream)
    asked = (grad if want else None for grad, want in zip(grads, ctx.settings[1:], strict=True))
    return *asked, None, None, None, None, None, None


# (sum, and two gradients that are for the backward alone)
summed_cross_entropy = differentiable(linear_cross_entropy_summed, _save, _backward)


def _scale(x: Tensor, factor: Tensor) -> None:
    if x.numel():
        with on_device(x):
            scale_kernel[(triton.cdiv(x.numel(), 4096),)](
                # pointers
                x, factor,
                # sizes
                x.numel(),
                # settings
                BLOCK=4096, num_warps=8,
            )  # fmt: skip
