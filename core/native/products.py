"""What native products multiply while a model is trained or scored: fp32 or bf16.

In bf16 the operands of a product are rounded to it and the sums are fp32; weights, activations and
gradients stay fp32 outside of products (as automatic mixed precision has it). That wants a
processor with AVX512-BF16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from puna.core.native.loader import best_instructions

NAMES = ("fp32", "bf16")

_in_force: ContextVar[str] = ContextVar("products", default="fp32")


def products() -> str:
    """Which products are in force here: "fp32" or "bf16"."""
    return _in_force.get()


def multiplies_bf16() -> bool:
    """Whether this machine has an instruction for products of bf16."""
    return best_instructions() == "avx512_bf16"


@contextmanager
def use_products(name: str) -> Iterator[None]:
    """Until the block ends, in this thread, native products are of `name`: "fp32" or "bf16".

    The backward of what was computed in the block has the same ones, wherever it runs. ValueError
    for another name, and for bf16 on a machine that cannot multiply it.
    """
    if name not in NAMES:
        raise ValueError(f"products are {name!r}; expected one of {', '.join(NAMES)}")
    if name == "bf16" and not multiplies_bf16():
        raise ValueError("this machine has no products of bf16 (AVX512-BF16); use fp32")
    token = _in_force.set(name)
    try:
        yield
    finally:
        _in_force.reset(token)
