"""Losses and estimators of reward modelling and PPO: pure functions of tensors.

No loss here averages over a batch: each returns one number per pair, response or token, and the
caller divides the sum by a count taken over all ranks. So a loss does not depend on the number of
ranks or on how a batch is cut into micro-batches. `moments` and `whiten` are over all ranks.

P preference pairs, S responses, A answer tokens laid end to end. Everything is computed in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.core import parallel

# m(r) of Eq. 2 for each of the four ratings: the paper's Table 27, and Eq. 1 (no margin).
MARGINS: dict[str, dict[str, float]] = {
    "none": {
        "significantly_better": 0.0,
        "better": 0.0,
        "slightly_better": 0.0,
        "negligibly_better": 0.0,
    },
    "small": {
        "significantly_better": 1.0,
        "better": 2 / 3,
        "slightly_better": 1 / 3,
        "negligibly_better": 0.0,
    },
    "large": {
        "significantly_better": 3.0,
        "better": 2.0,
        "slightly_better": 1.0,
        "negligibly_better": 0.0,
    },
}


def ranking_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> Tensor:
    """Eq. 1 and 2: -log sigma(r_chosen - r_rejected - m), per pair.

    chosen, rejected: (P,) raw scores; margins: (P,) m(r), None for Eq. 1. Returns (P,).
    """
    difference = chosen.float() - rejected.float()
    if margins is not None:
        difference = difference - margins.float()
    return -F.logsigmoid(difference)


def safety_loss(scores: Tensor, safe: Tensor) -> Tensor:
    """The safety auxiliary loss, per response: does the score itself tell safe from unsafe?

    The paper uses such a loss (A.3.4, Table 29) and gives neither its formula nor its weight.
    This is our reading: binary cross-entropy of sigma(score) against the annotator's label, added
    to the ranking loss with a weight lambda of our choice. It acts on the same scalar as the
    ranking loss, because the thresholds 0.5 (Table 29) and 0.15 (Eq. 4) are cut on sigma(score);
    the ranking loss alone leaves that scalar's zero point free.

    scores: (S,) raw; safe: (S,) 1 safe, 0 unsafe, NaN where nobody was asked. Returns (S,), zero
    where the label is NaN: divide the sum by the number of labels, not by S.
    """
    known = ~torch.isnan(safe)
    labels = torch.where(known, safe, torch.zeros_like(safe)).float()
    loss = F.binary_cross_entropy_with_logits(scores.float(), labels, reduction="none")
    return torch.where(known, loss, torch.zeros_like(loss))


LARGEST_LOG_RATIO = 20.0  # e^20 is 5e8; from 88 on the ratio is inf in fp32, and inf * 0 is NaN


def ratios(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi(token) / pi_old(token) (A,), their log kept within +-20: beyond, there is no gradient."""
    return (logprobs - old_logprobs).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate, per token, as a loss: -min(ratio * A, clamp(ratio) * A).

    logprobs: (A,) of the policy being trained; old_logprobs: (A,) as the tokens were drawn;
    advantages: (A,); clip: half width of the trusted interval around ratio 1. Returns (A,). The
    log of the ratio is kept within +-20, so that a policy far off gives a large number and not NaN.
    """
    ratio = ratios(logprobs, old_logprobs)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the critic, per token; with `clip` the worse of the plain error
    and of the error after the value may have moved at most `clip` since the rollout.

    values, old_values, returns: (A,). Returns (A,).
    """
    error = (values - returns).square()
    if clip is not None:
        moved = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (moved - returns).square())
    return 0.5 * error


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) per sampled token, unbiased; a single sample may be negative.

    The form that belongs in the reward (Eq. 4). As a loss its gradient has expectation zero.
    """
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-x) - 1 + x of the log-ratio x per sampled token: unbiased, low variance and never
    negative: the form to log."""
    difference = ref_logprobs - logprobs
    return torch.expm1(difference.clamp(max=LARGEST_LOG_RATIO)) - difference


def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and (population) variance of x over its mask and over all ranks, fp64 scalars.

    x: any shape; mask: bool of the same shape, None for all.
    """
    kept = (x if mask is None else x[mask]).double()
    count, total = parallel.all_sum(torch.stack([kept.new_tensor(float(kept.numel())), kept.sum()]))
    mean = total / count.clamp(min=1)
    squares = parallel.all_sum((kept - mean).square().sum()[None])[0]
    return count, mean, squares / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """x with zero mean and unit variance over its mask and over all ranks.

    What the mask leaves out does not count and comes back as 0. Fewer than two values have no
    spread to divide by: they are only centred. Shapes as in `moments`; returns x's shape.
    """
    count, mean, variance = moments(x, mask)
    scale = torch.where(count < 2, torch.ones_like(variance), torch.rsqrt(variance + eps))
    whitened = ((x.double() - mean) * scale).to(x.dtype)
    return whitened if mask is None else torch.where(mask, whitened, torch.zeros_like(whitened))
