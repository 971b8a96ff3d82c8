"""How an operation is differentiated: once, and a second time refused; and references as operators.

A second derivative that is not there must not be taken for zero: PyTorch's once_differentiable
does so under a constant upstream gradient.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .backend import NAMESPACE, traced
from .surroundings import refuse_transforms, transformed, valueless, without_autocast

FIRST_ONLY = (
    "this operation has a first derivative only: where you need a second one, write it in plain "
    "PyTorch"
)


class _FirstDerivative(torch.autograd.Function):
    """A gradient that refuses to be differentiated; `connected` lead to what it depends on."""

    @staticmethod
    def forward(ctx, gradient, *connected):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(FIRST_ONLY)


class _Unpacked:
    """A backward's context whose saved tensors were taken out: checkpointing lets that be once."""

    def __init__(self, ctx):
        self.__dict__.update(inner=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __setattr__(self, name, value):
        setattr(self.inner, name, value)


def first_only(backward: Callable) -> Callable:
    """An autograd.Function's backward whose gradients refuse to be differentiated (RuntimeError).

    PyTorch's once_differentiable lets them pass as constants where the upstream gradient is one.
    Asked for by its leaves, a second derivative finds only what leads to them: among the saved
    tensors must be every input with a gradient, or an output, which may be an empty one. Without
    either `create_graph=True` itself is refused.
    """

    derivative = without_autocast(backward)

    @functools.wraps(backward)
    def refusing(ctx, *upstream):
        if not torch.is_grad_enabled():  # it is under create_graph=True alone
            return derivative(ctx, *upstream)
        unpacked = _Unpacked(ctx)
        connected = [x for x in unpacked.saved_tensors if x is not None and x.requires_grad]
        whole = any(x.grad_fn is ctx for x in connected)
        if not whole and len(connected) < sum(ctx.needs_input_grad):
            raise RuntimeError(FIRST_ONLY)
        with torch.no_grad():
            grads = derivative(unpacked, *upstream)
        grads = grads if isinstance(grads, tuple) else (grads,)
        return tuple(
            None if grad is None else _FirstDerivative.apply(grad.detach(), *connected)
            for grad in grads
        )

    return refusing


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        token = tensors[0].new_empty(0)
        ctx.save_for_backward(token)
        return *(tensor.view_as(tensor) for tensor in tensors), token

    @staticmethod
    @first_only
    def backward(ctx, *upstream):
        return upstream[:-1]


def once(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The inputs of what others differentiate, so that a second derivative is refused by us: not
    in words about their inner names, nor, worse, taken for zero."""
    if transformed(*tensors) or traced() or not torch.is_grad_enabled():
        return tensors
    if any(x.requires_grad for x in tensors):
        return _Once.apply(*tensors)[:-1]
    return tensors


def differentiable(
    launch: Callable, save: Callable, backward: Callable, *, token: bool = False
) -> Callable:
    """The registered `launch` with a derivative: call it as `launch` is called.

    `save(ctx, inputs, output)` keeps what `backward(ctx, *upstream)` needs. In plain eager they
    make an autograd.Function. While tracing, the operator itself carries the derivative: inside
    torch.compile's graphs an autograd.Function refuses the same tensor twice, and fails on some
    sizes that change. With `token` eager's `output` has an empty tensor more, for a `save` that
    keeps no inputs (see `first_only`).
    """
    derivative = first_only(backward)
    launch.operator.register_autograd(derivative, setup_context=save)  # type: ignore[attr-defined]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # with `save` apart, apply() would cost 25 us more
            output = launch(*inputs)
            if token:
                output = *output, inputs[0].new_empty(0)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *upstream):
            return derivative(ctx, *(upstream[:-1] if token else upstream))

    def call(*args: Any) -> Any:
        if traced():
            return launch.operator(*args)  # type: ignore[attr-defined]
        if not torch.is_grad_enabled():
            return launch(*args)
        output = Differentiable.apply(*args)
        return output[:-1] if token else output

    return call


def opaque(fake: Callable) -> Callable[[Callable], Callable]:
    """A reference that must see its tensors' values becomes one operator under torch.compile.

    For plain PyTorch functions with one result whose shape `fake` gives; so it does for tensors
    without values. Other eager calls are left alone, and refused under a transform. The operator's
    derivative runs the function again: right for any function, at the price of a second forward.
    """

    def decorate(function: Callable) -> Callable:
        name = f"{NAMESPACE}::{function.__name__.strip('_')}"
        schema = torch.library.infer_schema(function, mutates_args=())
        arguments = schema.rpartition(") -> ")[0]

        @torch.library.custom_op(name, mutates_args=(), schema=schema)
        def operator(*args):
            with torch.no_grad():
                # A result must not share an input's memory.
                return function(*args).clone(memory_format=torch.contiguous_format)

        @torch.library.custom_op(
            f"{name}_backward", mutates_args=(), schema=f"{arguments}, Tensor upstream) -> Tensor[]"
        )
        def again(*args):
            # On a thread of its own: inside an operator autograd is switched off for this one.
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(_gradients, function, *args).result()

        operator.register_fake(fake)
        again.register_fake(lambda *args: [x.new_empty(x.shape) for x in args[:-1] if _floating(x)])

        def save(ctx, inputs, output):
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

        def backward(ctx, upstream):
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
            found = iter(again(*inputs, upstream))
            return tuple(next(found) if _floating(x) else None for x in inputs)

        operator.register_autograd(first_only(backward), setup_context=save)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            refuse_transforms(*args)
            one = torch.compiler.is_compiling() or valueless(*args)
            return operator(*args) if one else function(*args)

        call.operator = operator  # type: ignore[attr-defined]
        return call

    return decorate


def _gradients(function: Callable, *args: Any) -> list[Tensor]:
    """Of every floating-point tensor among a function's arguments; the last one is upstream."""
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in args[:-1]]
    wanted = [x.requires_grad_() for x in inputs if _floating(x)]
    result = function(*inputs)
    found = torch.autograd.grad(result, wanted, args[-1], allow_unused=True)
    return [
        torch.zeros_like(x) if d is None else d.clone() for x, d in zip(wanted, found, strict=True)
    ]


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
