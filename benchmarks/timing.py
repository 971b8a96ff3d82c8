"""Timing that a noisy machine does not decide: interleaved rounds, medians, peak memory."""

import ctypes
import gc
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import torch

from puna.benchmarks import budget
from puna.core.generation import graphs

_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


Clock = Callable[[Callable[[], object]], float]  # seconds of one call


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    p20: float
    p80: float


def interleaved(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time each call once a round, in turn, so that a slow minute falls on all alike.

    One unmeasured round comes first. Every other round runs in the reverse order. `clock` takes
    the place of the wall clock. Where time is short (`budget`) there are fewer rounds, at least
    one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        if turn > 1 and budget.is_spent():
            break
        try:
            for name in list(work) if turn % 2 else reversed(list(work)):
                elapsed = clock(work[name]) if clock else _seconds(work[name], device)
                if turn:
                    seconds[name].append(elapsed)
        except budget.OutOfTime:
            if not all(seconds.values()):
                raise
            break  # what was timed is a result
    return {name: summarise(found) for name, found in seconds.items()}


def kernel_clock(device: torch.device) -> Clock:
    """Times calls that may be shorter than a wall clock's error.

    On a GPU: between two events, after a 256 MB write that leaves nothing of the inputs in its
    cache. The GPU is kept busy meanwhile, so that what is measured is its work and not how fast
    Python launches it. On a CPU: so many calls in a row that they take 5 ms.
    """
    if device.type == "cuda":
        flushed = torch.empty(256 << 20, dtype=torch.int8, device=device)

        def clock(call: Callable[[], object]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            torch.cuda._sleep(2_000_000)  # clock cycles: about a millisecond
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return clock

    def several(call: Callable[[], object]) -> float:
        once = _seconds(call, device)
        calls = max(1, round(5e-3 / max(once, 1e-7)))
        return _seconds(lambda: [call() for _ in range(calls)], device) / calls

    return several


def host_seconds(call: Callable[[], object], rounds: int = 20) -> float:
    """What a call costs before a GPU does anything: until it returns, while the GPU is busy with
    something else; the fastest of `rounds`."""

    def once() -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # clock cycles: about ten milliseconds
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once() for _ in range(rounds))


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """A call's launches as one CUDA graph, replayed; None where it cannot be captured (it waits for
    the GPU, or launches what a graph may not hold)."""
    device = torch.device("cuda", torch.cuda.current_device())
    strict = torch.cuda.get_sync_debug_mode()
    try:
        graphs.launched_aside(call, device)  # first calls compile and allocate
        # A capture that fails leaves PyTorch 2.11's allocator as if it went on: what waits for the
        # GPU is found before.
        torch.cuda.set_sync_debug_mode("error")
        graphs.launched_aside(call, device)
        torch.cuda.set_sync_debug_mode(strict)
        return graphs.captured(call, device)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    finally:
        torch.cuda.set_sync_debug_mode(strict)


def summarise(seconds: list[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    if len(seconds) == 1:
        return Timing(*seconds * 3)
    fifths = quantiles(seconds, n=10, method="inclusive")
    return Timing(median=fifths[4], p20=fifths[1], p80=fifths[7])


def best_seconds(call: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """The fastest of `rounds` calls: for ceilings, where noise can only slow down."""
    return min(_seconds(call, device) for _ in range(rounds))


def peak_mb(call: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that one call needs at its height over what was held before it.

    None where the system does not tell (on the CPU: anything but Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        _seconds(call, device)
        return (torch.cuda.max_memory_allocated(device) - held) / 1e6
    if not _give_back_freed_memory():
        return None
    before = status_mb("VmRSS")
    _RESET_PEAK.write_text("5")
    call()
    return max(0.0, status_mb("VmHWM") - before)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    finish(device)
    start = time.perf_counter()
    call()
    finish(device)
    return time.perf_counter() - start


def finish(device: torch.device) -> None:
    """Wait until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back_freed_memory() -> bool:
    """Without this the allocator keeps what the last call freed, and the next needs 'nothing'."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET_PEAK.write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def tells_memory() -> bool:
    """Whether the system tells a process its resident memory."""
    return _STATUS.exists()


def status_mb(field: str) -> float:
    """Megabytes of this process: resident now (VmRSS), or at its height (VmHWM)."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(), re.M)
    assert found, f"no {field} in {_STATUS}"
    return int(found[1]) * 1024 / 1e6
