"""One training step of each provider: forward, backward, clipping and AdamW, on the same tokens."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from puna.benchmarks.machine import why_not_compiled
from puna.core import ops, parallel
from puna.core.model import Transformer
from puna.core.native.loader import keep_freed_memory

Step = Callable[[], float]  # returns the loss before the update


def puna_step(
    model: Transformer,
    tokens: Tensor,
    compute_dtype: torch.dtype | None = None,
    checkpointing: str = "none",
    replicate: int = 1,
) -> Step:
    """As the trainers do: applied from outside, weights in fp32 whatever they are multiplied in.
    Of several ranks each gives its own `tokens`, and its part of the loss is returned."""
    on_cpu = tokens.device.type == "cpu"
    native = on_cpu and compute_dtype == torch.bfloat16 and ops.multiplies_bf16()
    model = parallel.prepare(
        model,
        compute_dtype=None if native else compute_dtype,
        checkpointing=checkpointing,
        replicate=replicate,
    )
    if on_cpu:
        keep_freed_memory()  # as the trainers do; who shares the process gains by it too
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]

    def loss() -> Tensor:
        with ops.use_products("bf16" if native else "fp32"):
            return model.cross_entropy(model(tokens), targets) / parallel.world_size()

    return training_step(model, loss)


def transformers_step(model: Any, tokens: Tensor, dtype: torch.dtype | None = None) -> Step:
    model.train()

    def loss() -> Tensor:
        with torch.autocast(tokens.device.type, dtype, enabled=dtype is not None):
            found: Tensor = model(tokens, labels=tokens, use_cache=False).loss
        return found

    return training_step(model, loss)


def compiled_step(model: Any, tokens: Tensor, dtype: torch.dtype | None = None) -> Step:
    """The peer under torch.compile, loss included; its first call compiles, for a minute."""
    torch.compiler.reset()  # what was compiled for another shape is not for this one
    return transformers_step(torch.compile(model, dynamic=False), tokens, dtype)


@functools.cache
def compiles(device: torch.device) -> bool:
    """Whether torch.compile works on `device`. Where it does not, says why, once."""
    why = why_not_compiled(device)
    if why:
        print(f"torch.compile does not work here, its rows are left out: {why}")
    return not why


def clip(model: torch.nn.Module) -> None:
    """The gradients' norm to 1, as each provider's own users do."""
    if isinstance(model, Transformer):
        parallel.clip_gradients(model, 1.0)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Step:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
    )

    def step() -> float:
        value = loss()
        value.backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step
