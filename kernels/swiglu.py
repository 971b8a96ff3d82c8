"""SwiGLU's gate: silu(gate) * up, element by element, in fp32.

gate and up are (..., F): two projections, or the two halves of one packed (..., 2F).
With s = sigmoid(gate):  d_up = dy * gate * s,  d_gate = dy * up * s * (1 + gate * (1 - s)).
Source: Shazeer 2020; Llama 2 paper, section 2.2.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from .backend import as_rows, choose, jit, on_device, registered, tl, triton
from .backend import cast as to
from .derivatives import differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(`gate`) * `up`, both (..., F); returns (..., F) in gate's dtype.

    Views of one packed projection, `packed.chunk(2, -1)`, are read where they are. Raises
    ValueError where shapes or devices differ, and for integers.
    """
    if gate.shape != up.shape or gate.device != up.device:
        raise ValueError(
            f"gate is {tuple(gate.shape)} on {gate.device}, up {tuple(up.shape)} on {up.device}: "
            "not equal"
        )
    if not gate.dim():
        raise ValueError("gate has no dimensions, expected (..., F)")
    if choose(gate, up) == "triton":
        return _triton(gate, up)
    return _reference(gate, up)


# Reference


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype in (torch.float32, torch.float64):
        return (silu(gate) * up).to(gate.dtype)
    return (silu(gate.float()) * up.float()).to(gate.dtype)


# Triton


@jit
def elements(n_rows, width, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows (R, 1), columns (1, C), which of them exist) of this program's tile."""
    program, tiles = tl.program_id(0), tl.cdiv(width, BLOCK)
    first_row = (program // tiles).to(tl.int64) * BLOCK_ROWS
    first_column = (program % tiles).to(tl.int64) * BLOCK
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = first_column + tl.arange(0, BLOCK)[None, :]
    return rows, columns, (rows < n_rows) & (columns < width)


@jit(do_not_specialize=["n_rows"])
def swiglu_forward_kernel(
    # pointers
    GATE, UP, Y,
    # sizes
    n_rows, width,
    # strides of a row
    gate_stride, up_stride,
    # compile-time settings
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, inside = elements(n_rows, width, BLOCK_ROWS, BLOCK)
    gate = tl.load(GATE + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = to(gate * tl.sigmoid(gate) * up, Y.dtype.element_ty)
    tl.store(Y + rows * width + columns, y, mask=inside)


@jit(do_not_specialize=["n_rows"])
def swiglu_backward_kernel(
    # pointers
    GATE, UP, D_Y, D_GATE, D_UP,
    # sizes
    n_rows, width,
    # strides of a row
    gate_stride, up_stride, d_y_stride,
    # compile-time settings
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, inside = elements(n_rows, width, BLOCK_ROWS, BLOCK)
    gate = tl.load(GATE + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    d_y = tl.load(D_Y + rows * d_y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = to(d_y * up * s * (1.0 + gate * (1.0 - s)), D_GATE.dtype.element_ty)
    d_up = to(d_y * gate * s, D_UP.dtype.element_ty)
    tl.store(D_GATE + rows * width + columns, d_gate, mask=inside)
    tl.store(D_UP + rows * width + columns, d_up, mask=inside)


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile: 16 elements to a thread, or 8 where a warp has 64."""
    block = min(2048, triton.next_power_of_2(width))
    return 2048 // block, block


def _plan(*tensors: Tensor) -> tuple[list[Tensor], int, dict[str, int]]:
    """(the tensors as rows, programs, settings); contiguous tensors are one long row."""
    flat = [as_rows(tensor) for tensor in tensors]
    if all(each.is_contiguous() for each in flat):
        flat = [each.view(1, -1) for each in flat]
    n_rows, width = flat[0].shape
    block_rows, block = tile(width)
    programs = triton.cdiv(n_rows, block_rows) * triton.cdiv(width, block)
    return flat, programs, {"BLOCK_ROWS": block_rows, "BLOCK": block, "num_warps": 4}


def _forward_fake(gate, up):
    return gate.new_empty(gate.shape)


@registered(_forward_fake)
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (..., F)."""
    y = _forward_fake(gate, up)
    if y.numel() == 0:
        return y
    (gate, up), programs, settings = _plan(gate, up)
    with on_device(gate):
        swiglu_forward_kernel[(programs,)](
            # pointers
            gate, up, y,
            # sizes
            *gate.shape,
            # strides
            gate.stride(0), up.stride(0),
            **settings,
        )  # fmt: skip
    return y


def _backward_fake(gate, up, d_y):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@registered(_backward_fake)
def swiglu_backward(gate: Tensor, up: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), both (..., F)."""
    d_gate, d_up = _backward_fake(gate, up, d_y)
    if d_gate.numel() == 0:
        return d_gate, d_up
    (gate, up, d_y), programs, settings = _plan(gate, up, d_y)
    with on_device(gate):
        swiglu_backward_kernel[(programs,)](
            # pointers
            gate, up, d_y, d_gate, d_up,
            # sizes
            *gate.shape,
            # strides
            gate.stride(0), up.stride(0), d_y.stride(0),
            **settings,
        )  # fmt: skip
    return d_gate, d_up


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_y):
    return swiglu_backward(*ctx.saved_tensors, d_y)


_triton = differentiable(swiglu_forward, _save, _backward)
