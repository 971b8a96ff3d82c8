"""Causal self-attention with grouped queries, over rows or packed sequences.

    out[t] = sum over s <= t of softmax_s(scale * q[t] . k[s]) v[s]

q is (B, T, H, D); k and v are (B, T, K, D), each key/value head serving H/K query heads.
`cu_seqlens` (S+1,) int32 cuts the flattened B*T tokens into sequences that never span rows;
attention never crosses a cut.
Source: Vaswani et al. 2017; Ainslie et al. 2023 (GQA); Llama 2 paper, section 2.2 and A.2.1.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention: (B, T, H, D) from q (B, T, H, D), k and v (B, T, K, D).

    `scale` defaults to D^-1/2. Raises ValueError for head counts that do not divide, shapes
    that differ, or cuts that do not cover B*T row by row.
    """
    _check(q, k, v)
    if cu_seqlens is None:
        return _rows(q, k, v, scale)
    cuts, tokens = cu_seqlens.tolist(), q.shape[0] * q.shape[1]
    _check_cuts(cuts, q.shape[0], q.shape[1])
    if tokens == 0:
        return _rows(q, k, v, scale)
    flat_q, flat_k, flat_v = (x.reshape(tokens, *x.shape[2:]) for x in (q, k, v))
    return _segments(flat_q, flat_k, flat_v, cuts, scale).view(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"expected q (B, T, H, D) and k, v (B, T, K, D), got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")


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


def _rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


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
