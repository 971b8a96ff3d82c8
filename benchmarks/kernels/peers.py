"""What the operations are compared with first: plain PyTorch and its fused attention.

Each function takes the inputs of its case (see cases.py) and returns a tuple of tensors.
The plain ones are written as Llama's public code writes them, in at least fp32 where that does;
run in fp64 they are also what every provider is judged by.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

EPS = 1e-5

Function = Callable[..., tuple[Tensor, ...]]


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * (wide(x) * scale).to(x.dtype),)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    summed = residual + x
    return *rms_norm(summed, weight), summed


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    def turned(x: Tensor) -> Tensor:
        a, b = wide(x).chunk(2, -1)
        c, s = cos[: x.shape[1], None], sin[: x.shape[1], None]
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    return turned(q), turned(k)


def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (silu(gate) * up,)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, D): softmax(q k^T) v with the keys repeated for their group and a mask."""
    tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[3] ** -0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    probs = torch.softmax(wide(scores.masked_fill(future, -torch.inf)), -1).to(q.dtype)
    return ((probs @ v).transpose(1, 2),)


def attention_by_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """`attention` in the memory of one key/value head: for fp64 at full size."""
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    parts = zip(q.split(group, 2), k.split(1, 2), v.split(1, 2), strict=True)
    done = [checkpoint(attention, *part, use_reentrant=False)[0] for part in parts]
    assert len(done) == heads
    return (torch.cat(done, 2),)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return (out.transpose(1, 2),)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """q (B, 1, H, D), caches (B, T, K, D): one product a key/value head, nothing repeated."""
    folded = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])
    scores = folded @ k.permute(0, 2, 3, 1) * q.shape[3] ** -0.5
    past = torch.arange(k.shape[1], device=q.device) >= lengths[:, None, None, None]
    probs = torch.softmax(wide(scores).masked_fill(past, -torch.inf), -1).to(q.dtype)
    return ((probs @ v.transpose(1, 2)).reshape(q.shape),)


def decode_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    seen = torch.arange(k.shape[1], device=q.device) < lengths[:, None, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
    return (out.transpose(1, 2),)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (cross_entropy(wide(hidden @ weight.T), targets),)


def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (cross_entropy(wide(hidden @ weight.T), targets, reduction="none"),)


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    logp = torch.log_softmax(wide(hidden @ weight.T), -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def by_rows(function: Function, rows: int = 512) -> Function:
    """`function` of (hidden, weight, targets) in the memory of `rows` rows: for fp64. What it
    returns for the parts is averaged where it is one number, joined where it is one a row."""

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        done = [
            checkpoint(function, h, weight, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        if done[0][0].dim():
            return tuple(torch.cat(parts) for parts in zip(*done, strict=True))
        shares = [len(t) / len(targets) for t in targets.split(rows)]
        return (
            sum((s * loss for s, (loss,) in zip(shares, done, strict=True)), hidden.new_zeros(())),
        )

    return chunked


def sample(logits: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
    """One token a row from a uniform number a row: (tokens, log-probs)."""
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    sought = draws[:, None].to(logits.dtype) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, sought, right=True)
    tokens = tokens.clamp_max(logits.shape[1] - 1)
    return tokens[:, 0], torch.log_softmax(logits, -1).gather(1, tokens)[:, 0]


def sample_top_p(logits: Tensor, draws: Tensor, top_p: float) -> tuple[Tensor, ...]:
    """The same among the most likely tokens: before each of them stands at most `top_p`."""
    ordered, index = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(-1)
    kept = ordered.masked_fill(cumulative - ordered > top_p, 0).cumsum(-1)
    sought = draws[:, None].to(logits.dtype) * kept[:, -1:]
    place = torch.searchsorted(kept, sought, right=True)
    tokens = index.gather(1, place.clamp_max(logits.shape[1] - 1))
    return tokens[:, 0], torch.log_softmax(logits, -1).gather(1, tokens)[:, 0]


def gae(rewards: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """gamma 1, lambda 0.95, backwards a column at a time, as PPO trainers write it."""
    steps = rewards.shape[1]
    real = torch.arange(steps, device=rewards.device) < lengths[:, None]
    rewards, values = rewards * real, values * real
    running, after, found = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0]), []
    for t in range(steps - 1, -1, -1):
        running = (rewards[:, t] + after - values[:, t] + 0.95 * running) * real[:, t]
        after = values[:, t]
        found.append(running)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values
