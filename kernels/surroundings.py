"""What an operation is called under: autocast, a transform of torch.func, tensors without values.

- Under torch.autocast a matrix product takes its operands in autocast's dtype, as PyTorch's own
  do; everything else works as it is written, on the dtypes that it is given.
- Under torch.func's transforms (grad, vmap, jvp, ...) and forward-mode derivatives tensors are
  wrappers, which no kernel of ours can read: the references run as far as they are plain PyTorch,
  and what is not refuses.
- Meta and fake tensors have shapes alone: whoever must see values becomes one operator for them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

NOT_TRANSFORMED = (
    "this operation does not go under torch.func's transforms (grad, vmap, jvp, ...) or "
    "forward-mode derivatives: differentiate it by torch.autograd, or write it in plain PyTorch"
)


def transformed(*tensors: Any) -> bool:
    """Whether a transform is under way, or one of the tensors has a forward-mode derivative; of no
    tensors, whether one may have it. (A dual level is the process's: any thread may hold it.)"""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return not tensors or any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def refuse_transforms(*tensors: Any) -> None:
    """RuntimeError under a transform."""
    if transformed(*tensors):
        raise RuntimeError(NOT_TRANSFORMED)


def valueless(*tensors: Any) -> bool:
    """Whether one of them has a shape and no values."""
    return any(isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta) for x in tensors)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is."""
    device = tensor.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def product(operands: int) -> Callable[[Function], Function]:
    """A function that multiplies its first arguments, so many of them, as autocast has it; they
    may be given by name."""

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)[:operands]

        @functools.wraps(function)
        def call(*given: Any, **options: Any) -> Any:
            first = given[0] if given else options.get(names[0])
            if not isinstance(first, Tensor) or not autocasts(first):
                return function(*given, **options)
            device = first.device.type
            factors = [lowered(x, device) for x in given[:operands]]
            named = {name: lowered(options[name], device) for name in names if name in options}
            with torch.autocast(device, enabled=False):
                return function(*factors, *given[operands:], **{**options, **named})

        return cast(Function, call)

    return decorate


def without_autocast(backward: Callable) -> Callable:
    """A backward(ctx, *upstream) whose products are those of its forward's dtypes, also where
    somebody calls it under autocast."""

    @functools.wraps(backward)
    def call(ctx: Any, *upstream: Tensor | None) -> Any:
        on = next((x for x in upstream if x is not None), None)
        if on is None or not autocasts(on):
            return backward(ctx, *upstream)
        with torch.autocast(on.device.type, enabled=False):
            return backward(ctx, *upstream)

    return call


def lowered(x: Tensor, device: str) -> Tensor:
    """x in autocast's dtype; as in PyTorch, fp64 and what lies elsewhere stay as they are."""
    if x.device.type != device or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))
