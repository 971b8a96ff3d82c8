"""Flash attention backward in Triton: the probabilities are made again from q, k and the saved sum.

With p = exp(scale * q.k - logsumexp), delta = sum(dO * O) and ds = p * (dO.v - delta):
dv = p^T dO, dq = scale * ds k, dk = scale * ds^T q. One kernel walks from its queries over their
keys, the other from its keys over the queries of the group's heads: nothing is added atomically,
so the gradients have the same bits on every run.
Source: Dao 2023 (FlashAttention-2), algorithm 2.
"""

import torch
from torch import Tensor

from ..backend import cast as to
from ..backend import jit, on_device, registered, tl
from .forward import (
    LOG2_E,
    block_d,
    causal,
    dense,
    dot,
    load_tile,
    place,
    store_tile,
    tiles,
)


@jit(do_not_specialize=["n_tokens", "row", "n_sequences"])
def attention_backward_q_kernel(
    # pointers
    Q, K, V, CUTS, OUT, LSE, D_OUT, DELTA, D_Q,
    # sizes
    n_tokens, row, n_heads, group, n_sequences, scale, log2_scale,
    # strides of a row, a token, a head
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    d_row, d_token, d_head,
    # compile-time settings
    PACKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_q of BLOCK_M queries of one head, and their delta for the other kernel."""
    tiles = tl.num_programs(0) // n_heads
    head = (tl.program_id(0) // tiles).to(tl.int64)
    start, first, length, written = place(
        CUTS, tl.program_id(0) % tiles, n_tokens, row, n_sequences, PACKED, BLOCK_M, True
    )
    if first < 0 or first >= written:
        return
    b, t = start // row, start % row
    Q += b * q_row + (t + first) * q_token + head * q_head
    K += b * k_row + t * k_token + (head // group) * k_head
    V += b * v_row + t * v_token + (head // group) * v_head
    D_OUT += b * d_row + (t + first) * d_token + head * d_head
    place_out = ((start + first) * n_heads + head) * HEAD
    left = length - first
    d_out = load_tile(D_OUT, d_token, left, HEAD, BLOCK_M, BLOCK_D)
    out = load_tile(OUT + place_out, n_heads * HEAD, left, HEAD, BLOCK_M, BLOCK_D)
    delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    rows = tl.arange(0, BLOCK_M)
    place_row = head * n_tokens + start + first + rows
    tl.store(DELTA + place_row, delta, mask=rows < left)
    lse = tl.load(LSE + place_row, mask=rows < left, other=0.0)
    q = load_tile(Q, q_token, left, HEAD, BLOCK_M, BLOCK_D)
    log2_scale = tl.cast(log2_scale, tl.float32)
    d_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for j in range(0, tl.minimum(first + BLOCK_M, length), BLOCK_N):
        keys, far = length - j, tl.cast(j, tl.int64)
        k = load_tile(K + far * k_token, k_token, keys, HEAD, BLOCK_N, BLOCK_D)
        v = load_tile(V + far * v_token, v_token, keys, HEAD, BLOCK_N, BLOCK_D)
        scores = dot(q, tl.trans(k))
        if j + BLOCK_N > first:
            scores = tl.where(causal(first - j, BLOCK_M, BLOCK_N), scores, float("-inf"))
        p = tl.exp2(scores * log2_scale - lse[:, None])
        d_scores = p * (dot(d_out, tl.trans(v)) - delta[:, None])
        d_q += dot(to(d_scores, k.dtype), k)
    store_tile(
        D_Q + place_out,
        d_q * tl.cast(scale, tl.float32),
        n_heads * HEAD,
        written - first,
        HEAD,
        BLOCK_M,
        BLOCK_D,
    )


@jit(do_not_specialize=["n_tokens", "row", "n_sequences"])
def attention_backward_kv_kernel(
    # pointers
    Q, K, V, CUTS, LSE, D_OUT, DELTA, D_K, D_V,
    # sizes
    n_tokens, row, n_kv_heads, group, n_sequences, scale, log2_scale,
    # strides of a row, a token, a head
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    d_row, d_token, d_head,
    # compile-time settings
    PACKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of BLOCK_N keys of one kv head, over all queries of its `group` heads."""
    tiles = tl.num_programs(0) // n_kv_heads
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    start, first, length, written = place(
        CUTS, tl.program_id(0) % tiles, n_tokens, row, n_sequences, PACKED, BLOCK_N, False
    )
    if first >= written:
        return
    b, t = start // row, start % row
    head = kv_head * group  # the group's first
    Q += b * q_row + (t + first) * q_token + head * q_head
    K += b * k_row + (t + first) * k_token + kv_head * k_head
    V += b * v_row + (t + first) * v_token + kv_head * v_head
    D_OUT += b * d_row + (t + first) * d_token + head * d_head
    LSE += head * n_tokens + start + first
    DELTA += head * n_tokens + start + first
    left = length - first
    k = load_tile(K, k_token, left, HEAD, BLOCK_N, BLOCK_D)
    v = load_tile(V, v_token, left, HEAD, BLOCK_N, BLOCK_D)
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    log2_scale = tl.cast(log2_scale, tl.float32)
    d_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # One loop over the group's heads and the query tiles of each: as loops within loops it held so
    # many addresses that it spilled.
    tiles_each = tl.cdiv(left, BLOCK_M)
    for step in range(0, group * tiles_each):
        i = step % tiles_each * BLOCK_M
        queries = left - i
        member, far = tl.cast(step // tiles_each, tl.int64), tl.cast(i, tl.int64)
        q_tile = Q + member * q_head + far * q_token
        q = load_tile(q_tile, q_token, queries, HEAD, BLOCK_M, BLOCK_D)
        sums = member * n_tokens + far + rows
        lse = tl.load(LSE + sums, mask=rows < queries, other=0.0)
        scores = dot(k, tl.trans(q))
        if i < BLOCK_N:
            scores = tl.where(keys[:, None] - rows[None, :] <= i, scores, float("-inf"))
        p = tl.exp2(scores * log2_scale - lse[None, :])
        d_tile = D_OUT + member * d_head + far * d_token
        d_out = load_tile(d_tile, d_token, queries, HEAD, BLOCK_M, BLOCK_D)
        d_v += dot(to(p, d_out.dtype), d_out)
        delta = tl.load(DELTA + sums, mask=rows < queries, other=0.0)
        d_scores = p * (dot(v, tl.trans(d_out)) - delta[None, :])
        d_k += dot(to(d_scores, q.dtype), q)
    place_out = ((start + first) * n_kv_heads + kv_head) * HEAD
    stride, left = n_kv_heads * HEAD, written - first
    store_tile(
        D_K + place_out, d_k * tl.cast(scale, tl.float32), stride, left, HEAD, BLOCK_N, BLOCK_D
    )
    store_tile(D_V + place_out, d_v, stride, left, HEAD, BLOCK_N, BLOCK_D)


def queries_tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of d_q's kernel: with 64 keys it spills on sm_80."""
    return (32, 32, 8, 2) if dtype == torch.float32 else (64, 32, 4, 2)


def keys_tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of d_k's and d_v's kernel.

    At a head size of 128 both sums are held, 64 registers a thread each, and on sm_80 k and v
    beside them: 8 bytes a thread spill there (with Triton 3.6 on sm_90 too). With 64 queries more
    spills, and everywhere.
    """
    return (16, 32, 8, 2) if dtype == torch.float32 else (32, 64, 4, 2)


def _backward_fake(d_out, q, k, v, out, lse, cu_seqlens, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@registered(_backward_fake)
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq (B, T, H, D), dk and dv (B, T, K, D)) from what `attention_forward` returned."""
    d_q, d_k, d_v = _backward_fake(d_out, q, k, v, out, lse, cu_seqlens, scale)
    if q.numel() == 0:
        return d_q, d_k.zero_(), d_v.zero_()
    d_out, q, k, v = dense(d_out), dense(q), dense(k), dense(v)
    batch, row, heads, head_size = q.shape
    kv_heads = k.shape[2]
    cuts = None if cu_seqlens is None else cu_seqlens.contiguous()
    delta = torch.empty_like(lse)
    sizes = batch * row, row
    more = heads // kv_heads, 0 if cuts is None else len(cuts) - 1, scale, scale * LOG2_E
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3]
    settings = {"PACKED": cuts is not None, "HEAD": head_size, "BLOCK_D": block_d(head_size)}
    with on_device(q):
        block_m, block_n, warps, stages = queries_tile(q.dtype)
        attention_backward_q_kernel[(tiles(q, cuts, block_m) * heads,)](
            # pointers
            q, k, v, cuts, out, lse, d_out, delta, d_q,
            # sizes, strides
            *sizes, heads, *more, *strides,
            # settings
            **settings, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        block_m, block_n, warps, stages = keys_tile(q.dtype)
        attention_backward_kv_kernel[(tiles(q, cuts, block_n) * kv_heads,)](
            # pointers
            q, k, v, cuts, lse, d_out, delta, d_k, d_v,
            # sizes, strides
            *sizes, kv_heads, *more, *strides,
            # settings
            **settings, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return d_q, d_k, d_v
