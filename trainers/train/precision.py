"""What `dtype` means where a stage runs.

On a GPU weights are gathered and multiplied in bf16. On a CPU with AVX512-BF16 the model stays in
fp32, and native products round what they multiply (`ops.use_products`). Other CPUs do what a GPU
does. torch.compile traces past native code, and does so too.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

from puna.core import ops
from puna.core.device import device_of_name

# what weights are gathered and multiplied in, by the name in a recipe; None: what they are kept in
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


def products_of(config: Any) -> str:
    """The native products of a stage with this configuration: "bf16" or "fp32", which it is too
    for a run of several stages: that has no device, each stage has its own."""
    if getattr(config, "dtype", "fp32") != "bf16" or not hasattr(config, "device"):
        return "fp32"
    if not ops.multiplies_bf16():
        return "fp32"
    compiled = getattr(getattr(config, "parallel", None), "compile", False)
    native = ops.forced() in ("auto", "native") and not compiled
    return "bf16" if native and device_of_name(config.device).type == "cpu" else "fp32"


def compute_dtype(config: Any) -> torch.dtype | None:
    """What the stage's weights are gathered and multiplied in; None for what they are kept in."""
    return None if products_of(config) == "bf16" else DTYPES[config.dtype]


def computing(config: Any) -> AbstractContextManager[None]:
    """A block that computes as the stage does."""
    return ops.use_products(products_of(config))
