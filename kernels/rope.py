"""Rotary position embedding of q and k.

Pair i of a head is rotated by the angle position * theta^(-2i/D). Which two elements form
pair i is a convention: half-split (i, i + D/2), Hugging Face's, or interleaved
(2i, 2i + 1), Meta's. Shapes: q (B, T, H, D), k (B, T, K, D), tables (P, D/2) fp32.
Source: Su et al. 2021; Llama 2 paper, section 2.2.
"""

import torch
from torch import Tensor


def rope_tables(
    positions: int, head_dim: int, *, theta: float = 10000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: two (positions, head_dim/2) fp32 tensors.

    The angles are formed in fp64 and rounded once: in fp32 the angle of position 4095 would
    carry an error of 2e-4. Raises ValueError for an odd head size.
    """
    if head_dim % 2:
        raise ValueError(f"head size {head_dim} must be even: RoPE rotates pairs")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = theta**-exponents
    index = torch.arange(positions, dtype=torch.float64, device=device)
    angles = torch.outer(index, frequencies)
    return angles.cos().float(), angles.sin().float()


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate `q` (B, T, H, D) and `k` (B, T, K, D) by their positions (B, T).

    `cos`, `sin`: (P, D/2) tables, positions defaulting to 0..T-1; or (B, T, D/2), what the
    tables hold at each token's position. Returns new q and k, same shapes and dtypes. Raises
    ValueError for tables or positions that do not fit.
    """
    if cos.shape[-1] * 2 != q.shape[-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"tables are for head size {2 * cos.shape[-1]}, q has {q.shape[-1]}, k {k.shape[-1]}"
        )
    if cos.dim() == 3:
        if positions is not None or cos.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"angles of each token have shape {tuple(cos.shape)}, expected "
                f"{(*q.shape[:2], q.shape[-1] // 2)} and no positions besides"
            )
    elif positions is None:
        if q.shape[1] > cos.shape[0]:
            raise ValueError(f"{q.shape[1]} positions, but the tables hold {cos.shape[0]}")
        cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    else:
        if positions.shape != q.shape[:2]:
            raise ValueError(
                f"positions have shape {tuple(positions.shape)}, expected {tuple(q.shape[:2])}"
            )
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2): one angle for all heads
    # One rotation of both: at a token a step, what counts is the number of operations.
    turned = _rotate(torch.cat((q, k), 2), cos, sin, interleaved)
    return turned[:, :, : q.shape[2]], turned[:, :, q.shape[2] :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    first, second = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2).to(x.dtype)
    return torch.cat((first, second), -1).to(x.dtype)
