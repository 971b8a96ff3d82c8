"""Advice that names a flag is of the command that somebody typed: a stage may run inside of a loop
or of the demo, which has other options."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_command: ContextVar[Any] = ContextVar("command", default=None)

ANEW = "begin anew with another --seed and --out"  # where nothing else can be changed


@contextmanager
def commanded(config: Any) -> Iterator[None]:
    """What runs in the block is part of this configuration's command, or of one around it."""
    if _command.get() is not None:
        yield
        return
    token = _command.set(config)
    try:
        yield
    finally:
        _command.reset(token)


def offers(*names: str) -> bool:
    """Whether the command that runs has all these options; where none is known, whether one may."""
    config = _command.get()
    return config is None or all(hasattr(config, name) for name in names)


def advice(names: str, flagged: str, otherwise: str) -> str:
    """`flagged`, which names the flags of the options `names`, where the command has them."""
    return flagged if offers(*names.split()) else otherwise
