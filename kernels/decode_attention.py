"""Attention of the newest queries over a key/value cache.

q is (B, Q, H, D) with Q = 1 or a few; the caches are (B, T, K, D). Row b sees its first
`lengths[b]` cache entries, the last Q of which belong to the queries themselves, causally.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend from q (B, Q, H, D) to caches (B, T, K, D) up to `lengths` (B,) int64.

    Returns (B, Q, H, D). What lies past a row's length has no effect, whatever it is. Raises
    ValueError for shapes or lengths that do not fit.
    """
    _check(q, k_cache, v_cache, lengths)
    batch, queries, heads, head_dim = q.shape
    slots, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    if batch == 0:
        return torch.empty_like(q)
    # The query heads that share a kv head become further queries: nothing is expanded.
    folded = q.view(batch, queries, kv_heads, group, head_dim).permute(0, 2, 1, 3, 4)
    folded = folded.reshape(batch, kv_heads, queries * group, head_dim)
    shortest, longest = (int(n) for n in lengths.aminmax())
    if shortest < queries or longest > slots:
        raise ValueError(
            f"lengths run from {shortest} to {longest}; {queries} queries and {slots} cache "
            f"slots allow {queries} to {slots}"
        )
    if queries == 1 and shortest == longest:
        k_cache, v_cache = k_cache[:, :longest], v_cache[:, :longest]
        out = _attend(folded, k_cache, v_cache, None, scale)
    else:
        last = lengths[:, None] - queries + torch.arange(queries, device=q.device)  # (B, Q)
        visible = torch.arange(slots, device=q.device) <= last[..., None]  # (B, Q, T)
        mask = visible.repeat_interleave(group, dim=1).unsqueeze(1)
        out = _attend(folded, k_cache, v_cache, mask, scale)
        if not out.isfinite().all():  # 0 * NaN: clean copies, which cost twice the time
            past = ~visible[:, -1, :, None, None]
            k_cache, v_cache = k_cache.masked_fill(past, 0), v_cache.masked_fill(past, 0)
            out = _attend(folded, k_cache, v_cache, mask, scale)
    out = out.view(batch, kv_heads, queries, group, head_dim).permute(0, 2, 1, 3, 4)
    return out.reshape(batch, queries, heads, head_dim)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    if (
        q.dim() != 4
        or k_cache.shape != v_cache.shape
        or (q.shape[0], q.shape[3]) != (k_cache.shape[0], k_cache.shape[3])
    ):
        raise ValueError(
            f"expected q (B, Q, H, D) and caches (B, T, K, D), got {tuple(q.shape)}, "
            f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if q.shape[2] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads, {k_cache.shape[2]} kv heads: not a multiple")
    if lengths.shape != q.shape[:1]:
        raise ValueError(
            f"lengths have shape {tuple(lengths.shape)}, expected {tuple(q.shape[:1])}"
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """q (B, K, Q', D) over k and v (B, T, K, D), where `mask` (B, 1, Q', T) is true."""
    return scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
