"""Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed) end a run between two steps, not inside
one, so that it can go on exactly."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from puna.core import parallel

SAID = b"\nstopping at the next place to go on from; a second Ctrl-C ends at once\n"


@contextmanager
def stop_requests(path: Path) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether any rank was asked to stop (collective). The first
    request is answered with one line, since it may take a while; a second one acts at once.

    SystemExit at the end of the block, where `path` is whole, for a request that came after the
    last question: what follows, a stage of a loop or a command of a script, is not to begin.
    """
    asked = threading.Event()

    def stop() -> bool:
        return bool(parallel.all_max(int(asked.is_set())))

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        stop()
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        if parallel.is_main():
            with suppress(OSError):  # the terminal may be gone
                os.write(2, SAID)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
        if stop():
            raise SystemExit(f"stopped when {path} was done; the same command goes on from there")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
