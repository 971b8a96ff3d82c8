"""A CUDA graph without a GPU: operations recorded once, on the tensors of that time, and run again
on the same memory, with no Python in between.

As on a GPU, what is captured is not run: what would change memory from before is left out
meanwhile. And what a graph may not hold is refused: a look at values, and new values from Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}


def memory(tensors: Any) -> set[int]:
    return {
        each.untyped_storage().data_ptr() for each in tree_leaves(tensors) if torch.is_tensor(each)
    }


def named(function: Any) -> str:
    return str(function).split(".")[1]


def written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """What an operation writes to."""
    given = dict(zip((each.name for each in function._schema.arguments), args, strict=False))
    given |= kwargs
    marked = [each for each in function._schema.arguments if each.is_write]
    return [given[each.name] for each in marked if given.get(each.name) is not None]


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []  # kept: no address is given twice
        self.new: set[int] = set()
        self.steps: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A number that is written to a slice comes as a tensor of its own, and goes by value.
        lists = named(function) == "lift_fresh" and args[0].dim() > 0
        if lists or named(function) in REFUSED:
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        targets = written(function, args, kwargs)
        if targets and not memory(targets) <= self.new:
            self.steps.append((function, args, kwargs, None))
            return targets[0]
        out = function(*args, **kwargs)
        self.made.append(out)
        if not targets:
            self.new |= memory(out) - memory((args, kwargs))
        self.steps.append((function, args, kwargs, None if targets else out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.steps:
            again = function(*args, **kwargs)
            for before, now in zip(tree_leaves(out), tree_leaves(again), strict=False):
                if torch.is_tensor(before) and memory(before) != memory(now):
                    before.copy_(now)


def captured(work: Callable[[], None], *_: object) -> Callable[[], None]:
    """For `graphs.captured`."""
    with Recorder() as recorder:
        work()
    return recorder.replay
