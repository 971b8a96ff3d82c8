"""From answers to rewards: two reward models, and the paper's Eq. 4.

    R_c = R_s  if is_safety(prompt) or sigma(R_s) < 0.15,  else R_h
    R   = WHITEN(LOGIT(sigma(R_c))) - beta * KL(policy || reference)

The logit undoes the sigmoid, so the raw score of the chosen model is whitened. S answers,
T tokens of the longest one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core.model import Transformer
from puna.trainers.rl.losses import AllSum, identity, whiten
from puna.trainers.rl.packed import AllMax, forward_groups, one_rank

SAFETY_THRESHOLD = 0.15  # on sigma(R_s): precision 0.89, recall 0.55 on Meta's safety test set
RAW_SAFETY_THRESHOLD = math.log(SAFETY_THRESHOLD / (1 - SAFETY_THRESHOLD))

# What an answer that ran out of tokens before its EOS is worth. The paper does not say.
UNFINISHED = ("keep", "subtract", "replace", "mask")


@torch.no_grad()
def score(
    model: Transformer,
    sequences: Sequence[list[int]],
    *,
    max_tokens: int = 16384,
    all_max: AllMax = one_rank,
) -> Tensor:
    """Raw scores (S,), fp32, of whole dialogues (prompt and answer ids), on the model's device.

    Each is read at the sequence's last token, the same place as in training: EOS if the answer
    has one. Nothing is padded, so there is no padding to mistake for it. `max_tokens` bounds one
    forward pass. Raises ValueError for a language model or an empty sequence.
    """
    if model.head != "score":
        raise ValueError("this checkpoint has a language-model head; scoring needs a reward model")
    if any(not sequence for sequence in sequences):
        raise ValueError("an empty sequence cannot be scored")
    device = next(model.parameters()).device
    scores = torch.empty(len(sequences), dtype=torch.float32, device=device)
    for group, hidden, starts in forward_groups(model, sequences, max_tokens, all_max):
        last = model.logits(hidden[starts[1:] - 1])[:, 0]
        if group:
            scores[torch.tensor(group, device=device)] = last.float()
    return scores


class Combined(NamedTuple):
    """The scores that Eq. 4's switch let through, and which way it went."""

    raw: Tensor  # (S,) fp32, the chosen model's raw score: logit(sigma(R_c))
    from_safety: Tensor  # (S,) bool, True where the safety model's score was taken
    branches: dict[str, int]  # how many by "is_safety", "unsafe" (below 0.15), "helpfulness"


def combine(helpfulness: Tensor, safety: Tensor, is_safety: Tensor) -> Combined:
    """Eq. 4's switch between raw scores helpfulness (S,) and safety (S,); is_safety (S,) bool."""
    unsafe = (safety < RAW_SAFETY_THRESHOLD) & ~is_safety
    from_safety = is_safety | unsafe
    counts = {
        "is_safety": int(is_safety.sum()),
        "unsafe": int(unsafe.sum()),
        "helpfulness": int((~from_safety).sum()),
    }
    return Combined(torch.where(from_safety, safety, helpfulness).float(), from_safety, counts)


def settle_unfinished(raw: Tensor, finished: Tensor, policy: str, penalty: float) -> Tensor:
    """Raw scores (S,) after the rule for answers without EOS (finished (S,) bool is False).

    keep: the reward model's opinion stands. subtract: minus `penalty`. replace: `-penalty`
    whatever the answer says. mask: as keep, but the caller gives these answers no gradient and
    no part in any whitening. All act before whitening, in units of the raw score. Raises
    ValueError for another name.
    """
    if policy not in UNFINISHED:
        raise ValueError(f"unknown rule '{policy}' for unfinished answers: {', '.join(UNFINISHED)}")
    if policy == "subtract":
        return torch.where(finished, raw, raw - penalty)
    if policy == "replace":
        return torch.where(finished, raw, torch.full_like(raw, -penalty))
    return raw


def token_rewards(
    raw: Tensor,
    kl: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    counted: Tensor | None = None,
    all_sum: AllSum = identity,
) -> Tensor:
    """Eq. 4 per token: whitened score on an answer's last token, minus beta * KL on each.

    raw: (S,) combined raw scores, whitened here over the batch of all ranks and before KL is
    subtracted (others whiten per token with the KL inside: that is not the paper's). kl: (S, T)
    k1 per token; lengths: (S,) tokens per answer, EOS included; counted: (S,) bool, answers that
    take part in the whitening. Returns (S, T), zero past an answer's end.
    """
    steps = torch.arange(kl.shape[1], device=kl.device)
    rewards = torch.where(steps < lengths[:, None], -beta * kl, torch.zeros_like(kl))
    terminal = whiten(raw, counted, all_sum)
    return rewards + torch.where(steps == lengths[:, None] - 1, terminal[:, None], 0.0)
