"""The machine card: what a figure was measured on, and how fast the machine can be at best."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from puna.benchmarks.timing import best_seconds
from puna.core.native import linear
from puna.core.native.products import multiplies_bf16, use_products

MATMUL_SIDE = 1024
# The products' operands where a CPU's weights are stored so.
RATED = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def card(device: torch.device) -> dict[str, object]:
    """Processor, memory, threads, versions, commit: JSON values, `unknown` where not told."""
    described: dict[str, object] = {
        "device": str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "llama_cpp": installed("llama-cpp-python"),
        "commit": _commit(),
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "not limited"),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["gpus"] = torch.cuda.device_count()
        described["cuda"] = torch.version.cuda or torch.version.hip
        described |= _gpu(device.index or 0)
    return described


def slug(machine: dict[str, object]) -> str:
    """A folder name for the machine: processor (or GPU) and threads."""
    name = machine.get("gpu") or f"{machine['processor']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def matmul_rate(device: torch.device, dtype: torch.dtype, *, dry: bool = False) -> float:
    """The best matrix product seen, in FLOP/s, of two square matrices (of int8 into int32 for
    torch.int8): PyTorch's, or on a CPU ours where it is faster. `dry`: of small ones, where only
    the code is tried."""
    side = MATMUL_SIDE * (8 if device.type == "cuda" else 1)  # a small one leaves a GPU idle
    side = 64 if dry else side
    a = torch.randn(side, side, device=device)
    a = (10 * a).to(dtype)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    seconds = best_seconds(lambda: multiply(a, a), device)
    ours = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype)
    x = a.float()
    if ours and linear.fits(x, x) and (ours == "fp32" or multiplies_bf16()):
        out = torch.empty_like(x)
        with use_products(ours):
            seconds = min(seconds, best_seconds(lambda: linear.matmul(x, x, out), device))
    return 2 * side**3 / seconds


def read_rate(device: torch.device, size: int) -> float:
    """The best rate in bytes/s of reading `size` bytes once: weights this large may live in a
    cache, and then memory is not their ceiling."""
    block = torch.ones(max(1, size // 4), device=device)
    return block.numel() * 4 / best_seconds(block.sum, device)


def why_not_compiled(device: torch.device) -> str | None:
    """The first line of what torch.compile says to a small function; None if it works."""
    try:
        torch.compile(lambda x: (x.sin() * 2).sum(), dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever is missing: a compiler, its headers, the linker
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


GPU_FIELDS = {
    "driver": "driver_version",
    "gpu_memory": "memory.total",
    "clock": "clocks.max.sm",
    "memory_clock": "clocks.max.memory",
    "power_limit": "power.limit",
}


def _gpu(index: int) -> dict[str, object]:
    """What nvidia-smi says of a GPU; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}"]
    command += ["--format=csv,noheader", "-i", str(index)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in told.strip().split(",")]
    return dict(zip(GPU_FIELDS, values, strict=True)) if len(values) == len(GPU_FIELDS) else {}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        if named:
            return named[1]
    return platform.processor() or platform.machine() or "unknown"


def _memory_gb() -> float | str:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return "unknown"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"
