"""Random numbers for sampling: each draw is a function of who draws it, and of nothing else.

The draw for token t of sample k of prompt i in round r is a hash of (seed, r, i, k, t). So
what is sampled does not depend on batch size, order, or how many processes share the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from puna.core import ops

EosIds: TypeAlias = int | list[int] | tuple[int, ...] | None
"""what ends a text: nothing, one token or any of several"""


class Sampler(NamedTuple):
    """How to draw: temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def all_of(eos_id: EosIds) -> tuple[int, ...]:
    """None, one or several ids as several."""
    if eos_id is None:
        return ()
    return tuple(eos_id) if isinstance(eos_id, (tuple, list)) else (eos_id,)


def check_settings(
    sampler: Sampler,
    *,
    seed: int,
    round_index: int,
    max_new_tokens: int,
    eos_id: EosIds,
    batch_size: int = 1,
) -> None:
    """ValueError, one sentence, for settings that no back end can draw with."""
    for name, value in zip(Sampler._fields, sampler, strict=True):
        _number(name, value, whole=name == "top_k")
    ops.check_settings(*sampler)
    ids = [("eos_id", token) for token in all_of(eos_id)]
    for name, value in (("seed", seed), ("round_index", round_index), *ids):
        _number(name, value, whole=True)
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is {value}; it must fit 64 bits, -2^63 to 2^63 - 1")
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("batch_size", batch_size, 1),
    ):
        _number(name, value, whole=True)
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def _number(name: str, value: Any, *, whole: bool) -> None:
    kinds, said = (Integral, "a whole number") if whole else (Real, "a number")
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be {said}")


@contextmanager
def blamed(model: str) -> Iterator[None]:
    """ValueError that names the model where its logits leave nothing to draw from."""
    try:
        yield
    except ops.NoDistribution as error:
        raise ValueError(
            f"{model} cannot be sampled from: its logits hold NaN or inf (training that diverged, "
            "or damaged weights); take an earlier checkpoint or the weights it was made from"
        ) from error


def row_keys(seed: int, round_index: int, prompts: Tensor, samples: Tensor) -> Tensor:
    """One int64 key a row, from prompt numbers and sample numbers, both (B,) int64."""
    key = ops.mix64(torch.full_like(prompts, seed))
    for part in (torch.full_like(prompts, round_index), prompts, samples):
        key = ops.mix64(key ^ part)
    return key


def step_seeds(keys: Tensor, t: int | Tensor) -> Tensor:
    """Seeds (B,) for the t-th token of the answers with these keys (B,)."""
    return ops.mix64(keys ^ torch.as_tensor(t, dtype=torch.int64, device=keys.device))
