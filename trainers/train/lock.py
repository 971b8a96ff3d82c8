"""One writer: a run folder belongs to one process at a time.

The lock is the operating system's (flock), so it ends with the process that holds it, however that
ends; the file `.lock` only says who it was. Workers that outlive a killed torchrun hold it until
they have stopped (`parallel.stop_with_parent`).
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puna.core.terminal import say

LOCK = ".lock"
BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises ValueError, naming the holder, where another one has it."""
    descriptor = taken(folder)
    while not is_there(folder / LOCK, descriptor):  # a start that was refused has removed it
        os.close(descriptor)
        descriptor = taken(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(ourselves()) + "\n").encode(), 0)
        yield
    finally:
        os.close(descriptor)


def taken(folder: Path) -> int:
    """The lock's descriptor, held. Raises ValueError where that cannot be."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{folder / LOCK} is a link; give another --out") from None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check_ours(folder / LOCK, descriptor)
    except OSError as error:
        if error.errno in BUSY:
            who = holder(descriptor)
            os.close(descriptor)
            raise ValueError(
                f"{folder} is being written to by {who}; wait for it, stop it, or give another "
                "--out"
            ) from None
        why = error.strerror
        say(f"{folder} cannot be locked ({why}): let one process write to it", error=True)
    except ValueError:
        os.close(descriptor)
        raise
    return descriptor


def check_ours(path: Path, descriptor: int) -> None:
    """ValueError where the file holds what no run wrote."""
    begun, text = b'{"pid": ', os.pread(descriptor, 1000, 0)
    if text and not (text.startswith(begun) or begun.startswith(text)):  # a kill may have cut it
        raise ValueError(f"{path} is no lock of a run; give another --out, or move it away")


def is_there(path: Path, descriptor: int) -> bool:
    """Whether the file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def ourselves() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def holder(descriptor: int) -> str:
    """Who holds the lock, in words."""
    try:
        said = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(said['pid'])} on {said['host']!s:.80}, since {said['since']!s:.80}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet
