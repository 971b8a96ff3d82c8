"""SwiGLU's gate: silu(gate) * up, element by element, in fp32.

Source: Shazeer 2020; Llama 2 paper, section 2.2.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(`gate`) * `up`, both (..., F); returns (..., F) in gate's dtype."""
    if gate.shape != up.shape:
        raise ValueError(f"gate is {tuple(gate.shape)}, up {tuple(up.shape)}: not equal")
    if gate.dtype in (torch.float32, torch.float64):
        return silu(gate) * up
    return (silu(gate.float()) * up.float()).to(gate.dtype)
