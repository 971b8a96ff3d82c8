"""Which implementation an operation runs: the PyTorch reference, Triton, or flash-attn.

Chosen per tensor: Triton for fp32, fp16 and bf16 on a GPU (CUDA or ROCm), the reference for
everything else. `use_backend(name)` forces one; what is forced and cannot run is an error.

Triton kernels are registered as operators, so that torch.compile, fake tensors and selective
activation checkpointing see one opaque operation (`torch.ops.<namespace>.<name>`). Plain eager
calls go past the registration, which costs some 10 us a call.
"""

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .surroundings import transformed, valueless

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference remains
    triton, tl = None, SimpleNamespace(constexpr=None)

__all__ = [
    "INTERPRETED", "as_rows", "cast", "choose", "debug", "forced", "jit", "on_device",
    "processors", "registered", "tl", "traced", "triton", "use_backend", "visible",
]  # fmt: skip

BACKENDS = frozenset({"auto", "reference", "triton", "flash_attn"})
# The interpreter (TRITON_INTERPRET=1 before triton is imported) runs kernels on CPU tensors. Its
# bf16 products are wrong: tl.dot's operands are upcast where this is set, and only there.
_interpreted = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = tl.constexpr(_interpreted) if triton else None
# Two copies of this folder in one process must not register the same names.
NAMESPACE = __package__.replace(".", "_")

_forced = "auto"  # what the main thread has asked for
_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


class _Asked(threading.local):
    """What a thread has asked for: everything in force, the latest last, and the latest's name."""

    def __init__(self) -> None:
        self.all: list[use_backend] = []
        self.name: str | None = None


_asked = _Asked()


class use_backend:
    """Forces a back end for every operation that has it: "reference", "triton" or "flash_attn".

    `with use_backend("reference"): ...` for a block, `use_backend("reference")` for good, "auto"
    to choose per tensor again. An operation without the forced back end (flash-attn is for
    attention alone) chooses as usual. What the main thread asks for holds for all threads that
    ask for nothing (autograd's on a GPU, say); what another thread asks for, for that thread
    alone, and not for what torch.compile makes of a function: that goes by the main thread.
    Raises ValueError for an unknown name.
    """

    names = BACKENDS

    def __init__(self, name: str):
        if name not in self.names:
            raise ValueError(f"back end is {name!r}, expected one of {sorted(self.names)}")
        self.name, self.entered = name, False
        _asked.all.append(self)
        _settle()

    def __enter__(self) -> None:
        if self.entered or _asked.all[-1:] != [self]:  # once more, or after others, or elsewhere
            _asked.all.append(self)
            _settle()
        self.entered = True

    def __exit__(self, *_: object) -> None:
        if self in _asked.all:  # with it goes what this thread has asked for since
            while _asked.all.pop() is not self:
                pass
            _settle()


def _settle() -> None:
    global _forced
    _asked.name = _asked.all[-1].name if _asked.all else None
    if threading.current_thread() is threading.main_thread():
        _forced = _asked.name or "auto"


def forced() -> str:
    """The back end asked for, or "auto"."""
    if torch.compiler.is_compiling():  # Dynamo knows no threads
        return _forced
    return _asked.name or _forced


def choose(*tensors: Tensor, unless: str | None = None) -> str:
    """Which of "reference" and "triton" takes these tensors, all on the first one's device.

    `unless` is what else keeps the operation from Triton. Raises ValueError where Triton is
    forced and cannot take them, and for what no back end takes: integers, complex numbers, fp8.
    """
    for tensor in tensors:
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"an operand is {tensor.dtype}: use float32, float64, bfloat16 or float16"
            )
    name = forced()
    if name == "reference" or (name != "triton" and not tensors[0].is_cuda):
        return "reference"
    why = "a transform of torch.func is under way" if transformed(*tensors) else unless
    for tensor in tensors:
        why = why or _why_not_triton(tensor)
    if name == "triton" and why:
        raise ValueError(f"the triton back end is forced, but {why}")
    return "reference" if why else "triton"


def _why_not_triton(tensor: Tensor) -> str | None:
    if triton is None:
        return "triton is not installed"
    if not tensor.is_cuda and not (_interpreted and tensor.device.type == "cpu"):
        return (
            f"the tensor is on {tensor.device}: move it to a GPU, or set TRITON_INTERPRET=1 "
            "before Python starts to run kernels on the CPU, slowly"
        )
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its dtype is {tensor.dtype}: use float32, float16 or bfloat16"
    return None


def debug() -> bool:
    """PUNA_DEBUG=1: also check what only the device can see, at the price of waiting for it."""
    return os.environ.get("PUNA_DEBUG") == "1"


def visible(tensor: Tensor) -> bool:
    """Whether values may be checked: on the CPU or under PUNA_DEBUG=1, never while tracing."""
    if traced() or transformed(tensor) or valueless(tensor):
        return False
    return tensor.device.type == "cpu" or debug()


def as_rows(x: Tensor) -> Tensor:
    """(N, C) with neighbouring columns next to each other: a view wherever one exists."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU, to size grids; 132 (an H100's) where there is none."""
    return _processors(tensor.device) if tensor.is_cuda else 132


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; an H100's where there is no GPU."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current GPU: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def jit(kernel: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`, or the bare function where triton is missing (and nothing will launch it)."""
    if kernel is None:
        return functools.partial(jit, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


@jit
def cast(x, dtype: tl.constexpr):
    """x in fp32 to `dtype`, to the nearest (the interpreter truncates towards zero in bf16)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


def traced() -> bool:
    """Something other than plain eager execution wants to see one operation."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def registered(fake: Callable) -> Callable[[Callable], Callable]:
    """Registers a launcher (tensors and numbers in, new tensors out) under its own name.

    `fake` has the same signature and returns empty tensors of the right shapes and dtypes.
    """

    def decorate(launch: Callable) -> Callable:
        name = f"{NAMESPACE}::{launch.__name__.strip('_')}"
        operator = torch.library.custom_op(name, launch, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            if traced():
                return operator(*args)
            return launch(*args)

        call.operator = operator  # type: ignore[attr-defined]
        return call

    return decorate
