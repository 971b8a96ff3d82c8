"""The operations as the engine uses them: what `kernels` offers, under one import.

`use_backend` also takes "native" here: the operations and the generation of `puna.core._C`.
"""

from torch import Tensor

from puna import kernels
from puna.core import native_attention, native_loss
from puna.kernels import add_rms_norm as add_rms_norm
from puna.kernels import decode_attention as decode_attention
from puna.kernels import gae as gae
from puna.kernels import linear_logprobs as linear_logprobs
from puna.kernels import rms_norm as rms_norm
from puna.kernels import rope as rope
from puna.kernels import rope_tables as rope_tables
from puna.kernels import sample as sample
from puna.kernels import swiglu as swiglu
from puna.kernels import use_backend as use_backend
from puna.kernels.backend import BACKENDS
from puna.kernels.backend import forced as forced
from puna.kernels.backend import traced as traced
from puna.kernels.sample import mix64 as mix64

BACKENDS.add("native")


def native_wanted() -> bool:
    """Whether native code is to do what it can. Traced tensors (torch.compile, fake ones) have no
    memory to hand to it."""
    return forced() in ("auto", "native") and not traced()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`kernels.attention`, or the native one for fp32 on the CPU."""
    if native_wanted() and native_attention.fits(q, k, v, cu_seqlens, scale):
        return native_attention.attention(q, k, v, cu_seqlens, scale)
    return kernels.attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """`kernels.linear_cross_entropy`, or the native one for fp32 on the CPU, "mean" and "sum"."""
    if native_wanted() and native_loss.fits(hidden, weight, targets, weights, reduction):
        return native_loss.linear_cross_entropy(
            hidden, weight, targets, weights, ignore_index, reduction, z_loss
        )
    return kernels.linear_cross_entropy(
        hidden, weight, targets, weights=weights, ignore_index=ignore_index,
        reduction=reduction, z_loss=z_loss,
    )  # fmt: skip
