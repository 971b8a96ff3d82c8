"""What the first call to each kernel takes, and whether calls of other lengths compile again.

    python -m puna.benchmarks.gpu.first_calls [--only swiglu,attention]

Every launcher of kernels/ at Llama 2 7B's shapes in bf16 (benchmarks/aot/cases.py), in a process
whose kernel cache is empty: the seconds of its first call, to the end of the GPU's work, and the
kernels that it compiled; then those that calls of other lengths compiled besides. Triton compiles
anew for a number that is a multiple of 16 after one that is none, so there are both kinds. What
Triton does once, whatever the kernel, is the first row. The last line is the document as JSON.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import tyro

from puna.benchmarks import machine
from puna.benchmarks.aot.cases import LENGTH, ROWS, Case, Maker, cases
from puna.benchmarks.timing import finish
from puna.core.device import device_of_name
from puna.core.terminal import say
from puna.kernels.backend import jit, triton

OTHERS = ((3333, 1111), (5000, 1000), (600, 600), (4096, 4096))  # rows, tokens of a sequence
DRY = ("swiglu", "gae")  # what the interpreter does in seconds


@jit
def nothing_kernel():
    pass


def main(only: str = "", dry_run: bool = False) -> int:
    """Measure the first call of each kernel; 1 where one fails.

    Args:
        only: beginnings of the cases to call, with commas between them; empty: all.
        dry_run: a few rows of some, interpreted on the CPU: whether this program runs.
    """
    if triton is None:
        raise ValueError("triton is not installed; install it to compile its kernels")
    if dry_run != (os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError("set TRITON_INTERPRET=1 for --dry-run, and unset it without")
    starts = tuple(only.split(",")) if only else DRY if dry_run else ("",)
    chosen = [case for case in cases() if case.name.startswith(starts)]
    if not chosen:
        raise ValueError(
            f"no case begins with {only}; there is {', '.join(c.name for c in cases())}"
        )
    device = device_of_name("cpu" if dry_run else "cuda")
    rows, failed = [], 0
    with empty_cache(), compilations() as compiled:
        start = Case("Triton's start", lambda: nothing_kernel[(1,)](), lambda m, n: [])
        for case in [start, *chosen]:
            try:
                rows.append(measured(case, device, compiled, dry_run))
            except Exception as error:  # one kernel that fails is a line; the others are called
                say(f"{case.name}: failed, {type(error).__name__}: {str(error)[:300]}")
                failed += 1
                continue
            row = rows[-1]
            say(
                f"{case.name}: {row['seconds']:.2f} s, compiled {len(row['compiled'])}, by other "
                f"lengths {len(row['further'])}"
            )
    command = "python -m puna.benchmarks.gpu.first_calls" + (f" --only {only}" if only else "")
    card = machine.card(device) | {"triton": machine.installed("triton")}
    print(json.dumps({"machine": card, "command": command, "rows": rows}))
    return int(failed > 0)


def measured(case: Case, device: torch.device, compiled: list[str], dry: bool) -> dict[str, Any]:
    """The row of a case. `compiled` grows by the name of each kernel that is compiled."""
    seconds = seconds_of(case, device, case.counted or 1 if dry else ROWS, LENGTH)
    first = compiled[:]
    compiled.clear()
    for rows, length in () if dry else OTHERS:
        seconds_of(case, device, rows, length)
    further = compiled[:]
    compiled.clear()
    return {
        "bench": "first call" + " (dry run)" * dry, "operation": case.name, "provider": "puna",
        "dtype": "bf16", "seconds": seconds, "compiled": first, "further": further,
    }  # fmt: skip


def seconds_of(case: Case, device: torch.device, rows: int, length: int) -> float:
    """Of one call, its arguments apart."""
    arguments = case.arguments(Maker(device.type, length), rows)
    finish(device)
    start = time.perf_counter()
    case.launcher(*arguments)
    finish(device)
    return time.perf_counter() - start


@contextmanager
def empty_cache() -> Iterator[None]:
    """Triton finds nothing compiled and keeps nothing."""
    name, before = "TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="puna-triton-") as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            os.environ |= {name: before} if before is not None else {}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that grows by the name of each kernel that is compiled."""
    names: list[str] = []

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(src.name)

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    try:
        yield names
    finally:
        triton.knobs.compilation.listener = before


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except ValueError as error:
        sys.exit(str(error))
