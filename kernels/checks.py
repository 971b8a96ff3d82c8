"""What several operations refuse in the same words."""

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def check_number(name: str, value: float, low: float = -LARGEST, high: float = LARGEST) -> None:
    """ValueError unless a setting is a number from `low` to `high`; NaN is none, nor is a tensor,
    whose value a device would have to be waited for."""
    if isinstance(value, Tensor) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the operands on {device}: move it there")
