"""Rotary position embedding of q and k.

Pair i of a head is rotated by the angle position * theta^(-2i/D). Which two elements form
pair i is a convention: half-split (i, i + D/2), Hugging Face's, or interleaved
(2i, 2i + 1), Meta's. Shapes: q (B, T, H, D), k (B, T, K, D), tables (P, D/2) fp32.

Pair (a, b) becomes (a cos - b sin, b cos + a sin). The backward turns by minus the angle.
Source: Su et al. 2021; Llama 2 paper, section 2.2.
"""

import torch
from torch import Tensor

from . import backend
from .backend import cast as to
from .backend import choose, jit, on_device, registered, tl, triton, visible
from .checks import check_number
from .derivatives import differentiable


def rope_tables(
    positions: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    divisors: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: two (positions, head_dim/2) fp32 tensors.

    `divisors` (head_dim/2,) slow each pair's rotation down, for a context that was stretched.

    The angles are formed in fp64 and rounded once: in fp32 the angle of position 4095 would
    carry an error of 2e-4. Raises ValueError for sizes below 0, an odd head size, a theta that is
    not above 0, and divisors of another shape.
    """
    check_number("positions", positions, 0, 1 << 31)
    check_number("the head size", head_dim, 0, 1 << 31)
    check_number("theta", theta, 1e-30)
    if head_dim % 2:
        raise ValueError(f"head size {head_dim} must be even: RoPE rotates pairs")
    if divisors is not None and divisors.shape != (head_dim // 2,):
        raise ValueError(f"divisors are {tuple(divisors.shape)}, expected {(head_dim // 2,)}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = theta**-exponents
    if divisors is not None:
        frequencies = frequencies / divisors.to(frequencies)
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
    tables hold at each token's position. Both are constants. Returns new q and k, same shapes and
    dtypes. Raises ValueError for tables or positions that do not fit; whether a position is in the
    tables is looked at in plain eager calls on the CPU, or under PUNA_DEBUG=1. Elsewhere Triton's
    result for a token whose position is not is NaN, and the reference counts from the tables' end
    where it is below 0.
    """
    _check(q, k, cos, sin, positions)
    if choose(q, k, cos, sin) == "triton":
        return _triton(q, k, cos, sin, positions, interleaved, False)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    elif cos.dim() == 2:
        cos, sin = cos[: q.shape[1]], sin[: q.shape[1]]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2): one angle for all heads
    # One rotation of both: at a token a step, what counts is the number of operations.
    turned = _rotate(torch.cat((q, k), 2), cos, sin, interleaved)
    return turned[:, :, : q.shape[2]].contiguous(), turned[:, :, q.shape[2] :].contiguous()


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}: expected (B, T, H, D) and (B, T, K, D)"
        )
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}: not equal")
    if cos.dim() not in (2, 3):
        raise ValueError(f"tables are {tuple(cos.shape)}, expected (P, D/2) or (B, T, D/2)")
    if cos.shape[-1] * 2 != q.shape[-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"tables are for head size {2 * cos.shape[-1]}, q has {q.shape[-1]}, k {k.shape[-1]}"
        )
    if cos.shape != sin.shape or cos.device != q.device or sin.device != q.device:
        raise ValueError(
            f"cos is {tuple(cos.shape)} on {cos.device}, sin {tuple(sin.shape)} on {sin.device}: "
            f"expected equal shapes on {q.device}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos or sin requires a gradient, and gets none: detach the tables")
    if cos.dim() == 3:
        if positions is not None or cos.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"angles of each token have shape {tuple(cos.shape)}, expected "
                f"{(*q.shape[:2], q.shape[-1] // 2)} and no positions besides"
            )
    elif positions is None:
        if q.shape[1] > cos.shape[0]:
            raise ValueError(f"{q.shape[1]} positions, but the tables hold {cos.shape[0]}")
    else:
        _check_positions(positions, q, cos)


def _check_positions(positions: Tensor, q: Tensor, cos: Tensor) -> None:
    if positions.shape != q.shape[:2]:
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}, expected {tuple(q.shape[:2])}"
        )
    if positions.dtype not in (torch.int32, torch.int64) or positions.device != q.device:
        raise ValueError(
            f"positions are {positions.dtype} on {positions.device}, expected int32 or int64 on "
            f"{q.device}"
        )
    if visible(positions) and positions.numel():
        low, high = (int(end) for end in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"positions run from {low} to {high}, but the tables hold {cos.shape[0]}"
            )


# Reference


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    first, second = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2).to(x.dtype)
    return torch.cat((first, second), -1).to(x.dtype)


# Triton


@jit
def turn_heads(
    # pointers to one token
    X, OUT,
    # angles of the token: (1, BLOCK_HALF)
    cos, sin,
    # sizes and strides
    n_heads, head_stride,
    # compile-time settings
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    for start in range(0, n_heads, BLOCK_HEADS):
        heads = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        real = heads < n_heads
        if INTERLEAVED:  # whole heads are read, for neighbouring elements to come together
            columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            inside = real & (columns < 2 * HALF)
            x = tl.load(X + heads * head_stride + columns, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_HALF, 2)))
            turned = tl.join(
                a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :]
            )
            turned = to(tl.reshape(turned, (BLOCK_HEADS, 2 * BLOCK_HALF)), OUT.dtype.element_ty)
            tl.store(OUT + heads * (2 * HALF) + columns, turned, mask=inside)
        else:
            columns = tl.arange(0, BLOCK_HALF)[None, :]
            inside = real & (columns < HALF)
            x = X + heads * head_stride + columns
            a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
            first = to(a * cos - b * sin, OUT.dtype.element_ty)
            second = to(b * cos + a * sin, OUT.dtype.element_ty)
            out = OUT + heads * (2 * HALF) + columns
            tl.store(out, first, mask=inside)
            tl.store(out + HALF, second, mask=inside)


@jit(do_not_specialize=["n_tokens", "n_positions", "position_batch", "position_token"])
def rope_kernel(
    # pointers
    Q, K, COS, SIN, POSITIONS, Q_OUT, K_OUT,
    # sizes
    n_tokens, n_positions, q_heads, k_heads,
    # strides of a sequence, a token and a head
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    # strides of the angles and positions
    angle_batch, angle_token, position_batch, position_token,
    # compile-time settings
    HALF: tl.constexpr, GIVEN: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program turns all heads of one token."""
    program = tl.program_id(0)
    batch, token = (program // n_tokens).to(tl.int64), (program % n_tokens).to(tl.int64)
    program = program.to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    known = HALF
    if GIVEN:
        position = tl.load(POSITIONS + batch * position_batch + token * position_token).to(tl.int64)
        angles = position * angle_token
        known = tl.where((position >= 0) & (position < n_positions), HALF, 0)
    else:
        angles = batch * angle_batch + token * angle_token
    # A position outside the tables shows as NaN.
    cos = tl.load(COS + angles + pairs, mask=pairs < known, other=float("nan")).to(tl.float32)
    sin = tl.load(SIN + angles + pairs, mask=pairs < known, other=float("nan")).to(tl.float32)
    if CONJUGATE:
        sin = -sin
    turn_heads(
        Q + batch * q_batch + token * q_token, Q_OUT + program * q_heads * (2 * HALF),
        cos, sin, q_heads, q_head, HALF, INTERLEAVED, BLOCK_Q, BLOCK_HALF,
    )  # fmt: skip
    turn_heads(
        K + batch * k_batch + token * k_token, K_OUT + program * k_heads * (2 * HALF),
        cos, sin, k_heads, k_head, HALF, INTERLEAVED, BLOCK_K, BLOCK_HALF,
    )  # fmt: skip


def tile(size: int, heads: int, kv_heads: int) -> tuple[int, int, int]:
    """(pairs, heads of q, heads of k) turned at once: 8 or 16 pairs to a thread of 128, because
    fewer would be read in less than 128 bits."""
    block = triton.next_power_of_2(size // 2)
    few, many = max(1, 1024 // block), max(1, 2048 // block)
    return block, few if heads <= few else many, few if kv_heads <= few else many


def _near(x: Tensor) -> Tensor:
    """x with the elements of a row next to each other: itself wherever it can be read so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _turn_fake(q, k, cos, sin, positions, interleaved, conjugate):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@registered(_turn_fake)
def rope_turn(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> tuple[Tensor, Tensor]:
    """q and k turned by their angles, or by minus their angles (`conjugate`)."""
    q_out, k_out = _turn_fake(q, k, cos, sin, positions, interleaved, conjugate)
    batch, tokens, heads, size = q.shape
    if batch * tokens * size == 0:
        return q_out, k_out
    q, k, cos, sin = _near(q), _near(k), _near(cos), _near(sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    block, block_q, block_k = tile(size, heads, k.shape[2])
    wide = backend.architecture(q.device).startswith("gfx")  # warps of 64 threads
    with on_device(q):
        rope_kernel[(batch * tokens,)](
            # pointers
            q, k, cos, sin, cos if positions is None else positions, q_out, k_out,
            # sizes
            tokens, cos.shape[0], heads, k.shape[2],
            # strides
            *q.stride()[:3], *k.stride()[:3],
            # strides of the angles and positions
            cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2),
            *((0, 0) if positions is None else positions.stride()),
            # settings
            HALF=size // 2, GIVEN=positions is not None, INTERLEAVED=interleaved,
            CONJUGATE=conjugate, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_HALF=block,
            num_warps=2 if wide else 4,
        )  # fmt: skip
    return q_out, k_out


def _save(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin, positions, *output[2:])


def _backward(ctx, d_q, d_k):
    tables = ctx.saved_tensors[:3]
    turned = rope_turn(d_q, d_k, *tables, ctx.interleaved, not ctx.conjugate)
    return *turned, None, None, None, None, None


_triton = differentiable(rope_turn, _save, _backward, token=True)
