"""The feed-forward layer in native code, some rows at a time, for fp32 on the CPU.

What lies between its products stays in the caches and is never whole: of a forward only `gate` and
`up` are kept, of a backward nothing.
"""

import torch
from torch import Tensor

from puna.core import native_elementwise, native_linear
from puna.core.extension import plain
from puna.core.native_linear import matmul

ROWS = 512


def fits(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether native code is the faster way. Mistakes do not fit: PyTorch explains them."""
    return (
        native_linear.fits(x, gate)
        and native_linear.fits(x, up)
        and plain(down)
        and gate.shape == up.shape
        and down.shape == (gate.shape[1], gate.shape[0])
    )


def parts(count: int) -> list[slice]:
    """`count` rows in as few parts as hold at most ROWS, evenly."""
    cuts = max(1, -(-count // ROWS))
    return [slice(count * i // cuts, count * (i + 1) // cuts) for i in range(cuts)]


def feed_forward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(down(silu(gate x) * up x) (..., C), gate x (N, F), up x (N, F)); without `keep` only the
    first, of x (..., C), gate and up (F, C), down (C, F)."""
    rows = x.reshape(-1, x.shape[-1])
    cuts = parts(len(rows))
    tallest, width = max(cut.stop - cut.start for cut in cuts), len(gate)
    y = x.new_empty(rows.shape)
    gates = x.new_empty(len(rows) if keep else tallest, width)
    ups, held = torch.empty_like(gates), x.new_empty(tallest, width)
    for cut in cuts:
        count = cut.stop - cut.start
        at = cut if keep else slice(0, count)
        matmul(rows[cut], gate.T, gates[at])
        matmul(rows[cut], up.T, ups[at])
        native_elementwise.swiglu(gates[at], ups[at], held[:count])
        matmul(held[:count], down.T, y[cut])
    return y.view(x.shape), *((gates, ups) if keep else (None, None))


def gradients(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, gates: Tensor, ups: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate, dup, ddown) from what `feed_forward` kept, and dy (..., C)."""
    rows, d_out = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_x, d_gate, d_up, d_down = (torch.empty_like(each) for each in (rows, gate, up, down))
    for number, cut in enumerate(parts(len(rows))):
        inner = x.new_empty(cut.stop - cut.start, len(gate))
        d_inner = matmul(d_out[cut], down, torch.empty_like(inner))
        d_gates, d_ups = native_elementwise.swiglu_gradient(gates[cut], ups[cut], d_inner, inner)
        matmul(d_gates, gate, d_x[cut])
        matmul(d_ups, up, d_x[cut], add=True)
        matmul(d_gates.T, rows[cut], d_gate, add=number > 0)
        matmul(d_ups.T, rows[cut], d_up, add=number > 0)
        matmul(d_out[cut].T, inner, d_down, add=number > 0)
    return d_x.view(x.shape), d_gate, d_up, d_down
