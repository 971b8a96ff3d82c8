"""Time that a part of the suite may take, held by the clock: true on any machine.

    with at_most(soft=20, hard=30):
        ...

After `soft` seconds `is_spent` says so: whoever asks begins nothing more and gives what it has.
After `hard` seconds `OutOfTime` is raised, wherever the main thread is; a call into a library
returns first.
"""

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OutOfTime(BaseException):
    """The part's time is over. (No Exception: what a peer's failure is taken for would hide it.)"""


_until, _hard = math.inf, math.inf  # time.monotonic()


def is_spent() -> bool:
    """Whether nothing more should be begun."""
    return time.monotonic() >= _until


def seconds_left() -> float | None:
    """Until `OutOfTime`, for programs that are waited for; None: as long as they take."""
    return None if _hard == math.inf else max(0.1, _hard - time.monotonic())


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A program, waited for no longer than there is time; what it prints is kept as text. OutOfTime
    where it does not end. `options` are those of `subprocess.run`."""
    kept: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
    try:
        return subprocess.run(command, timeout=seconds_left(), **kept, **options)
    except subprocess.TimeoutExpired as error:
        raise OutOfTime from error


def process_age() -> float:
    """Seconds since this process began, its imports included; 0 where the system does not tell."""
    try:
        began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        up = Path("/proc/uptime").read_text().split()[0]
        return float(up) - int(began) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


@contextmanager
def at_most(soft: float, hard: float) -> Iterator[None]:
    """Inside, time runs. Where there are no timers (Windows, another thread) only `soft` does."""
    global _until, _hard
    before, now = (_until, _hard), time.monotonic()
    _until, _hard = now + soft, now + hard
    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def ring(*_: Any) -> None:
        raise OutOfTime

    if timed:
        handler = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, hard)
    try:
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        _until, _hard = before
