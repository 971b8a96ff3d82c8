"""Other people's kernels, each in a line or two: liger-kernel, quack, flash-attn, and what TRL
computes log-probs with. Where one has no counterpart of an operation it has no row."""

from typing import Any

import torch
from torch import Tensor

from puna.benchmarks import opponents
from puna.benchmarks.kernels.peers import EPS, Function


def peers_of(operation: str, device: torch.device) -> dict[str, Function]:
    """The installed ones' counterparts of an operation, by provider; none on a CPU, which hardly
    one of them takes."""
    if device.type != "cuda":
        return {}
    ways = {"liger-kernel": liger, "quack": quack, "flash-attn": flash_attn, "trl": trl}
    found = {name: way(operation) for name, way in ways.items()}
    return {name: function for name, function in found.items() if function is not None}


def liger(operation: str) -> Function | None:
    """liger-kernel's."""
    theirs, _ = opponents.module("liger-kernel")
    if theirs is None:
        return None

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        angles = (torch.cat((x, x), -1)[None, : q.shape[1]] for x in (cos, sin))
        turned = theirs.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *angles)
        return tuple(x.transpose(1, 2) for x in turned)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        # By default it sums dW over chunks in bf16.
        exact = {"accum_dtype": torch.float32}
        return (theirs.liger_fused_linear_cross_entropy(hidden, weight, targets, **exact),)

    known: dict[str, tuple[str, Function]] = {
        "rms_norm": ("liger_rms_norm", lambda x, w: (theirs.liger_rms_norm(x, w, EPS),)),
        "add_rms_norm": (
            "liger_fused_add_rms_norm",
            lambda x, r, w: tuple(theirs.liger_fused_add_rms_norm(x, r, w, EPS)),
        ),
        "rope": ("liger_rope", rope),
        "swiglu": ("liger_swiglu", lambda gate, up: (theirs.liger_swiglu(gate, up),)),
        "linear_cross_entropy": ("liger_fused_linear_cross_entropy", loss),
    }
    name, function = known.get(operation, ("", None))
    return function if hasattr(theirs, name) else None


def quack(operation: str) -> Function | None:
    """quack's, for Hopper and later."""
    norm: Any = opponents.function("quack", "rmsnorm", "quack")
    loss: Any = opponents.function("quack", "chunked_linear_cross_entropy")
    known: dict[str, tuple[Any, Function]] = {
        "rms_norm": (norm, lambda x, w: (norm(x, w, eps=EPS),)),
        "add_rms_norm": (
            norm,
            lambda x, r, w: tuple(norm(x, w, residual=r, eps=EPS, prenorm=True)),
        ),
        "linear_cross_entropy": (loss, lambda h, w, t: (loss(h, w, t),)),
    }
    there, function = known.get(operation, (None, None))
    return function if there is not None else None


def flash_attn(operation: str) -> Function | None:
    """flash-attn's: (B, T, H, D) as ours, fewer key/value heads allowed."""
    whole: Any = opponents.function("flash-attn", "flash_attn_func")
    cached: Any = opponents.function("flash-attn", "flash_attn_with_kvcache")
    known: dict[str, tuple[Any, Function]] = {
        "attention": (whole, lambda q, k, v: (whole(q, k, v, causal=True),)),
        "decode_attention": (
            cached,
            lambda q, k, v, n: (cached(q, k, v, cache_seqlens=n.int(), causal=True),),
        ),
    }
    there, function = known.get(operation, (None, None))
    return function if there is not None else None


def trl(operation: str) -> Function | None:
    """How TRL's trainers find log-probs and entropy: from all logits, in fp32."""
    chosen: Any = opponents.function("trl", "selective_log_softmax")
    entropy: Any = opponents.function("trl", "entropy_from_logits")
    if operation != "linear_logprobs" or chosen is None or entropy is None:
        return None

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = (hidden @ weight.T).float()
        return chosen(logits[None], targets[None])[0], entropy(logits[None])[0]

    return logprobs
