"""One iteration of PPO, without files: rollout -> experience -> gradient steps -> numbers.

S answers of this rank, T tokens of the longest one. Every mean is over the tokens or answers of
all ranks (`all_sum`), so neither the number of ranks nor the micro-batch size changes a loss.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core.model import Transformer
from puna.core.ops import gae
from puna.trainers.rl.losses import (
    AllSum,
    identity,
    k1,
    k3,
    moments,
    policy_loss,
    value_loss,
    whiten,
)
from puna.trainers.rl.packed import AllMax, one_rank
from puna.trainers.rl.rewards import Combined, combine, score, settle_unfinished, token_rewards
from puna.trainers.rl.rollout import Rollout, answer_logprobs, answer_states, answer_values


class Settings(NamedTuple):
    """What the arithmetic of an iteration depends on (see PPOConfig for sources)."""

    beta: float
    gamma: float
    lam: float
    clip: float
    value_clip: float | None
    temperature: float
    unfinished: str
    unfinished_penalty: float
    minibatches: int
    ratio_tolerance: float
    max_tokens: int
    all_sum: AllSum = identity
    all_max: AllMax = one_rank


class Models(NamedTuple):
    """The five networks of PPO; only the first two are trained."""

    policy: Transformer
    critic: Transformer
    reference: Transformer
    helpfulness: Transformer
    safety: Transformer


class Scores(NamedTuple):
    """What the reward models said of S answers; raw scores (S,) fp32."""

    helpfulness: Tensor
    safety: Tensor
    combined: Combined
    settled: Tensor  # (S,) combined score after the rule for unfinished answers


class Experience(NamedTuple):
    """A rollout and everything the gradient steps need that was computed before the first."""

    rollout: Rollout
    ref_logprobs: Tensor  # (S, T)
    values: Tensor  # (S, T), of the critic at the time of the rollout
    advantages: Tensor  # (S, T), whitened
    returns: Tensor  # (S, T)
    counted: Tensor  # (S, T) bool, tokens that take part in the losses

    def select(self, rows: Sequence[int]) -> "Experience":
        """The rows given, in that order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.values.device)
        return Experience(self.rollout.select(rows), *(x[index] for x in self[1:]))


def score_answers(
    models: Models, rollout: Rollout, is_safety: Tensor, settings: Settings
) -> Scores:
    """Both reward models on each answer, and Eq. 4's switch; is_safety (S,) bool."""
    sequences = rollout.sequences
    helpfulness, safety = (
        score(model, sequences, max_tokens=settings.max_tokens, all_max=settings.all_max)
        for model in (models.helpfulness, models.safety)
    )
    combined = combine(helpfulness, safety, is_safety.to(safety.device))
    settled = settle_unfinished(
        combined.raw, rollout.finished, settings.unfinished, settings.unfinished_penalty
    )
    return Scores(helpfulness, safety, combined, settled)


def make_experience(
    models: Models, rollout: Rollout, scores: Scores, settings: Settings
) -> Experience:
    """Reference, values, rewards, advantages: each network looks at the answers once."""
    max_tokens, all_max = settings.max_tokens, settings.all_max
    ref_logprobs, _ = answer_logprobs(
        models.reference,
        rollout,
        temperature=settings.temperature,
        max_tokens=max_tokens,
        all_max=all_max,
    )
    values = answer_values(models.critic, rollout, max_tokens=max_tokens, all_max=all_max)
    answers = torch.ones_like(rollout.finished)
    if settings.unfinished == "mask":
        answers = rollout.finished
    rewards = token_rewards(
        scores.settled,
        k1(rollout.logprobs, ref_logprobs),
        rollout.lengths,
        beta=settings.beta,
        counted=answers,
        all_sum=settings.all_sum,
    )
    advantages, returns = gae(
        rewards, values, rollout.lengths, gamma=settings.gamma, lam=settings.lam
    )
    counted = rollout.mask & answers[:, None]
    advantages = whiten(advantages, counted, settings.all_sum)
    return Experience(rollout, ref_logprobs, values, advantages, returns, counted)


class Totals:
    """Sums and counts of named numbers, averaged over all ranks at the end."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """values: any shape; each element counts once."""
        flat = values.detach().double()
        pair = torch.stack([flat.sum(), flat.new_tensor(float(flat.numel()))])
        self.sums[name] = self.sums.get(name, torch.zeros_like(pair)) + pair

    def means(self, all_sum: AllSum) -> dict[str, float]:
        """Mean of each name over everything added on all ranks, which add the same names."""
        sums = all_sum(torch.stack(list(self.sums.values())))
        means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        return dict(zip(self.sums, means, strict=True))


Step = Callable[[], float]  # clips, steps, clears gradients; returns the gradient norm


def update(
    models: Models,
    experience: Experience,
    settings: Settings,
    step_critic: Step,
    step_policy: Step | None,
) -> dict[str, float]:
    """One pass over the answers: one gradient step of critic and policy per mini-batch.

    Mini-batch m holds the m-th equal part of this rank's rows. `step_policy` None trains the
    critic alone (its warm-up). Returns the means of the pass over all ranks.
    """
    rows = len(experience.rollout.answers)
    assert rows % settings.minibatches == 0, "the batch was checked to divide"
    size = rows // settings.minibatches
    cuts = [list(range(m * size, (m + 1) * size)) for m in range(settings.minibatches)]
    counts = torch.stack([experience.counted[cut].sum() for cut in cuts]).double()
    tokens = settings.all_sum(counts).clamp(min=1).tolist()
    totals = Totals(experience.values.device)
    for number, cut in enumerate(cuts):
        part = experience.select(cut)
        critic_pass(models.critic, part, settings, tokens[number], totals)
        totals.add("critic_grad_norm", torch.tensor(step_critic()))
        if step_policy is None:
            continue
        policy_pass(models.policy, part, settings, tokens[number], totals, first=number == 0)
        totals.add("policy_grad_norm", torch.tensor(step_policy()))
    return totals.means(settings.all_sum)


def critic_pass(
    critic: Transformer, part: Experience, settings: Settings, tokens: float, totals: Totals
) -> None:
    """Adds the gradient of the mean value loss over `tokens` counted tokens of all ranks."""
    for rows, hidden, _ in answer_states(
        critic, part.rollout, max_tokens=settings.max_tokens, all_max=settings.all_max
    ):
        values = critic.logits(hidden)[:, 0]
        if not rows:
            (0.0 * values.sum()).backward()
            continue
        real, kept = part.rollout.mask[rows], part.counted[rows]
        kept = kept[real]
        losses = value_loss(
            values[kept],
            part.values[rows][real][kept],
            part.returns[rows][real][kept],
            settings.value_clip,
        )
        totals.add("value_loss", losses)
        (losses.sum() / tokens).backward()


def policy_pass(
    policy: Transformer,
    part: Experience,
    settings: Settings,
    tokens: float,
    totals: Totals,
    *,
    first: bool,
) -> None:
    """Adds the gradient of the mean clipped loss over `tokens` counted tokens of all ranks."""
    for rows, hidden, targets in answer_states(
        policy, part.rollout, max_tokens=settings.max_tokens, all_max=settings.all_max
    ):
        logprobs, entropy = policy.logprobs(hidden, targets, temperature=settings.temperature)
        if not rows:
            (0.0 * logprobs.sum()).backward()
            continue
        real, kept = part.rollout.mask[rows], part.counted[rows]
        kept = kept[real]
        old = part.rollout.logprobs[rows][real]
        if first:
            check_first_ratio(logprobs.detach(), old, settings.ratio_tolerance)
        losses = policy_loss(
            logprobs[kept], old[kept], part.advantages[rows][real][kept], settings.clip
        )
        ratio = torch.exp(logprobs.detach() - old)[kept]
        totals.add("policy_loss", losses)
        totals.add("ratio", ratio)
        totals.add("clip_fraction", ((ratio - 1).abs() > settings.clip).double())
        totals.add("entropy", entropy[kept])
        (losses.sum() / tokens).backward()


def check_first_ratio(logprobs: Tensor, old_logprobs: Tensor, tolerance: float) -> None:
    """Before its first step the policy is the one that sampled: ratio 1 for every token.

    logprobs, old_logprobs: (A,). The mean |log ratio| beyond `tolerance` means that sampling and
    training see different tokens, positions, temperatures or weights: an error of ours, which
    would otherwise only look like slow learning.
    """
    distance = (logprobs - old_logprobs).abs().mean().item()
    assert distance <= tolerance, (
        f"the first mini-batch's mean |log ratio| is {distance:.2e}, above {tolerance:.0e}: "
        "sampling and training disagree about the policy"
    )


def rollout_metrics(experience: Experience, scores: Scores, all_sum: AllSum) -> dict[str, float]:
    """What the answers of all ranks were like: scores, branches, KL, lengths, the critic's fit."""
    rollout = experience.rollout
    mask = rollout.mask
    kl = k1(rollout.logprobs, experience.ref_logprobs)
    totals = Totals(kl.device)
    totals.add("reward", scores.settled)
    totals.add("reward_helpfulness", scores.helpfulness)
    totals.add("reward_safety", scores.safety)
    totals.add("kl", kl.sum(1))  # nats per answer; k1, so it may dip below zero
    totals.add("kl_token_k1", kl[mask])
    totals.add("kl_token_k3", k3(rollout.logprobs, experience.ref_logprobs)[mask])
    totals.add("answer_tokens", rollout.lengths)
    totals.add("unfinished", (~rollout.finished).double())
    totals.add("return", experience.returns[experience.counted])
    means = totals.means(all_sum)
    branches = scores.combined.branches
    counts = all_sum(torch.tensor(list(branches.values()), dtype=torch.float64, device=kl.device))
    for name, count in zip(branches, counts.tolist(), strict=True):
        means[f"branch_{name}"] = int(count)
    means["explained_variance"] = explained_variance(experience, all_sum)
    return means


def explained_variance(experience: Experience, all_sum: AllSum) -> float:
    """1 - Var(returns - values) / Var(returns) over counted tokens; 0 where returns are flat."""
    error = experience.returns - experience.values
    _, _, unexplained = moments(error, experience.counted, all_sum)
    _, _, spread = moments(experience.returns, experience.counted, all_sum)
    return float(1 - unexplained / spread) if spread > 0 else 0.0
