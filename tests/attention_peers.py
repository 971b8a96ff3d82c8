"""Inputs for attention's tests, and PyTorch's own attention, packed and in fp64."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from puna.kernels import attention


def drawn(device, batch, tokens, heads, kv_heads, size, dtype=torch.float32, seed=0):
    """q, k, v and an upstream gradient."""
    torch.manual_seed(seed)
    q, d_out = torch.randn(2, batch, tokens, heads, size)
    k, v = torch.randn(2, batch, tokens, kv_heads, size)
    return tuple(x.to(dtype).to(device) for x in (q, k, v, d_out))


def cut(lengths, device="cpu"):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(torch.int32).to(device)


def segments(q, k, v, cuts, scale=None):
    """PyTorch's own attention, sequence by sequence."""
    batch, tokens, heads, size = q.shape
    edges = [b * tokens for b in range(batch + 1)] if cuts is None else cuts.tolist()
    flat = [x.reshape(1, batch * tokens, -1, size).transpose(1, 2) for x in (q, k, v)]
    parts = [
        scaled_dot_product_attention(
            *(x[:, :, a:b] for x in flat), is_causal=True, enable_gqa=True, scale=scale
        )
        for a, b in zip(edges, edges[1:], strict=False)
        if b > a
    ]
    return torch.cat(parts, 2).transpose(1, 2).reshape(q.shape)


def run(function, q, k, v, d_out, cuts=None, **options):
    """(out, dq, dk, dv)"""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, cuts, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out))


def ours(q, k, v, cuts=None, **options):
    return attention(q, k, v, cu_seqlens=cuts, **options)


def exact(q, k, v, d_out, cuts=None, **options):
    return run(segments, *(x.double().cpu() for x in (q, k, v, d_out)), cuts, **options)


def close(found, truth, tolerance=2e-5):
    for mine, other in zip(found, truth, strict=True):
        torch.testing.assert_close(
            mine.double().cpu(), other.double(), rtol=tolerance, atol=tolerance
        )
