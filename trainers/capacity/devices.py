"""GPUs by name, from their makers' data sheets."""

from typing import NamedTuple


class Device(NamedTuple):
    """One accelerator."""

    memory: float  # bytes
    flops: float  # a second, dense bf16 products
    bandwidth: float  # bytes a second from its memory


DEVICES = {
    "a100-40": Device(40e9, 312e12, 1.56e12),
    "a100-80": Device(80e9, 312e12, 2.04e12),
    "h100": Device(80e9, 989e12, 3.35e12),
    "h200": Device(141e9, 989e12, 4.8e12),
    "b200": Device(180e9, 2250e12, 8e12),
    "l40s": Device(48e9, 362e12, 0.86e12),
    "rtx-4090": Device(24e9, 165e12, 1.01e12),
}
A_NODE = 8  # GPUs that one machine has: sampling_tp stays inside
CONTEXT = 2e9  # bytes of the driver's context, of NCCL's buffers and of libraries' workspaces
USABLE = 0.95  # of what is left: PyTorch's allocator cannot fill all of it


def usable(device: Device) -> float:
    """Bytes that tensors may take."""
    return (device.memory - CONTEXT) * USABLE
