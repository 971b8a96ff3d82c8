"""In what a whole run multiplies."""

from typing import Literal

from puna.core import ops

Products = Literal["auto", "fp32", "bf16"]


def products(name: Products) -> Literal["fp32", "bf16"]:
    """What matrix products are made in, "fp32" or "bf16": "auto" is bf16 where the processor has
    an instruction for it."""
    if name == "auto":
        return "bf16" if ops.multiplies_bf16() else "fp32"
    return name
