"""The core of the two linear losses: softmax statistics of a linear head's logits, in Triton.

    z[n] = h[n] . W^T / temperature
    lse[n] = log sum_v exp z[n, v],  logp[n] = z[n, label[n]] - lse[n]
    entropy[n] = lse[n] - sum_v p[n, v] z[n, v],  p[n, v] = exp(z[n, v] - lse[n])

hidden (N, C), weight (V, C), labels (N,). Forward: tiles of z are reduced as they are formed
(online softmax) to one partial result for each of a fixed number of pieces of the vocabulary,
and a second kernel joins the pieces: N x V is never held, and a row's result depends bitwise on
nothing but the row. Backward, with any upstream gradients:

    d z = p * (a - b * (z - lse)) + c at the label,
    a = d_lse - d_logp - d_entropy * entropy,  b = d_entropy,  c = d_logp

a slice of the vocabulary at a time: d z of the slice is formed from z computed again, and two
products give the slice of dW, and what the slice adds to d_hidden, which is summed in fp32.

Source: Milakov & Gimelshein 2018 (online softmax); Wijmans et al. 2024 (losses without logits).
"""

import math

import torch
from torch import Tensor

from ..backend import INTERPRETED, jit, on_device, registered, tl, triton
from ..backend import cast as to
from ..derivatives import differentiable
from .tiles import add_product, kept, near, slices, tiles

SLICE_BYTES = 96 << 20  # d z held at once in the backward
SPLIT = 4  # tiles of the vocabulary that one program of the forward reduces
GROUP = 8  # tiles of rows that share a tile of weights in the cache
# The logit of a column that is not there. Finite: 0 * (LOWEST - max) must be 0.
LOWEST = tl.constexpr(-1e38) if triton else None


@jit
def logits_tile(
    h_rows, w_rows, width,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h . W^T in fp32 for rows at pointers `h_rows` (BLOCK_M,) and `w_rows` (BLOCK_N,)."""
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            h = tl.load(h_rows[:, None] + k[None, :])
            w = tl.load(w_rows[None, :] + k[:, None])
        else:
            h = tl.load(h_rows[:, None] + k[None, :], mask=(k < width)[None, :], other=0.0)
            w = tl.load(w_rows[None, :] + k[:, None], mask=(k < width)[:, None], other=0.0)
        if INTERPRETED:
            h, w = h.to(tl.float32), w.to(tl.float32)
        logits = tl.dot(h, w, logits, input_precision="ieee")
    return logits


@jit
def tile_of_program(row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): programs that run together share GROUP tiles of rows."""
    program = tl.program_id(0)
    each = GROUP * column_tiles
    first = (program // each) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + (program % each) % size, (program % each) // size


@jit(do_not_specialize=["n_rows", "plane"])
def linear_softmax_forward_kernel(
    # pointers
    HIDDEN, WEIGHT, LABELS, ROWS, PARTS,
    # sizes
    n_rows, width, vocabulary, n_splits, inverse_temperature,
    # strides
    hidden_stride, weight_stride, plane,
    # compile-time settings
    GATHER: tl.constexpr, ENTROPY: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes (max, sum of exp, logit of the label, sum of exp * (z - max)) of one piece of the
    vocabulary for BLOCK_M rows: PARTS (4, n_splits, n_rows)."""
    row_tile, split = tile_of_program(tl.cdiv(n_rows, BLOCK_M), n_splits, GROUP)
    place = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Past the end: the last row again, instead of a mask in the inner loop.
    rows = tl.minimum(place, n_rows - 1)
    if GATHER:
        rows = tl.load(ROWS + rows)
    labels = tl.load(LABELS + rows).to(tl.int32)  # 64-bit comparisons of a tile would spill
    h_rows = HIDDEN + rows * hidden_stride
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.zeros((BLOCK_M,), tl.float32)
    first = split * SPLIT * BLOCK_N
    for start in range(first, tl.minimum(first + SPLIT * BLOCK_N, vocabulary), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        w_rows = WEIGHT + tl.minimum(columns, vocabulary - 1).to(tl.int64) * weight_stride
        z = logits_tile(h_rows, w_rows, width, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
        z = tl.where((columns < vocabulary)[None, :], z * inverse_temperature, LOWEST)
        target += tl.sum(tl.where(columns[None, :] == labels[:, None], z, 0.0), 1)
        new = tl.maximum(largest, tl.max(z, 1))
        z -= new[:, None]
        exp = tl.exp(z)
        shrink = tl.exp(largest - new)
        if ENTROPY:
            weighted = shrink * (weighted + total * (largest - new)) + tl.sum(exp * z, 1)
        total = shrink * total + tl.sum(exp, 1)
        largest = new
    inside = place < n_rows
    out = PARTS + split.to(tl.int64) * n_rows + place
    tl.store(out, largest, mask=inside)
    tl.store(out + plane, total, mask=inside)
    tl.store(out + plane + plane, target, mask=inside)
    if ENTROPY:
        tl.store(out + plane + plane + plane, weighted, mask=inside)


@jit(do_not_specialize=["n_rows", "plane", "stats_plane"])
def linear_softmax_join_kernel(
    # pointers
    PARTS, LABELS, ROWS, LOGP, LSE, ENTROPY_OUT, STATS,
    # sizes
    n_rows, vocabulary, n_splits, plane, log_vocabulary, stats_plane,
    # compile-time settings
    GATHER: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pieces of each row, always in the same order, to its log-prob, logsumexp, entropy."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n_rows
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    part = PARTS + place
    for _ in range(n_splits):
        their_largest = tl.load(part, mask=inside, other=0.0)
        new = tl.maximum(largest, their_largest)
        shrink, theirs = tl.exp(largest - new), tl.exp(their_largest - new)
        their_total = tl.load(part + plane, mask=inside, other=1.0)
        target += tl.load(part + plane + plane, mask=inside, other=0.0)
        if ENTROPY:
            w = tl.load(part + plane + plane + plane, mask=inside, other=0.0)
            weighted = shrink * (weighted + total * (largest - new))
            weighted += theirs * (w + their_total * (their_largest - new))
        total = shrink * total + theirs * their_total
        largest = new
        part += n_rows
    rows = place
    if GATHER:
        rows = tl.load(ROWS + place, mask=inside, other=0)
    labels = tl.load(LABELS + rows, mask=inside, other=0)
    log_total = tl.log(total)
    # In this order: next to `largest` the logarithm would be rounded away. And rounding must not
    # make a log-prob positive, or an entropy leave its bounds.
    logp = target - largest - log_total
    logp = tl.where(logp > 0.0, 0.0, logp)
    logp = tl.where((labels >= 0) & (labels < vocabulary), logp, float("nan"))
    tl.store(LOGP + rows, logp, mask=inside)
    tl.store(LSE + rows, largest + log_total, mask=inside)
    tl.store(STATS + rows, largest, mask=inside)
    tl.store(STATS + stats_plane + rows, total, mask=inside)
    if ENTROPY:
        entropy = log_total - weighted / total
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        entropy = tl.where(entropy > log_vocabulary, log_vocabulary, entropy)
        tl.store(ENTROPY_OUT + rows, entropy, mask=inside)


@jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["TOTAL"])
def linear_softmax_backward_kernel(
    # pointers
    HIDDEN, WEIGHT, LABELS, LARGEST, TOTAL, A, B, C, D_LOGITS,
    # sizes: columns first..last of the vocabulary
    n_rows, width, vocabulary, first, last, inverse_temperature,
    # strides of a row
    hidden_stride, weight_stride, d_stride,
    # compile-time settings
    ENTROPY: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D_LOGITS (n_rows, last - first): the gradient of h . W^T, temperature included."""
    row_tile, column_tile = tile_of_program(
        tl.cdiv(n_rows, BLOCK_M), tl.cdiv(last - first, BLOCK_N), GROUP
    )
    place = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(place, n_rows - 1)
    columns = first + column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = WEIGHT + tl.minimum(columns, last - 1).to(tl.int64) * weight_stride
    h_rows = HIDDEN + rows * hidden_stride
    z = logits_tile(h_rows, w_rows, width, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    z = z * inverse_temperature - tl.load(LARGEST + rows)[:, None]
    total = tl.load(TOTAL + rows)
    labels = tl.load(LABELS + rows)
    a = tl.load(A + rows) * inverse_temperature
    a = tl.where((labels >= 0) & (labels < vocabulary), a, float("nan"))
    c = tl.load(C + rows) * inverse_temperature
    if ENTROPY:
        b = tl.load(B + rows) * inverse_temperature
        a += b * tl.log(total)
        d_z = tl.exp(z) * ((a / total)[:, None] - (b / total)[:, None] * z)
    else:
        d_z = tl.exp(z) * (a / total)[:, None]
    d_z += tl.where(columns[None, :] == labels.to(tl.int32)[:, None], c[:, None], 0.0)
    d_z = to(d_z, D_LOGITS.dtype.element_ty)
    out = D_LOGITS + place[:, None] * d_stride + (columns - first)[None, :]
    tl.store(out, d_z, mask=(place < n_rows)[:, None] & (columns < last)[None, :])


def _forward_fake(hidden, weight, labels, rows, temperature, entropy):
    n_rows = len(hidden)
    shapes = (n_rows,), (n_rows,), (n_rows if entropy else 0,), (2, n_rows)
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


@registered(_forward_fake)
def linear_softmax_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp (N,), lse (N,), entropy (N,) or nothing, statistics for the backward (2, N)), fp32.

    The statistics are the largest logit and sum exp(z - largest). `rows` (K,) are the rows to
    look at (None: all); what is returned for the others is 0.
    """
    outs = _forward_fake(hidden, weight, labels, rows, temperature, entropy)
    if rows is not None:
        outs = tuple(out.zero_() for out in outs)
    n_rows, vocabulary = len(hidden) if rows is None else len(rows), len(weight)
    if n_rows == 0:
        return outs
    hidden, weight, settings = near(hidden), near(weight), tiles(hidden)
    n_splits = triton.cdiv(vocabulary, SPLIT * settings["BLOCK_N"])
    programs = triton.cdiv(n_rows, settings["BLOCK_M"]) * n_splits
    parts = torch.empty(4, n_splits, n_rows, dtype=torch.float32, device=hidden.device)
    places = labels if rows is None else rows
    with on_device(hidden):
        linear_softmax_forward_kernel[(programs,)](
            # pointers
            hidden, weight, labels, places, parts,
            # sizes
            n_rows, hidden.shape[1], vocabulary, n_splits, 1 / temperature,
            # strides
            hidden.stride(0), weight.stride(0), n_splits * n_rows,
            # settings
            GATHER=rows is not None, ENTROPY=entropy,
            EVEN=hidden.shape[1] % settings["BLOCK_K"] == 0, SPLIT=SPLIT, GROUP=GROUP, **settings,
        )  # fmt: skip
        linear_softmax_join_kernel[(triton.cdiv(n_rows, 128),)](
            # pointers
            parts, labels, places, *outs,
            # sizes
            n_rows, vocabulary, n_splits, n_splits * n_rows, math.log(vocabulary), len(labels),
            # settings
            GATHER=rows is not None, ENTROPY=entropy, BLOCK=128, num_warps=4,
        )  # fmt: skip
    return outs


def softmax_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    stats: Tensor,
    factors: tuple[Tensor, Tensor | None, Tensor],
    temperature: float,
    first: int,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """The backward over columns `first` and on of the vocabulary; d_weight's rows from there on,
    and d_hidden (N, C), are written. `factors` are a, b (or None) and c of this file's head."""
    a, b, c = factors
    settings = tiles(hidden)
    n_rows, width = hidden.shape
    cuts = slices(len(weight) - first, n_rows * hidden.element_size(), SLICE_BYTES, 256)
    if n_rows == 0 or not cuts:
        return
    padded = -(-cuts[0][1] // 64) * 64
    held = torch.empty(n_rows, padded, dtype=hidden.dtype, device=hidden.device)
    for start, stop in cuts:
        d_logits = held[:, : stop - start]
        row_tiles = triton.cdiv(n_rows, settings["BLOCK_M"])
        with on_device(hidden):
            linear_softmax_backward_kernel[
                (row_tiles * triton.cdiv(stop - start, settings["BLOCK_N"]),)
            ](
                # pointers
                hidden, weight, labels, *stats, a, a if b is None else b, c, d_logits,
                # sizes
                n_rows, width, len(weight), first + start, first + stop, 1 / temperature,
                # strides
                hidden.stride(0), weight.stride(0), padded,
                # settings
                ENTROPY=b is not None, EVEN=width % settings["BLOCK_K"] == 0, GROUP=GROUP,
                **settings,
            )  # fmt: skip
        if d_weight is not None:
            torch.mm(d_logits.T, hidden, out=d_weight[first + start : first + stop])
        if d_hidden is not None:
            add_product(d_hidden, d_logits, weight[first + start : first + stop], start == 0)


def _backward_fake(
    hidden, weight, labels, rows, stats, a, b, c, temperature, wants_hidden, wants_weight
):
    d_hidden = hidden.new_empty(hidden.shape if wants_hidden else (0,))
    return d_hidden, weight.new_empty(weight.shape if wants_weight else (0,))


@registered(_backward_fake)
def linear_softmax_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    temperature: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(d_hidden (N, C), d_weight (V, C)), empty where not wanted; a, b, c are (N,)."""
    d_hidden, d_weight = _backward_fake(
        hidden, weight, labels, rows, stats, a, b, c, temperature, wants_hidden, wants_weight
    )
    n_rows = len(hidden) if rows is None else len(rows)
    if n_rows == 0:
        return d_hidden.zero_(), d_weight.zero_()
    few, labels = near(kept(hidden, rows)), kept(labels, rows)
    stats = stats if rows is None else stats.index_select(1, rows)
    a, c = kept(a, rows).contiguous(), kept(c, rows).contiguous()
    b = None if b is None else kept(b, rows).contiguous()
    # Slices add up in fp32: d_hidden itself will do only if it is that, and has no gaps.
    summed = d_hidden
    if wants_hidden and (rows is not None or d_hidden.dtype != torch.float32):
        summed = torch.empty(few.shape, dtype=torch.float32, device=few.device)
    softmax_gradients(
        few, near(weight), labels, stats, (a, b, c), temperature, 0,
        summed if wants_hidden else None, d_weight if wants_weight else None,
    )  # fmt: skip
    if summed is not d_hidden:
        if rows is None:
            d_hidden.copy_(summed)
        else:
            d_hidden.zero_().index_copy_(0, rows, summed.to(d_hidden.dtype))
    return d_hidden, d_weight


def _save(ctx, inputs, output):
    hidden, weight, labels, rows, temperature, _ = inputs
    _, _, entropy, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.temperature = temperature
    ctx.save_for_backward(hidden, weight, labels, rows, entropy, stats)


def _backward(ctx, d_logp, d_lse, d_entropy, _):
    hidden, weight, labels, rows, entropy, stats = ctx.saved_tensors
    c = torch.zeros_like(stats[0]) if d_logp is None else d_logp
    a = -c if d_lse is None else d_lse - c
    b = d_entropy if entropy.numel() else None
    if b is not None:
        a = a - b * entropy
    wants = ctx.needs_input_grad[:2]
    grads = linear_softmax_backward(
        hidden, weight, labels, rows, stats, a, b, c, ctx.temperature, *wants
    )
    asked = (grad if want else None for grad, want in zip(grads, wants, strict=True))
    return *asked, None, None, None, None


# (logp, lse, entropy or nothing, statistics): the first three right under any upstream gradients.
linear_softmax = differentiable(linear_softmax_forward, _save, _backward)
