"""Draw one token a row from logits: temperature, top-k, top-p, and the token's log-prob.

Each row has its own 64-bit seed; the draw is a counter-based random number of that seed
alone, so it does not depend on the batch it is in. One uniform number picks the token by
inverting the cumulative distribution of the tokens that top-k and top-p keep.
top-p keeps the most likely tokens while the mass before a token is at most p (Meta's rule).
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's step on int64 (...,): add the golden gamma, then its finaliser."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's >> on int64 drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seeds: Tensor) -> Tensor:
    """One fp64 number in [0, 1) for each int64 seed: the top 53 bits of its hash."""
    return _shift(mix64(seeds), 11).double() * 2.0**-53


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw from `logits` (B, V) with `seeds` (B,) int64; returns (tokens, logprobs), both (B,).

    Log-probs are fp32, of the tempered but untruncated distribution. temperature 0 is greedy
    (its log-probs are those at temperature 1). top_k 0 and top_p 1 switch truncation off.
    Raises ValueError for shapes that do not fit and settings outside their range.
    """
    if logits.dim() != 2 or seeds.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and seeds {tuple(seeds.shape)} do not fit (B, V), (B,)"
        )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature} must be >= 0, top_k {top_k} >= 0, top_p {top_p} in (0, 1]"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature not in (0, 1):
        wide = wide / temperature
    logp = torch.log_softmax(wide, -1)
    if temperature == 0:
        tokens = logp.argmax(-1)
    else:
        # Not logp.exp(): on CPUs torch's softmax is several times faster than its exp.
        tokens = _draw(torch.softmax(wide, -1), top_k, top_p, uniform(seeds))
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def _draw(probs: Tensor, top_k: int, top_p: float, u: Tensor) -> Tensor:
    if top_k == 0 and top_p == 1.0:
        return _invert(probs, u)
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = 0
    if top_p < 1.0:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before > top_p, 0)
    return index.gather(1, _invert(ordered, u)[:, None]).squeeze(1)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds u * total; never one of weight zero."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    tokens = torch.searchsorted(cumulative, u[:, None] * total, right=True)
    # u * total may round up to the total; the first place that reaches it has a weight.
    return torch.minimum(tokens, torch.searchsorted(cumulative, total)).squeeze(1)
