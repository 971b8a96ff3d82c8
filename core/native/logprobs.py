"""`linear_logprobs` with each chunk of logits read once, for fp32 on the CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from puna.core.native.cross_entropy import chunks
from puna.core.native.linear import matmul
from puna.core.native.loader import address, best_instructions, extension, native, readable


class LogProbs(NamedTuple):
    """All (N,) fp32; the last three are for the backward."""

    logprobs: Tensor
    entropy: Tensor
    top: Tensor  # the largest logit
    total: Tensor  # of x = (logit - top) / temperature: the sum of e^x
    mean: Tensor  # of x under the distribution


def fits(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> bool:
    """Whether the native pass can do it. Mistakes do not fit: the kernels explain them."""
    return (
        extension() is not None
        and readable(hidden, weight)
        and targets.is_cpu
        and targets.dtype == torch.int64
        and weight.dim() == 2
        and len(weight) > 0
        and hidden.shape[:-1] == targets.shape
        and hidden.shape[-1] == weight.shape[-1]
        and temperature > 0
    )


def logprobs(rows: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> LogProbs:
    """Of labels (N,) given rows (N, C). ValueError where a label is not one."""
    found = LogProbs(*(rows.new_empty(len(rows)) for _ in LogProbs._fields))
    for part, logits in chunks(rows, weight):
        native().logprobs(
            best_instructions(), *logits.shape, address(logits), address(labels[part]),
            temperature, *(address(each[part]) for each in found), torch.get_num_threads(),
        )  # fmt: skip
    return found


def gradient(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    found: LogProbs,
    d_logprobs: Tensor,
    d_entropy: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(d rows (N, C), d weight (V, C)), each if `wanted`; the logits are formed again."""
    d_rows = rows.new_empty(rows.shape) if wanted[0] else None
    d_weight = weight.new_zeros(weight.shape) if wanted[1] else None
    kept = (*found[2:], d_logprobs.contiguous(), d_entropy.contiguous())
    for part, logits in chunks(rows, weight):
        native().logprobs_gradient(
            best_instructions(), *logits.shape, address(logits), address(labels[part]),
            temperature, *(address(each[part]) for each in kept), torch.get_num_threads(),
        )  # fmt: skip
        if d_rows is not None:
            matmul(logits, weight, d_rows[part])
        if d_weight is not None:
            matmul(logits.T, rows[part], d_weight, add=True)
    return d_rows, d_weight
