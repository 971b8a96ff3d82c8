"""One iteration of PPO after the sampling: rollout and scores -> experience -> gradient steps.

S answers of this rank, T tokens of the longest one. Every mean is over the tokens or answers of
all ranks, so neither the number of ranks nor the micro-batch size changes a loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import parallel
from puna.core.model import Transformer
from puna.core.ops import gae
from puna.trainers.rl.config import PPOConfig
from puna.trainers.rl.losses import k1, k3, moments, policy_loss, ratios, value_loss, whiten
from puna.trainers.rl.rewards import Scores, settle_unfinished, token_rewards
from puna.trainers.rl.rollout import Rollout, answer_logprobs, answer_states, answer_values
from puna.trainers.train import loop
from puna.trainers.train.run import Trained


class Experience(NamedTuple):
    """A rollout and everything the gradient steps need that was computed before the first."""

    rollout: Rollout
    scores: Tensor  # (S,), after the rule for unfinished answers
    ref_logprobs: Tensor  # (S, T)
    values: Tensor  # (S, T), of the critic at the time of the rollout
    advantages: Tensor  # (S, T), whitened
    returns: Tensor  # (S, T)
    counted: Tensor  # (S, T) bool, tokens that take part in the losses

    def select(self, rows: Sequence[int]) -> "Experience":
        """The rows given, in that order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.values.device)
        return Experience(self.rollout.select(rows), *(x[index] for x in self[1:]))


def make_experience(
    reference: Transformer, critic: Transformer, rollout: Rollout, raw: Tensor, config: PPOConfig
) -> Experience:
    """Reference, values, rewards, advantages: each network looks at the answers once.

    raw: (S,) fp32, what the reward says of each answer.
    """
    max_tokens = config.micro_batch_tokens
    ref_logprobs, _ = answer_logprobs(
        reference, rollout, temperature=config.temperature, max_tokens=max_tokens
    )
    values = answer_values(critic, rollout, max_tokens=max_tokens)
    scores = settle_unfinished(raw, rollout.finished, config.unfinished, config.unfinished_penalty)
    answers = rollout.finished if config.unfinished == "mask" else torch.ones_like(rollout.finished)
    rewards = token_rewards(
        scores,
        k1(rollout.logprobs, ref_logprobs),
        rollout.lengths,
        beta=config.beta,
        counted=answers,
        whitened=config.whiten,
    )
    advantages, returns = gae(rewards, values, rollout.lengths, gamma=config.gamma, lam=config.lam)
    counted = rollout.mask & answers[:, None]
    advantages = whiten(advantages, counted)
    return Experience(rollout, scores, ref_logprobs, values, advantages, returns, counted)


# Sampling and training round differently: in bf16 by 2e-3 to 1e-2, in fp32 by 1e-6 on average where
# not both are native code, which gives them the same bits.
RATIO_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


class Totals:
    """Sums and counts of named numbers, averaged over all ranks at the end."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """values: any shape; each element counts once."""
        flat = values.detach().to(self.device, torch.float64)
        pair = torch.stack([flat.sum(), flat.new_tensor(float(flat.numel()))])
        self.sums[name] = self.sums.get(name, torch.zeros_like(pair)) + pair

    def means(self) -> dict[str, float]:
        """Mean of each name over everything added on all ranks, which add the same names."""
        sums = parallel.all_sum(torch.stack(list(self.sums.values())))
        means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        return dict(zip(self.sums, means, strict=True))


class Rates(NamedTuple):
    """This iteration's learning rates; the policy's is None while the critic warms up."""

    policy: float | None
    critic: float


def update(
    policy: Trained, critic: Trained, experience: Experience, config: PPOConfig, rates: Rates
) -> dict[str, float]:
    """One pass over the answers: one gradient step of critic and policy per mini-batch.

    Mini-batch m holds the m-th equal part of this rank's rows. Returns the means of the pass over
    all ranks; a gradient that is not finite changes no weight and shows in its norm.
    """
    rows, minibatches = len(experience.rollout.answers), config.batch // config.minibatch
    assert rows % minibatches == 0, "the batch was checked to divide"
    size = rows // minibatches
    cuts = [list(range(m * size, (m + 1) * size)) for m in range(minibatches)]
    counts = torch.stack([experience.counted[cut].sum() for cut in cuts]).double()
    tokens = parallel.all_sum(counts).clamp(min=1).tolist()
    totals = Totals(experience.values.device)
    for number, cut in enumerate(cuts):
        part = experience.select(cut)
        critic_pass(critic.model, part, config, tokens[number], totals)
        norm = loop.step_optimizer(critic, rates.critic, config.clip)
        totals.add("critic_grad_norm", torch.tensor(norm))
        if rates.policy is None:
            continue
        policy_pass(policy.model, part, config, tokens[number], totals, first=number == 0)
        norm = loop.step_optimizer(policy, rates.policy, config.clip)
        totals.add("policy_grad_norm", torch.tensor(norm))
    return totals.means()


def critic_pass(
    critic: Transformer, part: Experience, config: PPOConfig, tokens: float, totals: Totals
) -> None:
    """Adds the gradient of the mean value loss over `tokens` counted tokens of all ranks."""
    for rows, hidden, _ in answer_states(
        critic, part.rollout, max_tokens=config.micro_batch_tokens
    ):
        values = critic.logits(hidden)[:, 0]
        if not rows:
            (0.0 * values.sum()).backward()
            continue
        real = part.rollout.mask[rows]
        kept = part.counted[rows][real]
        losses = value_loss(
            values[kept],
            part.values[rows][real][kept],
            part.returns[rows][real][kept],
            config.value_clip,
        )
        totals.add("value_loss", losses)
        (losses.sum() / tokens).backward()


def policy_pass(
    policy: Transformer,
    part: Experience,
    config: PPOConfig,
    tokens: float,
    totals: Totals,
    *,
    first: bool,
) -> None:
    """Adds the gradient of the mean clipped loss over `tokens` counted tokens of all ranks."""
    for rows, hidden, targets in answer_states(
        policy, part.rollout, max_tokens=config.micro_batch_tokens
    ):
        logprobs, entropy = policy.logprobs(hidden, targets, temperature=config.temperature)
        if not rows:
            (0.0 * logprobs.sum()).backward()
            continue
        real = part.rollout.mask[rows]
        kept = part.counted[rows][real]
        old = part.rollout.logprobs[rows][real]
        if first:
            tolerance = config.ratio_tolerance or RATIO_TOLERANCE[config.dtype]
            check_first_ratio(logprobs.detach(), old, tolerance)
        losses = policy_loss(
            logprobs[kept], old[kept], part.advantages[rows][real][kept], config.ratio_clip
        )
        ratio = ratios(logprobs.detach(), old)[kept]
        totals.add("policy_loss", losses)
        totals.add("ratio", ratio)
        totals.add("approx_kl", k3(old, logprobs.detach())[kept])  # KL(old || new), never negative
        totals.add("clip_fraction", ((ratio - 1).abs() > config.ratio_clip).double())
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


def rollout_metrics(
    experience: Experience, scores: Scores, policy: Transformer
) -> dict[str, float]:
    """Of the `policy`'s answers on all ranks: scores, branches, KL, lengths, the critic's fit."""
    rollout = experience.rollout
    mask = rollout.mask
    kl = k1(rollout.logprobs, experience.ref_logprobs)
    totals = Totals(kl.device)
    totals.add("reward", experience.scores)
    for name, part in scores.parts.items():
        totals.add(f"reward_{name}", part)
    totals.add("kl", kl.sum(1))  # nats per answer; k1, so it may dip below zero
    totals.add("kl_token_k1", kl[mask])
    totals.add("kl_token_k3", k3(rollout.logprobs, experience.ref_logprobs)[mask])
    totals.add("answer_tokens", rollout.lengths)
    totals.add("unfinished", (~rollout.finished).double())
    totals.add("return", experience.returns[experience.counted])
    means = totals.means()
    for name, branch in scores.branches.items():
        means[f"branch_{name}"] = parallel.counted(int(branch.sum()), policy)
    means["explained_variance"] = explained_variance(experience)
    return means


def explained_variance(experience: Experience) -> float:
    """1 - Var(returns - values) / Var(returns) over counted tokens; 0 where returns are flat."""
    error = experience.returns - experience.values
    _, _, unexplained = moments(error, experience.counted)
    _, _, spread = moments(experience.returns, experience.counted)
    return float(1 - unexplained / spread) if spread > 0 else 0.0
