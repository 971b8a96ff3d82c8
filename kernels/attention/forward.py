"""Flash attention forward in Triton, and what forward and backward share: tiles and their place.

One program takes BLOCK_M queries of one head and walks over the keys they see, BLOCK_N at a
time, with a running maximum and sum (online softmax): no T x T matrix is ever held. Tiles begin
where their sequence begins, so a sequence's result has the same bits alone, in a batch or packed.
Source: Dao 2023 (FlashAttention-2); Milakov & Gimelshein 2018.
"""

import torch
from torch import Tensor

from ..backend import INTERPRETED, jit, on_device, registered, tl, triton
from ..backend import cast as to

WIDEST = 128  # head size; a wider tile would not fit the registers
LOG2_E = 1.4426950408889634  # the softmax is taken in powers of two: exp2 is one instruction


@jit
def dot(a, b):
    """a @ b, accumulated in fp32; fp32 operands are not rounded to tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def load_tile(
    X, stride, limit, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """(ROWS, BLOCK_D) from X on, `stride` from row to row; zeros past the head's size and from
    row `limit` on, so that rubbish there (NaN too) stays out."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = rows < limit
    if HEAD != BLOCK_D:
        mask = mask & (columns < HEAD)
    return tl.load(X + rows * stride + columns, mask=mask, other=0.0)


@jit
def store_tile(
    X, x, stride, limit, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    x = to(x, X.dtype.element_ty)
    tl.store(X + rows * stride + columns, x, mask=(rows < limit) & (columns < HEAD))


@jit
def place(
    CUTS, tile, n_tokens, row, n_sequences, PACKED: tl.constexpr, BLOCK: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Where tile number `tile` lies: (start of its sequence, first token of the tile counted
    from there, tokens of the sequence that attend, tokens of the sequence to write).

    Rows: each has cdiv(row, BLOCK) tiles. Packed: sequence i has its tiles from number
    cuts[i] // BLOCK + i on, which leaves room for cdiv(length, BLOCK) of them whatever the cuts;
    tokens past the last cut make one more sequence, which attends to nothing and is written as
    zeros. Whatever the cuts hold, every token lies within its row. Only what counts tokens from
    the start of memory is 64 bits wide: in the loops that costs registers.
    """
    if PACKED:
        found = 0
        for first in range(0, n_sequences + 1, 1024):
            i = first + tl.arange(0, 1024)
            cuts = tl.load(CUTS + i, mask=i <= n_sequences, other=0).to(tl.int64)
            found += tl.sum(((i <= n_sequences) & (cuts // BLOCK + i <= tile)).to(tl.int32), 0)
        sequence = tl.maximum(found - 1, 0)
        cut = tl.load(CUTS + sequence).to(tl.int64)
        start = tl.minimum(tl.maximum(cut, 0), n_tokens)
        following = tl.load(CUTS + tl.minimum(sequence + 1, n_sequences)).to(tl.int64)
        row_end = tl.minimum((start // row + 1) * row, n_tokens)
        length = tl.maximum(tl.minimum(following, row_end) - start, 0).to(tl.int32)
        written = tl.where(sequence == n_sequences, n_tokens - start, length).to(tl.int32)
        local = tile - (start // BLOCK + sequence).to(tl.int32)
        local = tl.where(local < 0, tl.cdiv(written, BLOCK), local)  # found only by wrong cuts
    else:
        tiles = tl.cdiv(row, BLOCK)
        start = (tile // tiles).to(tl.int64) * row
        length, written = row, row
        local = tile % tiles
    if LAST_FIRST:  # the last tile sees most keys: the longest work begins first
        local = tl.cdiv(written, BLOCK) - 1 - local
    return start, local * BLOCK, length, written


@jit
def causal(ahead, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS): key c is seen by query r, the first query being `ahead` of the first key."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return columns - rows <= ahead


@jit(do_not_specialize=["n_tokens", "row", "n_sequences"])
def attention_forward_kernel(
    # pointers
    Q, K, V, CUTS, OUT, LSE,
    # sizes
    n_tokens, row, n_heads, group, n_sequences, scale,
    # strides of a row, a token, a head
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    # compile-time settings
    PACKED: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    q = load_tile(Q, q_token, length - first, HEAD, BLOCK_M, BLOCK_D)
    scale = tl.cast(scale, tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # One loop with a branch holds fewer registers than a loop for the keys that every query of
    # the tile sees and another for the rest: nothing spills.
    for j in range(0, tl.minimum(first + BLOCK_M, length), BLOCK_N):
        left, far = length - j, tl.cast(j, tl.int64)
        k = load_tile(K + far * k_token, k_token, left, HEAD, BLOCK_N, BLOCK_D)
        scores = dot(q, tl.trans(k))
        if j + BLOCK_N > first:
            scores = tl.where(causal(first - j, BLOCK_M, BLOCK_N), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top, total = new_top, total * shrink + tl.sum(p, 1)
        v = load_tile(V + far * v_token, v_token, left, HEAD, BLOCK_N, BLOCK_D)
        acc = acc * shrink[:, None]
        acc += dot(to(p, v.dtype), v)
    if PACKED:  # no keys past the last cut
        top, total = tl.where(length > 0, top, 0.0), tl.where(length > 0, total, 1.0)
    OUT += ((start + first) * n_heads + head) * HEAD
    store_tile(OUT, acc / total[:, None], n_heads * HEAD, written - first, HEAD, BLOCK_M, BLOCK_D)
    rows, lse = tl.arange(0, BLOCK_M), top + tl.log2(total)
    tl.store(LSE + head * n_tokens + start + first + rows, lse, mask=rows < written - first)


def block_d(head_size: int) -> int:
    """Columns of a tile. Raises ValueError past the widest head that fits the registers."""
    if not 1 <= head_size <= WIDEST:
        raise ValueError(f"head size is {head_size}; the triton back end takes 1 to {WIDEST}")
    return max(16, triton.next_power_of_2(head_size))


def forward_tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages). Narrower heads than 128 want no other tiles, and a third
    stage would not fit the shared memory of most GPUs."""
    return (64, 32, 8, 2) if dtype == torch.float32 else (128, 64, 8, 2)


def tiles(x: Tensor, cuts: Tensor | None, block: int) -> int:
    """How many tiles of `block` tokens `place` numbers over x (B, T, ...)."""
    if cuts is None:
        return x.shape[0] * triton.cdiv(x.shape[1], block)
    return x.shape[0] * x.shape[1] // block + cuts.shape[0]


def dense(x: Tensor) -> Tensor:
    """x (B, T, ., D) with the columns of a head next to each other, and tokens so near that a
    tile's offsets fit 32 bits: itself wherever it is so already."""
    return x if x.stride(-1) == 1 and x.stride(1) < 1 << 24 else x.contiguous()


def _forward_fake(q, k, v, cu_seqlens, scale):
    lse = q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@registered(_forward_fake)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), log2 of each query's sum of powers of two (H, B*T) fp32); scale > 0."""
    out, lse = _forward_fake(q, k, v, cu_seqlens, scale)
    if q.numel() == 0:
        return out, lse
    q, k, v = dense(q), dense(k), dense(v)
    batch, row, heads, head_size = q.shape
    block_m, block_n, warps, stages = forward_tile(q.dtype)
    cuts = None if cu_seqlens is None else cu_seqlens.contiguous()
    with on_device(q):
        attention_forward_kernel[(tiles(q, cuts, block_m) * heads,)](
            # pointers
            q, k, v, cuts, out, lse,
            # sizes
            batch * row, row, heads, heads // k.shape[2], 0 if cuts is None else len(cuts) - 1,
            scale * LOG2_E,
            # strides
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            # settings
            PACKED=cuts is not None, HEAD=head_size, BLOCK_D=block_d(head_size), BLOCK_M=block_m,
            BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse
