"""Ctrl-C while a command is still importing: one word and status 130, no traceback.

PyTorch takes seconds to import, and an exception inside of that comes out as all sorts of errors.
This module imports nothing that takes long.
"""

import os
import signal
import threading
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def begins() -> None:
    """Until `is_done`, Ctrl-C ends the process at once: it has nothing yet to lose."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def is_done() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
