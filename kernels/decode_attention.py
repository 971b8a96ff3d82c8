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

    Returns (B, Q, H, D). What lies past a row's length is never read into the result.
    Raises ValueError for shapes that do not fit.
    """
    if k_cache.shape != v_cache.shape or q.shape[0] != k_cache.shape[0]:
        raise ValueError(
            f"expected q (B, Q, H, D) and caches (B, T, K, D), got {tuple(q.shape)}, "
            f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if q.shape[2] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads, {k_cache.shape[2]} kv heads: not a multiple")
    batch, queries, heads, head_dim = q.shape
    slots, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    last = lengths[:, None] - queries + torch.arange(queries, device=q.device)  # (B, Q)
    visible = torch.arange(slots, device=q.device) <= last[..., None]  # (B, Q, T)
    # The query heads that share a kv head become further queries: nothing is expanded.
    folded = q.view(batch, queries, kv_heads, group, head_dim).permute(0, 2, 1, 3, 4)
    folded = folded.reshape(batch, kv_heads, queries * group, head_dim)
    mask = visible.repeat_interleave(group, dim=1).unsqueeze(1)
    values = v_cache.transpose(1, 2)
    out = scaled_dot_product_attention(
        folded, k_cache.transpose(1, 2), values, attn_mask=mask, scale=scale
    )
    out = out.view(batch, kv_heads, queries, group, head_dim).permute(0, 2, 1, 3, 4)
    return out.reshape(batch, queries, heads, head_dim)
