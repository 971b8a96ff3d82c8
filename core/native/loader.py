"""`puna.core._C`, the compiled extension, or nothing."""

import functools
import logging
from types import ModuleType

import torch  # before the extension: both then share torch's OpenMP

log = logging.getLogger("puna")

WIDTHS = {
    "avx512_bf16": 16,
    "avx512": 16,
    "avx2": 8,
    "base": 4,
}  # instruction sets: floats a vector


@functools.cache
def extension() -> ModuleType | None:
    """The compiled module; None, and a warning once, where it was not built."""
    try:
        from puna.core import _C  # type: ignore[attr-defined]
    except ImportError as error:
        log.warning(
            "The native extension is missing (%s); training and generation on the CPU are slower "
            "without it. Install Puna again with a C++ compiler at hand.",
            error,
        )
        return None
    return _C


def native() -> ModuleType:
    """The compiled module, for who has made sure that it is there."""
    module = extension()
    assert module is not None
    return module


@functools.cache
def best_instructions(size: int = 0) -> str | None:
    """The widest instruction set of this machine whose vector length divides `size` (floats)."""
    module = extension()
    for name in module.instruction_sets() if module else ():
        if size % WIDTHS[name] == 0:
            return name
    return None


def keep_freed_memory() -> None:
    """From now on the process keeps what it frees, for the next training step.

    A step frees its activations and asks for as much again. Given back to the system in between,
    they came with 16,000 (demo shape) and 46,000 (15m) page faults a step, 8% of its time.
    """
    module = extension()
    if module is not None:
        module.keep_freed_memory()


def readable(*tensors: torch.Tensor) -> bool:
    """Whether all are fp32 on the CPU with memory to hand over: a sharded weight has none."""
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype == torch.float32
        for x in tensors
    )


def address(x: torch.Tensor) -> int:
    """Where the numbers of x begin, for native code that takes them to lie without gaps."""
    assert x.is_contiguous(), "native code would read past a tensor with gaps"
    return x.data_ptr()
