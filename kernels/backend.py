"""Which implementation an operation runs: the PyTorch reference, Triton, or flash-attn.

Chosen per tensor: Triton for fp32, fp16 and bf16 on a GPU (CUDA or ROCm), the reference for
everything else. `use_backend(name)` forces one; what is forced and cannot run is an error.

Triton kernels are registered as operators, so that torch.compile, fake tensors and selective
activation checkpointing see one opaque operation (`torch.ops.<namespace>.<name>`). Plain eager
calls go past the registration, which costs some 10 us a call.
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the reference remains
    triton, tl = None, SimpleNamespace(constexpr=None)

__all__ = [
    "INTERPRETED", "as_rows", "cast", "choose", "debug", "differentiable", "first_only", "forced",
    "jit", "on_device", "once", "opaque", "processors", "registered", "tl", "traced", "triton",
    "use_backend", "visible",
]  # fmt: skip

BACKENDS = frozenset({"auto", "reference", "triton", "flash_attn"})
# The interpreter (TRITON_INTERPRET=1 before triton is imported) runs kernels on CPU tensors. Its
# bf16 products are wrong: tl.dot's operands are upcast where this is set, and only there.
_interpreted = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = tl.constexpr(_interpreted) if triton else None
# Two copies of this folder in one process must not register the same names.
NAMESPACE = __package__.replace(".", "_")

FIRST_ONLY = (
    "this operation has a first derivative only: where you need a second one, write it in plain "
    "PyTorch"
)

_asked: tuple["use_backend", ...] = ()  # what is in force, the latest last
_forced = "auto"  # the main thread's latest
_others = False  # whether another thread has asked for something
_asking = threading.Lock()


class use_backend:
    """Forces a back end for every operation that has it: "reference", "triton" or "flash_attn".

    `with use_backend("reference"): ...` for a block, `use_backend("reference")` for good, "auto"
    to choose per tensor again. An operation without the forced back end (flash-attn is for
    attention alone) chooses as usual. What the main thread asks for holds for all threads that
    ask for nothing (autograd's on a GPU, say); what another thread asks for, for that thread
    alone. Raises ValueError for an unknown name.
    """

    names = BACKENDS

    def __init__(self, name: str):
        if name not in self.names:
            raise ValueError(f"back end is {name!r}, expected one of {sorted(self.names)}")
        self.name, self.thread = name, threading.get_ident()
        with _asking:
            _put((*_asked, self))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        with _asking:  # with it goes what this thread has asked for since
            before = _asked[: _asked.index(self)] if self in _asked else _asked
            since = _asked[len(before) :]
            _put((*before, *(each for each in since if each.thread != self.thread)))


def _put(asked: tuple[use_backend, ...]) -> None:
    global _asked, _forced, _others
    main = threading.main_thread().ident
    of_main = [each.name for each in asked if each.thread == main]
    _asked, _others = asked, len(of_main) < len(asked)
    _forced = of_main[-1] if of_main else "auto"


def forced() -> str:
    """The back end asked for, or "auto"."""
    if not _others or torch.compiler.is_compiling():  # Dynamo knows no threads
        return _forced
    me = threading.get_ident()
    return next((each.name for each in reversed(_asked) if each.thread == me), _forced)


def choose(*tensors: Tensor, unless: str | None = None) -> str:
    """Which of "reference" and "triton" takes these tensors, all on the first one's device.

    `unless` is what else keeps the operation from Triton. Raises ValueError where Triton is
    forced and cannot take them.
    """
    name = forced()
    if name == "reference" or (name != "triton" and not tensors[0].is_cuda):
        return "reference"
    why = unless
    for tensor in tensors:
        why = why or _why_not_triton(tensor)
    if name == "triton" and why:
        raise ValueError(f"the triton back end is forced, but {why}")
    return "reference" if why else "triton"


def _why_not_triton(tensor: Tensor) -> str | None:
    if triton is None:
        return "triton is not installed"
    if not tensor.is_cuda and not (_interpreted and tensor.device.type == "cpu"):
        return (
            f"the tensor is on {tensor.device}: move it to a GPU, or set TRITON_INTERPRET=1 "
            "before Python starts to run kernels on the CPU, slowly"
        )
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its dtype is {tensor.dtype}: use float32, float16 or bfloat16"
    return None


def debug() -> bool:
    """PUNA_DEBUG=1: also check what only the device can see, at the price of waiting for it."""
    return os.environ.get("PUNA_DEBUG") == "1"


def visible(tensor: Tensor) -> bool:
    """Whether values may be checked: on the CPU or under PUNA_DEBUG=1, never while tracing."""
    if traced():
        return False
    return tensor.device.type == "cpu" or (debug() and not tensor.is_meta)


def as_rows(x: Tensor) -> Tensor:
    """(N, C) with neighbouring columns next to each other: a view wherever one exists."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU, to size grids; 132 (an H100's) where there is none."""
    return _processors(tensor.device) if tensor.is_cuda else 132


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; an H100's where there is no GPU."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current GPU: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def jit(kernel: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`, or the bare function where triton is missing (and nothing will launch it)."""
    if kernel is None:
        return functools.partial(jit, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


@jit
def cast(x, dtype: tl.constexpr):
    """x in fp32 to `dtype`, to the nearest (the interpreter truncates towards zero in bf16)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


def traced() -> bool:
    """Something other than plain eager execution wants to see one operation."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def registered(fake: Callable) -> Callable[[Callable], Callable]:
    """Registers a launcher (tensors and numbers in, new tensors out) under its own name.

    `fake` has the same signature and returns empty tensors of the right shapes and dtypes.
    """

    def decorate(launch: Callable) -> Callable:
        name = f"{NAMESPACE}::{launch.__name__.strip('_')}"
        operator = torch.library.custom_op(name, launch, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            if traced():
                return operator(*args)
            return launch(*args)

        call.operator = operator  # type: ignore[attr-defined]
        return call

    return decorate


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

    @functools.wraps(backward)
    def refusing(ctx, *upstream):
        if not torch.is_grad_enabled():  # it is under create_graph=True alone
            return backward(ctx, *upstream)
        unpacked = _Unpacked(ctx)
        connected = [x for x in unpacked.saved_tensors if x is not None and x.requires_grad]
        whole = any(x.grad_fn is ctx for x in connected)
        if not whole and len(connected) < sum(ctx.needs_input_grad):
            raise RuntimeError(FIRST_ONLY)
        with torch.no_grad():
            grads = backward(unpacked, *upstream)
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
    if torch.is_grad_enabled() and not traced() and any(x.requires_grad for x in tensors):
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

    For plain PyTorch functions with one result whose shape `fake` gives. Eager calls are left
    alone. The operator's derivative runs the function again: right for any function, at the price
    of a second forward.
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
            return operator(*args) if torch.compiler.is_compiling() else function(*args)

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
