"""A run as a list of parts, each of which may fail, run out of time or be stopped without taking
with it what the others measured."""

from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, NamedTuple

import torch

from puna.benchmarks import budget
from puna.core.errors import UserError

LEAST = 3.0  # seconds a part must have before it, to be begun


class Part(NamedTuple):
    name: str
    rows: Callable[[], Iterable[Sequence[Any]]]  # in the order they are measured


def is_full(error: Exception) -> bool:
    """Whether a GPU's memory, or the machine's, did not suffice."""
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return full or "can't allocate" in str(error)


class Measured(NamedTuple):
    rows: list[Any]
    left_out: list[str]  # one line for each part that is not there, or not all of it: why
    error: Exception | None  # the first of a part that failed
    stopped: bool  # by ctrl-C


def measure(
    parts: Sequence[Part], say: Callable[[str], object], seconds: float | None = None
) -> Measured:
    """Every part's rows; within `seconds`, in which each part has an equal share of what those
    before it left, and at most twice that."""
    rows: list[Any] = []
    left_out: list[str] = []
    error: Exception | None = None
    stopped, ends = False, None if seconds is None else monotonic() + seconds

    def leave_out(line: str) -> None:
        left_out.append(line)
        say(f"left out: {line}")

    for number, part in enumerate(parts):
        say(f"{part.name} ({number + 1} of {len(parts)}) ...")
        try:
            if ends is None:
                for found in part.rows():
                    rows += found
                continue
            left = ends - monotonic()
            if left < LEAST:
                leave_out(f"{part.name}: the {seconds:.0f} seconds are over")
                continue
            share = left / (len(parts) - number)
            with budget.at_most(share, min(left, 2 * share)):
                for found in part.rows():
                    rows += found
                if budget.is_spent():
                    leave_out(
                        f"{part.name}: rounds or rows of it, its {share:.0f} seconds were over"
                    )
        except budget.OutOfTime:
            leave_out(f"{part.name}, or a part of it: it takes longer here than its share of time")
        except KeyboardInterrupt:
            stopped = True
            leave_out(f"{', '.join(each.name for each in parts[number:])}: stopped by ctrl-C")
            break
        except Exception as failure:  # the others are measured, then it is raised
            if is_full(failure):
                leave_out(f"{part.name}, or a part of it: it does not fit the memory")
                continue
            error = error or failure
            leave_out(f"{part.name}: {str(failure) or type(failure).__name__}")
    if not (rows or error or stopped) and left_out:
        error = UserError(f"nothing was measured: {left_out[0]}")
    return Measured(rows, left_out, error, stopped)
