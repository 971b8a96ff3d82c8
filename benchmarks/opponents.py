"""Peers that take part where they are installed: found by themselves, and where an installed one is
broken a sentence says so and its rows are left out."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from puna.benchmarks.machine import installed
from puna.core.terminal import say

# by the name in a row: what pip calls it, and the module whose functions are called
PACKAGES = {
    "liger-kernel": ("liger-kernel", "liger_kernel.transformers.functional"),
    "quack": ("quack-kernels", "quack.linear_cross_entropy"),
    "flash-attn": ("flash-attn", "flash_attn"),
    "trl": ("trl", "trl.trainer.utils"),
    "vllm": ("vllm", "vllm"),
}
KERNELS = ("liger-kernel", "quack", "flash-attn", "trl")


@cache
def module(name: str) -> tuple[Any | None, str]:
    """(the module, "") or (None, why its rows are left out); "" where it is not installed."""
    package, where = PACKAGES[name]
    version = installed(package)
    if version is None:
        return None, ""
    try:
        return importlib.import_module(where), ""
    except Exception as error:  # what a broken build raises is not ImportError alone
        return None, broken(f"{package} {version}", error)


def has(name: str) -> bool:
    """Whether a peer takes part."""
    return module(name)[0] is not None


def function(name: str, called: str, where: str = "") -> Any | None:
    """What is `called` so in the module of a peer (or in `where`); None where it is not there."""
    found, _ = module(name)
    if found is not None and where:
        found = importlib.import_module(where)
    return getattr(found, called, None)


def attempted(peer: str, open_it: Callable[[], Any]) -> Any | None:
    """What `open_it` gives, or None where the peer cannot be opened here, which is said."""
    try:
        return open_it()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its own failure: the others are measured
        say(broken(peer, error))
        return None


def broken(peer: str, error: BaseException) -> str:
    """The sentence."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"{peer} is installed and does not work here, its rows are left out: {said[0][:200]}"


def absent(names: tuple[str, ...]) -> list[str]:
    """A line for each that is installed and broken."""
    return [why for name in names if (why := module(name)[1])]
