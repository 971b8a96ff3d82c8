"""Generalised advantage estimation over right-padded answers.

    delta[t] = r[t] + gamma * V[t+1] - V[t],   A[t] = delta[t] + gamma * lam * A[t+1]

with V and A zero past a row's last token: an answer ends there. returns = A + V. In fp32 (fp64
where an input is), without a gradient.
Source: Schulman et al. 2015 (the Llama 2 paper names PPO, not its gamma or lambda).
"""

import torch
from torch import Tensor

from .backend import as_rows, cast, choose, jit, on_device, registered, tl, visible
from .checks import check_number

BLOCK = 1024  # steps scanned at once


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (S, T), from rewards and values (S, T), lengths (S,).

    Whatever stands past a row's length is ignored and comes out as zero. Both come in the
    promoted dtype of rewards and values. Raises ValueError for shapes, dtypes or devices that do
    not fit, a `gamma` or `lam` outside 0 to 1, and for lengths past T or below 0 (in plain eager
    calls on the CPU, or under PUNA_DEBUG=1; elsewhere they count as T and 0).
    """
    _check(rewards, values, lengths)
    check_number("gamma", gamma, 0.0, 1.0)  # past 1 the powers that the scan joins overflow
    check_number("lam", lam, 0.0, 1.0)
    compute = gae_scan if choose(rewards, values) == "triton" else _reference
    return compute(rewards.detach(), values.detach(), lengths, gamma, lam)


def _check(rewards: Tensor, values: Tensor, lengths: Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape != values.shape or lengths.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)}, lengths "
            f"{tuple(lengths.shape)} do not fit (S, T), (S, T), (S,)"
        )
    if not rewards.device == values.device == lengths.device:
        raise ValueError(
            f"rewards are on {rewards.device}, values on {values.device}, lengths on "
            f"{lengths.device}: not the same device"
        )
    if not (rewards.is_floating_point() and values.is_floating_point()):
        raise ValueError(f"rewards are {rewards.dtype}, values {values.dtype}, expected floats")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths are {lengths.dtype}, expected int32 or int64")
    steps = rewards.shape[1]
    if len(lengths) and visible(lengths):
        shortest, longest = int(lengths.min()), int(lengths.max())
        if not 0 <= shortest <= longest <= steps:
            raise ValueError(f"lengths run from {shortest} to {longest}; {steps} steps are given")


# Reference


def _reference(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    steps = rewards.shape[1]
    real = torch.arange(steps, device=rewards.device) < lengths[:, None]
    rewards = rewards.to(wide).masked_fill(~real, 0.0)
    values = values.to(wide).masked_fill(~real, 0.0)
    following = torch.cat((values[:, 1:], values.new_zeros(len(values), 1)), 1)[:, :steps]
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(deltas))
    for t in range(steps - 1, -1, -1):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages.to(dtype), (advantages + values).masked_fill_(~real, 0.0).to(dtype)


# Triton


@jit
def _after(later_factor, later, factor, sum_):
    """Two neighbouring stretches as one, of A = sum + factor * (A past the stretch)."""
    return factor * later_factor, sum_ + factor * later


@jit
def gae_scan_kernel(
    # pointers
    REWARDS, VALUES, LENGTHS, ADVANTAGES, RETURNS,
    # sizes
    steps, gamma, decay,
    # strides of a row
    rewards_stride, values_stride,
    # compile-time settings
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, in blocks from its end. Values are read once: V[t+1] comes from a neighbour."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTHS + row)
    place = tl.arange(0, BLOCK)
    advantage = tl.full((), 0.0, tl.float32)  # of the first step past the block, and its value
    value = tl.full((), 0.0, tl.float32)
    blocks = tl.cdiv(steps, BLOCK)
    for back in range(blocks):
        t = (blocks - 1 - back) * BLOCK + place
        inside = t < steps
        # Not in the masks: they let no two elements be loaded at once if they end anywhere.
        real = inside & (t < length)
        r = tl.load(REWARDS + row * rewards_stride + t, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(VALUES + row * values_stride + t, mask=inside, other=0.0).to(tl.float32)
        r = tl.where(real, r, 0.0)
        v = tl.where(real, v, 0.0)
        following = tl.gather(v, tl.minimum(place + 1, BLOCK - 1), 0)
        following = tl.where(place == BLOCK - 1, value, following)
        delta = r + gamma * following - v
        factor = tl.where(real, decay, 0.0).to(tl.float32)
        reach, a = tl.associative_scan((factor, delta), 0, _after, reverse=True)
        a += reach * advantage
        a = tl.where(real, a, 0.0)
        tl.store(ADVANTAGES + row * steps + t, cast(a, ADVANTAGES.dtype.element_ty), mask=inside)
        tl.store(RETURNS + row * steps + t, cast(a + v, RETURNS.dtype.element_ty), mask=inside)
        advantage = tl.sum(tl.where(place == 0, a, 0.0))
        value = tl.sum(tl.where(place == 0, v, 0.0))


def _fake(rewards, values, lengths, gamma, lam):
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    made = rewards.new_empty(rewards.shape, dtype=dtype)
    return made, made.new_empty(made.shape)


@registered(_fake)
def gae_scan(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (S, T)."""
    advantages, returns = _fake(rewards, values, lengths, gamma, lam)
    if advantages.numel():
        rewards, values = as_rows(rewards), as_rows(values)
        with on_device(rewards):
            gae_scan_kernel[(rewards.shape[0],)](
                # pointers
                rewards, values, lengths.contiguous(), advantages, returns,
                # sizes
                rewards.shape[1], float(gamma), float(gamma * lam),
                # strides
                rewards.stride(0), values.stride(0),
                # settings
                BLOCK=BLOCK, num_warps=2,
            )  # fmt: skip
    return advantages, returns
