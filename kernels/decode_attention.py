"""Attention of the newest queries over a key/value cache.

q is (B, Q, H, D) with Q = 1 or a few; the caches are (B, T, K, D). Row b sees its first
`lengths[b]` cache entries, the last Q of which belong to the queries themselves, causally.

In Triton the cache is cut into splits of SPLIT entries, so that one row's cache is read by many
multiprocessors at once; a second kernel weighs the splits' results by their sums. The cuts are
always at the same places, so a row's result depends neither on its batch nor on the room that
the cache has left.
Source: Dao et al. 2023 (Flash-Decoding); Llama 2 paper, section 2.2 (grouped queries).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention.forward import LOG2_E, WIDEST, block_d, dense, dot, load_tile
from .backend import cast as to
from .backend import choose, jit, on_device, registered, tl, triton, visible
from .checks import check_number
from .derivatives import once, opaque
from .surroundings import product

SPLIT = 256  # cache entries of one program


@product(3)
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend from q (B, Q, H, D) to caches (B, T, K, D) up to `lengths` (B,) int64.

    Returns (B, Q, H, D). What lies past a row's length has no effect, whatever it is. Raises
    ValueError for shapes, dtypes, devices or a scale that do not fit, and for lengths that do not:
    in Triton in plain eager calls on the CPU, or with PUNA_DEBUG=1, because a GPU is not waited
    for; otherwise nothing outside the cache is read, and a query that is left without entries
    gives zeros.
    Triton has no gradient here: where one is wanted, the reference runs.
    """
    _check(q, k_cache, v_cache, lengths)
    if scale is not None:
        check_number("scale", scale)
    unless = _not_for_triton(q, k_cache, v_cache)
    if choose(q, k_cache, v_cache, unless=unless) == "triton":
        if len(lengths) and visible(lengths):
            _check_lengths(lengths, q.shape[1], k_cache.shape[1])
        scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        return decode_attention_forward(q, k_cache, v_cache, lengths, scale)
    q, k_cache, v_cache = once(q, k_cache, v_cache)
    return decode_attention_reference(q, k_cache, v_cache, lengths, scale)


def _not_for_triton(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    if q.shape[3] > WIDEST:
        return f"the head size is {q.shape[3]}: it takes up to {WIDEST}"
    wanted = q.requires_grad or k_cache.requires_grad or v_cache.requires_grad
    if wanted and torch.is_grad_enabled():
        return "a gradient is wanted: decode under torch.no_grad()"
    return None


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    if (
        not q.dim() == k_cache.dim() == 4
        or k_cache.shape != v_cache.shape
        or (q.shape[0], q.shape[3]) != (k_cache.shape[0], k_cache.shape[3])
    ):
        raise ValueError(
            f"expected q (B, Q, H, D) and caches (B, T, K, D), got {tuple(q.shape)}, "
            f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if q.shape[3] == 0:
        raise ValueError("the head size is 0: it must be at least 1")
    if k_cache.shape[2] == 0 or q.shape[2] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads, {k_cache.shape[2]} kv heads: not a multiple")
    if lengths.shape != q.shape[:1]:
        raise ValueError(
            f"lengths have shape {tuple(lengths.shape)}, expected {tuple(q.shape[:1])}"
        )
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths are {lengths.dtype}, expected int64")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"q and the caches are {q.dtype}, {k_cache.dtype}, {v_cache.dtype}: not the same dtype"
        )
    if not q.device == k_cache.device == v_cache.device == lengths.device:
        raise ValueError(
            f"q, the caches and lengths are on {q.device}, {k_cache.device}, {v_cache.device}, "
            f"{lengths.device}: not the same device"
        )


def _check_lengths(lengths: Tensor, queries: int, slots: int) -> tuple[int, int]:
    """The shortest and the longest, on a GPU at the price of waiting for them."""
    shortest, longest = (int(n) for n in lengths.aminmax())
    if shortest < queries or longest > slots:
        raise ValueError(
            f"lengths run from {shortest} to {longest}; {queries} queries and {slots} cache "
            f"slots allow {queries} to {slots}"
        )
    return shortest, longest


# Reference


@opaque(lambda q, k_cache, v_cache, lengths, scale: q.new_empty(q.shape))
def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None
) -> Tensor:
    """`decode_attention` by PyTorch; the lengths have to be read."""
    batch, queries, heads, head_dim = q.shape
    slots, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    if batch == 0:
        return q * (k_cache.sum() + v_cache.sum())  # nothing, of all three
    # The query heads that share a kv head become further queries: nothing is expanded.
    folded = q.view(batch, queries, kv_heads, group, head_dim).permute(0, 2, 1, 3, 4)
    folded = folded.reshape(batch, kv_heads, queries * group, head_dim)
    shortest, longest = _check_lengths(lengths, queries, slots)
    if queries == 1 and shortest == longest:
        k_cache, v_cache = k_cache[:, :longest], v_cache[:, :longest]
        out = _attend(folded, k_cache, v_cache, None, scale)
    else:
        last = lengths[:, None] - queries + torch.arange(queries, device=q.device)  # (B, Q)
        visible = torch.arange(slots, device=q.device) <= last[..., None]  # (B, Q, T)
        mask = visible.repeat_interleave(group, dim=1).unsqueeze(1)
        # What is past the lengths counts 0 times, and 0 * NaN shows: then clean copies are taken,
        # which cost twice the time; for a gradient always, as large numbers overflow in it.
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache))
        if learns or not (out := _attend(folded, k_cache, v_cache, mask, scale)).isfinite().all():
            past = ~visible[:, -1, :, None, None]
            k_cache, v_cache = k_cache.masked_fill(past, 0), v_cache.masked_fill(past, 0)
            out = _attend(folded, k_cache, v_cache, mask, scale)
    out = out.view(batch, kv_heads, queries, group, head_dim).permute(0, 2, 1, 3, 4)
    return out.reshape(batch, queries, heads, head_dim).contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """q (B, K, Q', D) over k and v (B, T, K, D), where `mask` (B, 1, Q', T) is true."""
    return scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )


# Triton


@jit(do_not_specialize=["slots", "n_splits"])
def decode_attention_kernel(
    # pointers
    Q, K, V, LENGTHS, OUT, LSE,
    # sizes
    n_queries, n_heads, group, slots, n_splits, row_blocks, scale,
    # strides of a batch row, a token, a head
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, lengths_stride,
    # compile-time settings
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of one batch row and kv head, for BLOCK_ROWS of the queries times the group's
    heads: OUT is (splits, B, Q, H, D), normalised within the split, LSE (splits, B, Q, H)."""
    program = tl.program_id(0)
    split, program = program % n_splits, program // n_splits
    block, program = program % row_blocks, program // row_blocks
    kv_head, b = program % (n_heads // group), (program // (n_heads // group)).to(tl.int64)
    length = tl.load(LENGTHS + b * lengths_stride)
    length = tl.minimum(tl.maximum(length, 0), slots).to(tl.int32)
    low = split * SPLIT
    if low >= length and split > 0:
        return
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query, head = (rows // group).to(tl.int64), (kv_head * group + rows % group).to(tl.int64)
    real = rows < n_queries * group
    columns = tl.arange(0, BLOCK_D)
    q = tl.load(
        Q + b * q_row + (query * q_token + head * q_head)[:, None] + columns[None, :],
        mask=real[:, None] & (columns < HEAD)[None, :], other=0.0,
    )  # fmt: skip
    seen = length - n_queries + rows // group + 1  # entries that each row sees
    K += b * k_row + kv_head.to(tl.int64) * k_head
    V += b * v_row + kv_head.to(tl.int64) * v_head
    scale = tl.cast(scale, tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for j in range(low, tl.minimum(low + SPLIT, length), BLOCK_N):
        left, far = length - j, tl.cast(j, tl.int64)
        k = load_tile(K + far * k_token, k_token, left, HEAD, BLOCK_N, BLOCK_D)
        within = (j + tl.arange(0, BLOCK_N))[None, :] < seen[:, None]
        scores = tl.where(within, dot(q, tl.trans(k)) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
        p, shrink = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        top, total = new_top, total * shrink + tl.sum(p, 1)
        v = load_tile(V + far * v_token, v_token, left, HEAD, BLOCK_N, BLOCK_D)
        acc = acc * shrink[:, None]
        acc += dot(to(p, v.dtype), v)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    batch = tl.num_programs(0) // (n_splits * row_blocks * (n_heads // group))
    place = ((split.to(tl.int64) * batch + b) * n_queries + query) * n_heads + head
    tl.store(
        OUT + place[:, None] * HEAD + columns[None, :], to(out, OUT.dtype.element_ty),
        mask=real[:, None] & (columns < HEAD)[None, :],
    )  # fmt: skip
    if SPLITS:
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
        tl.store(LSE + place, lse, mask=real)


@jit(do_not_specialize=["slots"])
def decode_attention_combine_kernel(
    # pointers
    PARTS, LSE, LENGTHS, OUT,
    # sizes
    n_rows, rows_each, slots, lengths_stride,
    # compile-time settings
    SPLIT: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One of the B*Q*H rows: the splits' results, each weighed by its share of the sum."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTHS + row // rows_each * lengths_stride)
    length = tl.minimum(tl.maximum(length, 1), slots).to(tl.int32)
    used = tl.cdiv(length, SPLIT)
    splits, columns = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    top = float("-inf")
    for first in range(0, used, BLOCK_SPLITS):
        place = (first + splits).to(tl.int64) * n_rows + row
        lse = tl.load(LSE + place, mask=first + splits < used, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    base = tl.where(top == float("-inf"), 0.0, top)  # a row without entries
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, used, BLOCK_SPLITS):
        place = (first + splits).to(tl.int64) * n_rows + row
        inside = first + splits < used
        share = tl.exp2(tl.load(LSE + place, mask=inside, other=float("-inf")) - base)
        part = tl.load(
            PARTS + place[:, None] * HEAD + columns[None, :],
            mask=inside[:, None] & (columns < HEAD)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(share, 0)
        acc += tl.sum(part * share[:, None], 0)
    out = to(acc / tl.where(total == 0.0, 1.0, total), OUT.dtype.element_ty)
    tl.store(OUT + row * HEAD + columns, out, mask=columns < HEAD)


def tile(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows, cache entries, warps, stages) for a group's `rows` queries times heads; what does
    not fit the registers is left to further programs."""
    if dtype == torch.float32:
        return 16, 32, 4, 2
    return 16 if rows <= 16 else 32, 64, 4, 2


def _fake(q, k_cache, v_cache, lengths, scale):
    return q.new_empty(q.shape)


@registered(_fake)
def decode_attention_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """(B, Q, H, D)."""
    out = q.new_empty(q.shape)
    batch, queries, heads, head_size = q.shape
    slots, kv_heads = k_cache.shape[1:3]
    if out.numel() == 0:
        return out
    q, k_cache, v_cache = dense(q), dense(k_cache), dense(v_cache)
    rows = queries * (heads // kv_heads)
    block_rows, block_n, warps, stages = tile(rows, q.dtype)
    row_blocks, splits = triton.cdiv(rows, block_rows), max(1, triton.cdiv(slots, SPLIT))
    parts, lse = out, None
    if splits > 1:
        parts = q.new_empty((splits, *q.shape), dtype=torch.float32)
        lse = q.new_empty((splits, *q.shape[:3]), dtype=torch.float32)
    with on_device(q):
        decode_attention_kernel[(batch * kv_heads * row_blocks * splits,)](
            # pointers
            q, k_cache, v_cache, lengths, parts, lse,
            # sizes
            queries, heads, heads // kv_heads, slots, splits, row_blocks, float(scale * LOG2_E),
            # strides
            *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], lengths.stride(0),
            # settings
            SPLITS=splits > 1, SPLIT=SPLIT, HEAD=head_size, BLOCK_D=block_d(head_size),
            BLOCK_ROWS=block_rows, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            decode_attention_combine_kernel[(batch * queries * heads,)](
                # pointers
                parts, lse, lengths, out,
                # sizes
                batch * queries * heads, queries * heads, slots, lengths.stride(0),
                # settings
                SPLIT=SPLIT, HEAD=head_size, BLOCK_D=block_d(head_size), BLOCK_SPLITS=16,
                num_warps=4,
            )  # fmt: skip
    return out
