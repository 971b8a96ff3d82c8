"""How strongly a model looks back at a part of its input (paper section 3.3, Fig. 10)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from puna.core import ops
from puna.core.model import Attention, Block, Rotary, Transformer

ROWS = 256  # queries at a time: 32 heads of 4096 tokens are then 134 MB of weights


@torch.no_grad()
def attention_to(model: Transformer, ids: Sequence[int], part: slice) -> Tensor:
    """(T,) fp32: for each of the T tokens `ids` the largest attention weight that any head of any
    layer gives to a token of ids[part]; 0 for tokens before it.

    Raises ValueError where the part is empty or the ids exceed the model's context.
    """
    start, stop, _ = part.indices(len(ids))
    if start >= stop:
        raise ValueError(f"there is no token from {start} to {stop}; name a part of the ids")
    tokens = torch.tensor([ids], device=model.device)
    rotary = model.rotary(tokens, None)
    found = torch.zeros(len(ids), device=model.device)
    x = model.model.embed_tokens(tokens)
    for block in model.model.layers:
        assert isinstance(block, Block)
        q, k = queries_and_keys(block.self_attn, block.input_layernorm(x), rotary)
        for first in range(0, len(ids), ROWS):
            weights = attention_weights(q[:, first : first + ROWS], k, first)
            seen = weights[:, :, start:stop].amax((0, 2))
            found[first : first + ROWS] = torch.maximum(found[first : first + ROWS], seen)
        x = block(x, rotary)
    return found


def queries_and_keys(attention: Attention, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """(H, T, D) each, rotated, of x (1, T, C); a group of query heads shares its keys."""
    q, k = (
        project(x).view(1, x.shape[1], -1, attention.head_dim)
        for project in (attention.q_proj, attention.k_proj)
    )
    q, k = ops.rope(q, k, rotary.cos, rotary.sin)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def attention_weights(q: Tensor, k: Tensor, first: int) -> Tensor:
    """(H, R, T) fp32 of queries q (H, R, D), which stand at first .. first + R - 1, and all keys
    (H, T, D)."""
    scores = (q.float() @ k.float().transpose(1, 2)) / math.sqrt(q.shape[2])
    rows = torch.arange(first, first + q.shape[1], device=q.device)
    later = torch.arange(k.shape[1], device=q.device) > rows[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)
