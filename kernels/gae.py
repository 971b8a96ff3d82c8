"""Generalised advantage estimation over right-padded answers.

    delta[t] = r[t] + gamma * V[t+1] - V[t],   A[t] = delta[t] + gamma * lam * A[t+1]

with V and A zero past a row's last token: an answer ends there. returns = A + V.
Source: Schulman et al. 2015 (the Llama 2 paper names PPO, not its gamma or lambda).
"""

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (S, T), from rewards and values (S, T), lengths (S,).

    Whatever stands past a row's length is ignored and comes out as zero. Raises ValueError
    for shapes or lengths that do not fit.
    """
    if rewards.shape != values.shape or lengths.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)}, lengths "
            f"{tuple(lengths.shape)} do not fit (S, T), (S, T), (S,)"
        )
    steps = rewards.shape[1]
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(
            f"lengths run from {int(lengths.min())} to {int(lengths.max())}; "
            f"{steps} steps are given"
        )
    real = torch.arange(steps, device=rewards.device) < lengths[:, None]
    rewards = rewards.masked_fill(~real, 0.0)
    values = values.masked_fill(~real, 0.0)
    following = torch.cat((values[:, 1:], values.new_zeros(len(values), 1)), 1)
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(deltas))
    for t in range(steps - 1, -1, -1):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, (advantages + values).masked_fill(~real, 0.0)
