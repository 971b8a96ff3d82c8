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
from torch.autograd.function import once_differentiable

from .backend import cast as to
from .backend import choose, debug, jit, on_device, registered, tl, triton
from .linear_softmax import LinearSoftmax, add_product, kept, near, slices, softmax_gradients

CHUNK_ELEMENTS = 1 << 23  # logits held at once: 32 MB in fp32
CHUNK_BYTES = 192 << 20  # logits held at once by the Triton back end


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
    fp32 result (fp64 for fp64 inputs). Raises ValueError for shapes or labels that do not fit.
    """
    _check_shapes(hidden, weight, targets)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = torch.ones_like(labels, dtype=wide)
    if weights is not None:
        if weights.shape != targets.shape:
            raise ValueError(
                f"weights are {tuple(weights.shape)}, targets {tuple(targets.shape)}: not equal"
            )
        scale = weights.detach().reshape(-1).to(wide)
    scale = scale.masked_fill(labels == ignore_index, 0.0)
    if choose(hidden) == "triton":
        return _triton(flat, weight, labels, scale, reduction, z_loss).view(
            targets.shape if reduction == "none" else ()
        )
    rows = scale.nonzero().squeeze(-1)
    few, labels, scale = flat.index_select(0, rows), labels[rows], scale[rows]
    _check_labels(labels, weight)
    if reduction == "none":
        losses = _PerToken.apply(few, weight, labels, z_loss) * scale
        return losses.new_zeros(targets.numel()).index_copy(0, rows, losses).view(targets.shape)
    total = _Summed.apply(few, weight, labels, scale, z_loss, torch.is_grad_enabled())
    return total / scale.sum().clamp_min(torch.finfo(wide).tiny) if reduction == "mean" else total


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit (..., C), (V, C), (...)"
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
    if seen and not torch.compiler.is_compiling() and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"targets run from {low} to {high}, the head has {weight.shape[0]} rows"
            )


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
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
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
    @once_differentiable
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


@jit
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


def _triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, reduction: str, z_loss: float
) -> Tensor:
    """(N,) or (); `scale` is zero where a row has no loss."""
    found = scale.nonzero().squeeze(-1)
    _check_labels(labels[found], weight)
    # Under torch.compile the number of rows is unknown, and so is whether it is all of them.
    everything = not torch.compiler.is_compiling() and len(found) == len(scale)
    rows = None if everything else found
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if reduction == "none" or not learns or hidden.dtype == torch.float16:
        logp, lse, _ = LinearSoftmax.apply(hidden, weight, labels, rows, 1.0, False)
        losses = (z_loss * lse.square() - logp if z_loss else -logp) * scale
        if reduction == "none":
            return losses
        total = losses.sum()
    else:
        total = _TritonSummed.apply(hidden, weight, labels, scale, rows, z_loss)
    tiny = torch.finfo(torch.float32).tiny
    return total / scale.sum().clamp_min(tiny) if reduction == "mean" else total


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
        which = slice(start, stop) if rows is None else rows[start:stop]
        few = hidden[which] if rows is None else hidden.index_select(0, which)
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
        if wants_hidden and rows is None:
            torch.mm(logits, weight, out=d_hidden[which])
        elif wants_hidden:
            d_hidden.index_copy_(0, which, logits @ weight)
        if wants_weight:
            add_product(summed, logits[:, :first].T, few, start == 0)
    if halved:
        del held, logits
        d_weight[:first] = summed.to(weight.dtype)  # a copy before it lands where it came from
        factors = scale * (1 + 2 * z_loss * (stats[0] + stats[1].log())), None, -scale
        few = near(kept(hidden, rows))
        softmax_gradients(few, weight, labels, stats, factors, 1.0, first, None, d_weight)
    return losses.sum(), d_hidden, d_weight


class _TritonSummed(torch.autograd.Function):
    """The weighted sum of the losses; gradients are formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, rows, z_loss):
        wants = ctx.needs_input_grad[:2]
        total, *grads = linear_cross_entropy_summed(
            hidden, weight, labels, scale, rows, z_loss, *wants
        )
        ctx.z_loss, ctx.formed = z_loss, None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*grads)
        else:
            # Not saved: the backward scales them in place and gives them away, so that a second
            # copy of dW is never held. Should there be a second backward, they are formed again.
            ctx.formed = grads
            ctx.save_for_backward(hidden, weight, labels, scale, rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        wants = ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling():
            grads = [(grad * upstream).to(grad.dtype) for grad in ctx.saved_tensors]
        else:
            grads, ctx.formed = ctx.formed, None
            if grads is None:
                _, *grads = linear_cross_entropy_summed(*ctx.saved_tensors, ctx.z_loss, *wants)
            for grad in grads:
                _scale(grad, upstream)
        asked = (grad if want else None for grad, want in zip(grads, wants, strict=True))
        return *asked, None, None, None, None


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
