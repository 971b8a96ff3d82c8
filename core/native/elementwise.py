"""`rms_norm`, `swiglu` and `rope` in native passes over the memory, forward and backward.

For plain fp32 tensors on the CPU; everything else is the kernels' business, mistakes too. What the
forward hands on to the backward is its inputs and, of a norm, one number a row. PyTorch's passes
over 2048 x 288 and 2048 x 768 took 4 to 13 times what the memory needs.
"""

import torch
from torch import Tensor

from puna.core.native.loader import address, best_instructions, extension, native, readable


def fits_rms_norm(x: Tensor, weight: Tensor, cast: str) -> bool:
    return (
        _readable(x, weight)
        and weight.shape == x.shape[-1:]
        and x.is_contiguous()
        and weight.is_contiguous()
        and cast in ("llama", "hf")  # in fp32 they are the same
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y (..., C), 1 / rms(x) (N,)) of x (..., C) and weight (C,)."""
    width = x.shape[-1]
    y, scale = x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel())
    native().rms_norm(
        best_instructions(), len(scale), width, address(x), address(weight), eps, address(y),
        address(scale), torch.get_num_threads(),
    )  # fmt: skip
    return y, scale


def rms_norm_gradient(
    x: Tensor, weight: Tensor, scale: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx (..., C), dweight (C,)), the same at every run with as many threads."""
    d_y, threads = d_y.contiguous(), torch.get_num_threads()
    d_x, d_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    partial = x.new_empty(threads, 2, x.shape[-1])
    native().rms_norm_gradient(
        best_instructions(), len(scale), x.shape[-1],
        address(x), address(weight), address(scale), address(d_y),
        address(d_x), address(d_weight), address(partial), threads,
    )  # fmt: skip
    return d_x, d_weight


def fits_swiglu(gate: Tensor, up: Tensor) -> bool:
    return (
        _readable(gate, up)
        and gate.shape == up.shape
        and gate.dim() > 0
        and gate.is_contiguous()
        and up.is_contiguous()
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    native().swiglu(
        best_instructions(),
        y.numel(),
        address(gate),
        address(up),
        address(y),
        torch.get_num_threads(),
    )
    return y


def swiglu_gradient(gate: Tensor, up: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    d_y = d_y.contiguous()
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    native().swiglu_gradient(
        best_instructions(), gate.numel(), address(gate), address(up), address(d_y),
        address(d_gate), address(d_up), torch.get_num_threads(),
    )  # fmt: skip
    return d_gate, d_up


def fits_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> bool:
    return (
        positions is None
        and not interleaved
        and _readable(q, k, cos, sin)
        and q.dim() == k.dim() == 4
        and q.shape[:2] == k.shape[:2]
        and 2 * cos.shape[-1] == q.shape[3] == k.shape[3]
        and cos.shape == sin.shape
        and cos.is_contiguous()
        and sin.is_contiguous()
        and not (cos.requires_grad or sin.requires_grad)
        and (
            (cos.dim() == 2 and q.shape[1] <= cos.shape[0])
            or (cos.dim() == 3 and cos.shape[:2] == q.shape[:2])
        )
    )


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, K, D) turned by their angles, or `back` by minus their angles.

    Angles are the tables (P, D/2) or each token's (B, T, D/2). Heads are read where they are (the
    attention's gradients lie head by head); only their D elements must be neighbours.
    """
    batch, tokens, _, size = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    native().rope(
        best_instructions(), batch, tokens, size // 2,
        (q.shape[2], *q.stride()[:3], q.data_ptr(), q_out.data_ptr()),
        (k.shape[2], *k.stride()[:3], k.data_ptr(), k_out.data_ptr()),
        address(cos), address(sin), cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2),
        -1.0 if back else 1.0, torch.get_num_threads(),
    )  # fmt: skip
    return q_out, k_out


def _readable(*tensors: Tensor) -> bool:
    return extension() is not None and readable(*tensors)
