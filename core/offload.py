"""AdamW's moments on the host wherever they are not at work: between two steps of the optimizer.

Their tensors stay what they are, without memory on the device; `at_hand` brings it back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def offload(optimizer: Optimizer) -> None:
    """From its next step on, keep the optimizer's moments on the host."""
    optimizer.__dict__["on_host"] = {}


def is_offloaded(optimizer: Optimizer) -> bool:
    return "on_host" in optimizer.__dict__


@contextmanager
def at_hand(optimizer: Optimizer) -> Iterator[None]:
    """The optimizer's moments where the weights are, until the block ends: brought from the host,
    and put back, where they are kept there."""
    if not is_offloaded(optimizer):
        yield
        return
    kept: dict[Tensor, Tensor] = optimizer.__dict__["on_host"]
    for moment, copy in kept.items():
        moment.untyped_storage().resize_(moment.nbytes)
        moment.copy_(copy)
    try:
        yield
    finally:
        moments = _moments(optimizer)
        optimizer.__dict__["on_host"] = {each: _put_away(each, kept) for each in moments}


@torch.no_grad()
def _moments(optimizer: Optimizer) -> list[Tensor]:
    found = [state[key] for state in optimizer.state.values() for key in MOMENTS if key in state]
    return [each.to_local() if isinstance(each, DTensor) else each for each in found]


def _put_away(moment: Tensor, kept: dict[Tensor, Tensor]) -> Tensor:
    """The moment's copy on the host; its own memory is freed."""
    if (copy := kept.get(moment)) is None:
        copy = torch.empty_like(moment, device="cpu", pin_memory=moment.is_cuda)
    copy.copy_(moment)
    moment.untyped_storage().resize_(0)
    return copy
