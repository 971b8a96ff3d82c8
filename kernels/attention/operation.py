"""Causal self-attention with grouped queries, over rows or packed sequences.

    out[t] = sum over s <= t of softmax_s(scale * q[t] . k[s]) v[s]

q is (B, T, H, D); k and v are (B, T, K, D), each key/value head serving H/K query heads.
`cu_seqlens` (S+1,) int32 cuts the flattened B*T tokens into sequences that never span rows;
attention never crosses a cut. The Triton kernels are in `forward` and `backward`
beside this file.
Source: Vaswani et al. 2017; Ainslie et al. 2023 (GQA); Llama 2 paper, section 2.2 and A.2.1.
"""

from contextlib import nullcontext
from importlib import import_module

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..backend import choose, forced, visible
from ..checks import check_device, check_number
from ..derivatives import differentiable, once, opaque
from ..surroundings import product, refuse_transforms, transformed
from .backward import attention_backward
from .forward import WIDEST, attention_forward

TINY = torch.finfo(torch.float32).tiny


@product(3)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention: (B, T, H, D) from q (B, T, H, D), k and v (B, T, K, D).

    `scale` defaults to D^-1/2. On a GPU the cuts are read there, without a wait; tokens past the
    last cut come out as zeros. Triton takes heads of up to 128; its gradients are deterministic
    always: nothing is added atomically.
    Raises ValueError for head counts that do not divide, shapes, dtypes or devices that differ, a
    scale that is no number, or cuts that do not cover B*T row by row (Triton: in plain eager calls
    with the cuts on the CPU, or with PUNA_DEBUG=1).
    """
    _check(q, k, v, cu_seqlens)
    if scale is not None:
        check_number("scale", scale)
    if forced() == "flash_attn":
        refuse_transforms(q, k, v)
        q, k, v = once(q, k, v)
        return _flash_attn(q, k, v, cu_seqlens, scale)
    size = q.shape[3]
    wide = f"the head size is {size}: it takes up to {WIDEST}" if size > WIDEST else None
    if choose(q, k, v, unless=wide) == "triton":
        return _triton(q, k, v, cu_seqlens, scale)
    q, k, v = once(q, k, v)
    if cu_seqlens is None:
        return _rows(q, k, v, scale)
    return attention_packed_reference(q, k, v, cu_seqlens, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"expected q (B, T, H, D) and k, v (B, T, K, D), got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[3] == 0:
        raise ValueError("the head size is 0: it must be at least 1")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: not the same dtype")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v are on {q.device}, {k.device} and {v.device}: not the same device"
        )
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, expected (S+1,) of int32"
        )
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu":
        check_device("cu_seqlens", cu_seqlens, q.device)


def _check_cuts(cuts: list[int], batch: int, row: int) -> None:
    if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != batch * row:
        raise ValueError(
            f"cu_seqlens must run from 0 to {batch * row} (B*T), got {cuts[:1]}..{cuts[-1:]}"
        )
    if any(a > b for a, b in zip(cuts, cuts[1:], strict=False)):
        raise ValueError("cu_seqlens must not fall")
    missing = set(range(0, batch * row, row)).difference(cuts) if row else ()
    if missing:
        raise ValueError(
            f"a sequence spans rows: cu_seqlens has no cut at {min(missing)}, where a row of "
            f"{row} tokens begins"
        )


# Triton, flash-attn


def _on_device(q: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """The cuts where q is; checked where that costs no wait, or where a wait is asked for."""
    if cu_seqlens is None:
        return None
    if len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has {len(cu_seqlens)} cuts, expected at least 2")
    if visible(cu_seqlens):
        _check_cuts(cu_seqlens.tolist(), q.shape[0], q.shape[1])
    if cu_seqlens.device == q.device:
        return cu_seqlens
    # Pinned memory is read later, when the caller may have filled it anew: a copy in plain memory,
    # which is read at once, and without a wait.
    return cu_seqlens.clone().to(q.device, non_blocking=True)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float | None
) -> Tensor:
    q, scale = _upward(q, q.shape[3] ** -0.5 if scale is None else float(scale))
    return _launch(q, k, v, _on_device(q, cu_seqlens), scale)[0]


def _upward(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores by a scale above 0: kernels scale the largest score, not the smallest, and
    what they hide, which is -inf, times a scale that is 0 in fp32 would be NaN."""
    if scale >= TINY:
        return q, scale
    return (-q, -scale) if scale <= -TINY else (q * 0, 1.0)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out, _):
    gradients = attention_backward(d_out, *ctx.saved_tensors, ctx.scale)
    return *gradients, None, None


_launch = differentiable(attention_forward, _save, _backward)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float | None
) -> Tensor:
    but = "the flash_attn back end is forced, but"
    if not q.is_cuda:
        raise ValueError(f"{but} the tensors are on {q.device}: move them to a GPU")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{but} their dtype is {q.dtype}: use float16 or bfloat16")
    if q.shape[3] > 256:
        raise ValueError(f"{but} the head size is {q.shape[3]}: it takes up to 256")
    try:
        flash_attn = import_module("flash_attn")
    except ImportError as error:
        raise ValueError(f"{but} the package flash_attn cannot be imported: {error}") from error
    if scale is not None:
        q, scale = _upward(q, float(scale))
    cuts = _on_device(q, cu_seqlens)
    if cuts is None:
        return flash_attn.flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    cuts = cuts.to(torch.int32)
    # No sequence is longer than a row: the exact maximum would have to be waited for.
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = flash_attn.flash_attn_varlen_func(
        *flat, cuts, cuts, q.shape[1], q.shape[1], softmax_scale=scale, causal=True
    )
    return out.view(q.shape)


# Reference


@opaque(lambda q, k, v, cu_seqlens, scale: q.new_empty(q.shape))
def attention_packed_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None
) -> Tensor:
    """`attention` within the cuts, which have to be read."""
    cuts, tokens = cu_seqlens.tolist(), q.shape[0] * q.shape[1]
    _check_cuts(cuts, q.shape[0], q.shape[1])
    if tokens == 0:
        return _rows(q, k, v, scale)
    flat_q, flat_k, flat_v = (x.reshape(tokens, *x.shape[2:]) for x in (q, k, v))
    return _segments(flat_q, flat_k, flat_v, cuts, scale).reshape(q.shape)


def _rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210 - Dynamo's is a symbol
    if scale is not None and scale < TINY:  # PyTorch's kernels hide the future before they scale
        q, scale = q * scale, 1.0
    # Under a transform by plain products: PyTorch's own kernels have no rule for all of them.
    with sdpa_kernel(SDPBackend.MATH) if transformed(q, k, v) else nullcontext():
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=scale,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2).contiguous()  # most of PyTorch's kernels lay it out so


def _segments(q: Tensor, k: Tensor, v: Tensor, cuts: list[int], scale: float | None) -> Tensor:
    """Attention inside each cut of flat q (N, H, D), k and v (N, K, D).

    Sequences of similar length (same power of two) are padded on the right and run as one
    batch: under a causal mask right padding changes no real token. This costs at most twice
    the tokens, where one mask over the row would cost T^2 for 20-token sequences.
    """
    buckets: dict[int, list[int]] = {}
    for s in range(len(cuts) - 1):
        length = cuts[s + 1] - cuts[s]
        if length:
            buckets.setdefault(length.bit_length(), []).append(s)
    if len(buckets) == 1 and len({b - a for a, b in zip(cuts, cuts[1:], strict=False)}) == 1:
        count = len(cuts) - 1  # equal lengths: a view, nothing to gather
        q, k, v = (x.view(count, -1, *x.shape[1:]) for x in (q, k, v))
        return _rows(q, k, v, scale)
    bounds = torch.tensor(cuts)
    order, outputs = [], []
    for members in buckets.values():
        starts, ends = bounds[members], bounds[[s + 1 for s in members]]
        steps = torch.arange(int((ends - starts).max()))
        source = torch.minimum(starts[:, None] + steps, ends[:, None] - 1)
        slots = (starts[:, None] + steps < ends[:, None]).flatten().nonzero().squeeze(1)
        tokens = source.flatten()[slots]
        source, slots, tokens = (index.to(q.device) for index in (source, slots, tokens))
        rows_q, rows_k, rows_v = (_Pad.apply(x, source, slots, tokens) for x in (q, k, v))
        outputs.append(_Unpad.apply(_rows(rows_q, rows_k, rows_v, scale), slots))
        order.append(tokens)
    inverse = torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
    inverse[torch.cat(order)] = torch.arange(q.shape[0], device=q.device)
    return torch.cat(outputs).index_select(0, inverse)


class _Pad(torch.autograd.Function):
    """x (N, ...) at `source` (S, L): the tokens of each sequence, its last one repeated.

    `slots` are the places in the flattened (S, L) that hold `tokens` for the first time; only
    from there do gradients come back. Each token is used once, so the backward is a gather too
    (autograd's own would be an atomic scatter-add).
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(slots, tokens)
        ctx.rows = x.shape[0]
        return x.index_select(0, source.flatten()).view(*source.shape, *x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        slots, tokens = ctx.saved_tensors
        out = grad.new_zeros(ctx.rows, *grad.shape[2:])
        out.index_copy_(0, tokens, grad.flatten(0, 1).index_select(0, slots))
        return out, None, None, None


class _Unpad(torch.autograd.Function):
    """The real tokens of (S, L, ...), at `slots`, as (N', ...); the backward pads with zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        out.view(-1, *grad.shape[1:]).index_copy_(0, slots, grad)
        return out, None
