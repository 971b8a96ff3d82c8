"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

`x` is (..., C), `weight` is (C,). Statistics are fp32 whatever the dtype of `x`.
Casting order: "llama" (Meta's code) casts the normalised value back before the weight is
applied; "hf" does the same but returns the promoted dtype of weight and input, so an fp32
weight gives an fp32 result.

With n = x / rms(x) and g = dy * weight:  dx = (g - n * mean(g * n)) / rms(x),  dw = sum(dy * n).
Source: Zhang & Sennrich 2019; Llama 2 paper, section 2.2.
"""

import torch
from torch import Tensor

from .backend import (
    as_rows,
    choose,
    jit,
    on_device,
    processors,
    registered,
    tl,
    triton,
)
from .backend import cast as to
from .checks import check_number
from .derivatives import differentiable, first_only
from .surroundings import transformed

# One row is held in registers. Up to 8192 (Llama 2 70B) nothing spills; at 16384 a few registers
# of the backward do.
WIDEST = 16384


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama") -> Tensor:
    """Normalise the last dimension of `x` (..., C) and scale by `weight` (C,).

    Returns (..., C) in x's dtype (`cast="llama"`) or the promoted dtype (`cast="hf"`).
    Raises ValueError where the shapes, dtypes, devices, `eps` or `cast` do not fit.
    """
    _check(x, weight, eps, cast)
    if choose(x, weight, unless=_too_wide(x)) == "triton":
        return _triton(x, None, weight, eps, cast == "llama")[0]
    return _reference(x, weight, eps, cast)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5, cast: str = "llama"
) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its norm: returns (y, new residual), both (..., C)."""
    if x.shape != residual.shape or x.device != residual.device:
        raise ValueError(
            f"x is {tuple(x.shape)} on {x.device}, residual {tuple(residual.shape)} on "
            f"{residual.device}: not equal"
        )
    _check(x, weight, eps, cast)
    if choose(x, residual, weight, unless=_too_wide(x)) == "triton":
        return _triton(x, residual, weight, eps, cast == "llama")[:2]
    summed = residual + x
    return _reference(summed, weight, eps, cast), summed


def _check(x: Tensor, weight: Tensor, eps: float, cast: str) -> None:
    if weight.shape != x.shape[-1:] or not x.dim():
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: not the same device")
    check_number("eps", eps, 0.0)
    if cast not in ("llama", "hf"):
        raise ValueError(f"cast is {cast!r}, expected 'llama' or 'hf'")


def _too_wide(x: Tensor) -> str | None:
    wide = x.shape[-1] > WIDEST
    return f"rows are {x.shape[-1]} wide: it takes up to {WIDEST}" if wide else None


# Reference


def _reference(x: Tensor, weight: Tensor, eps: float, cast: str) -> Tensor:
    if torch.is_grad_enabled() and not transformed(x, weight) and not torch.compiler.is_compiling():
        y = _RMSNorm.apply(x, weight, eps)
    else:
        # An autograd.Function costs a decoding step as much as the norm itself; and Dynamo, where
        # all numbers are symbols, cannot hand eps to two of them.
        y = _normalise(x, weight, eps)[0]
    return y.to(x.dtype) if cast == "llama" else y


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y in the promoted dtype, 1 / rms(x) (..., 1) in at least fp32)."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, scale


class _RMSNorm(torch.autograd.Function):
    """By hand, because autograd's way through square, mean, rsqrt and two products took 2 to 4
    times as long (2048 x 288 and 4096 x 192, fp32, one thread of a CPU)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @first_only
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, upstream = x * scale, upstream.to(scale.dtype)
        wide_weight = weight.to(scale.dtype)
        both = upstream * normed
        d_weight = both.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        inner = (both @ wide_weight).div_(x.shape[-1]).unsqueeze(-1)
        d_x = (upstream * wide_weight).addcmul_(normed, inner, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


# Triton


@jit(do_not_specialize=["n_rows"])
def rms_norm_forward_kernel(
    # pointers
    X, RESIDUAL, WEIGHT, SUM, Y, SCALE,
    # sizes
    n_rows, width, eps,
    # strides of a row
    x_stride, residual_stride,
    # compile-time settings
    ADD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    x = tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
    if ADD:
        r = tl.load(
            RESIDUAL + rows[:, None] * residual_stride + columns[None, :], mask=inside, other=0.0
        )
        x = to(x.to(tl.float32) + r.to(tl.float32), SUM.dtype.element_ty)
        tl.store(SUM + rows[:, None] * width + columns[None, :], x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / width + tl.cast(eps, tl.float32))
    weight = tl.load(WEIGHT + columns, mask=columns < width, other=0.0).to(tl.float32)
    normed = to(wide * scale[:, None], x.dtype).to(tl.float32)
    y = to(normed * weight[None, :], Y.dtype.element_ty)
    tl.store(Y + rows[:, None] * width + columns[None, :], y, mask=inside)
    tl.store(SCALE + rows, scale, mask=rows < n_rows)


@jit(do_not_specialize=["n_rows", "tiles_each"])
def rms_norm_backward_kernel(
    # pointers
    X, WEIGHT, SCALE, D_Y, D_SUM, D_X, D_WEIGHT,
    # sizes
    n_rows, width, tiles_each,
    # strides of a row
    x_stride, d_y_stride, d_sum_stride,
    # compile-time settings
    ADD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes `tiles_each` tiles of rows and writes its part of dw: (programs, C)."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    weight = tl.load(WEIGHT + columns, mask=columns < width, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles_each):
        rows = (program * tiles_each + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        x = tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        d_y = tl.load(D_Y + rows[:, None] * d_y_stride + columns[None, :], mask=inside, other=0.0)
        scale = tl.load(SCALE + rows, mask=rows < n_rows, other=0.0)[:, None]
        normed = x.to(tl.float32) * scale
        d_y = d_y.to(tl.float32)
        d_weight += tl.sum(d_y * normed, 0)
        d_y *= weight[None, :]
        inner = tl.sum(d_y * normed, 1) / width
        d_x = (d_y - normed * inner[:, None]) * scale
        if ADD:
            d_sum = tl.load(
                D_SUM + rows[:, None] * d_sum_stride + columns[None, :], mask=inside, other=0.0
            )
            d_x += d_sum.to(tl.float32)
        d_x = to(d_x, D_X.dtype.element_ty)
        tl.store(D_X + rows[:, None] * width + columns[None, :], d_x, mask=inside)
    tl.store(D_WEIGHT + program * width + columns, d_weight, mask=columns < width)


def tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile: whole rows, at least 2048 elements."""
    block = triton.next_power_of_2(max(width, 1))
    n_rows = max(1, 2048 // block)
    return n_rows, block, min(16, max(4, block * n_rows // 512))


def _forward_fake(x, residual, weight, eps, to_input):
    summed_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y_dtype = summed_dtype if to_input else torch.promote_types(summed_dtype, weight.dtype)
    summed = x.new_empty((0,) if residual is None else x.shape, dtype=summed_dtype)
    scale = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=y_dtype), summed, scale


@registered(_forward_fake)
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, to_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (..., C), residual + x or nothing, 1 / rms (N,) fp32)."""
    y, summed, scale = _forward_fake(x, residual, weight, eps, to_input)
    block_rows, block, warps = tile(x.shape[-1])
    flat = as_rows(x)
    other = flat if residual is None else as_rows(residual)
    if flat.numel():
        with on_device(x):
            rms_norm_forward_kernel[(triton.cdiv(flat.shape[0], block_rows),)](
                # pointers
                flat, other, weight.contiguous(), summed, y, scale,
                # sizes
                flat.shape[0], flat.shape[1], float(eps),
                # strides
                flat.stride(0), other.stride(0),
                # settings
                ADD=residual is not None, BLOCK_ROWS=block_rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y, summed, scale


def _backward_fake(x, weight, scale, d_y, d_sum):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@registered(_backward_fake)
def rms_norm_backward(
    x: Tensor, weight: Tensor, scale: Tensor, d_y: Tensor, d_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx (..., C), dweight (C,)); `d_sum` is what else flows into x and is added to dx."""
    block_rows, block, warps = tile(x.shape[-1])
    flat, d_flat = as_rows(x), as_rows(d_y)
    d_other = d_flat if d_sum is None else as_rows(d_sum)
    d_x = x.new_empty(x.shape)
    if flat.numel() == 0:
        return d_x, torch.zeros_like(weight)
    # Each program keeps its share of dw in registers. Three fit a multiprocessor at 4096 columns in
    # bf16 (79 registers of 256 threads), one from 5120 on (97 to 128 of 512).
    tiles = triton.cdiv(flat.shape[0], block_rows)
    each = triton.cdiv(tiles, 3 * processors(x))
    programs = triton.cdiv(tiles, each)
    parts = torch.empty(programs, flat.shape[1], dtype=torch.float32, device=x.device)
    with on_device(x):
        rms_norm_backward_kernel[(programs,)](
            # pointers
            flat, weight.contiguous(), scale, d_flat, d_other, d_x, parts,
            # sizes
            flat.shape[0], flat.shape[1], each,
            # strides
            flat.stride(0), d_flat.stride(0), d_other.stride(0),
            # settings
            ADD=d_sum is not None, BLOCK_ROWS=block_rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return d_x, parts.sum(0).to(weight.dtype)


def _save(ctx, inputs, output):
    (x, residual, weight, _, _), (_, summed, scale) = inputs, output
    ctx.added = residual is not None
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(summed if ctx.added else x, weight, scale)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((scale,) if ctx.added else (summed, scale)))


def _backward(ctx, d_y, d_sum, _):
    x, weight, scale = ctx.saved_tensors
    if d_y is None:
        d_y = torch.zeros_like(x)
    # Tracers have handed over zeros, of its shape, for the sum that is not there.
    d_x, d_weight = rms_norm_backward(x, weight, scale, d_y, d_sum if ctx.added else None)
    d_residual = d_x.to(ctx.dtypes[1]) if ctx.added else None
    return d_x.to(ctx.dtypes[0]), d_residual, d_weight, None, None


_triton = differentiable(rms_norm_forward, _save, _backward)
