"""The feed-forward layer in native code, some rows at a time, for fp32 on the CPU.

What lies between its products stays in the caches and is never whole: of a forward only `gate` and
`up` are kept, of a backward nothing.
"""

import torch
from torch import Tensor

from puna.core.native import linear
from puna.core.native.loader import address, best_instructions, native, readable
from puna.core.native.products import products


def fits(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether native code is the faster way. Mistakes do not fit: PyTorch explains them."""
    return (
        linear.fits(x, gate)
        and x.shape[:-1].numel() >= linear.FEWEST_ROWS  # with fewer, packing is not worth it
        and readable(up, down)
        and gate.shape == up.shape
        and down.shape == (gate.shape[1], gate.shape[0])
    )


def feed_forward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(down(silu(gate x) * up x) (..., C), gate x (N, F), up x (N, F)); without `keep` only the
    first, of x (..., C), gate and up (F, C), down (C, F)."""
    x, gate, up, down = (each.contiguous() for each in (x, gate, up, down))
    rows, y = x.shape[:-1].numel(), torch.empty_like(x)
    gates, ups = (x.new_empty(rows, len(gate)) for _ in range(2)) if keep else (None, None)
    native().feed_forward(
        best_instructions(), rows, *gate.T.shape,
        *(0 if each is None else address(each) for each in (x, gate, up, down, gates, ups, y)),
        products() == "bf16", torch.get_num_threads(),
    )  # fmt: skip
    return y, gates, ups


def gradients(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, gates: Tensor, ups: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate, dup, ddown) from what `feed_forward` kept, and dy (..., C)."""
    given = [each.contiguous() for each in (x, gate, up, down, gates, ups, d_y)]
    d_x, d_gate, d_up, d_down = (torch.empty_like(each) for each in given[:4])
    native().feed_forward_gradient(
        best_instructions(), x.shape[:-1].numel(), *gate.T.shape,
        *(address(each) for each in (*given, d_x, d_gate, d_up, d_down)),
        products() == "bf16", torch.get_num_threads(),
    )  # fmt: skip
    return d_x, d_gate, d_up, d_down
