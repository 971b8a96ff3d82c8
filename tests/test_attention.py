"""Run: python -m pytest tests/test_attention.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from puna.kernels import attention

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def by_hand(q, k, v, cuts=None, scale=None):
    """Query by query, head by head, in the dtype given: no mask, only what may be seen."""
    batch, tokens, heads, size = q.shape
    cuts = cuts if cuts is not None else [b * tokens for b in range(batch + 1)]
    q, k, v = (x.reshape(batch * tokens, -1, size) for x in (q, k, v))
    group, scale = heads // k.shape[1], size**-0.5 if scale is None else scale
    rows = []
    for first, end in zip(cuts, cuts[1:], strict=False):
        for t in range(first, end):
            for h in range(heads):
                seen_k, seen_v = k[first : t + 1, h // group], v[first : t + 1, h // group]
                scores = (seen_k * q[t, h]).sum(-1) * scale
                weights = (scores - scores.max()).exp()
                rows.append((weights[:, None] * seen_v).sum(0) / weights.sum())
    return (
        torch.stack(rows).view(batch, tokens, heads, size)
        if rows
        else q.new_zeros(batch, tokens, heads, size)
    )


def make(batch, tokens, heads, kv_heads, size, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shapes = [(batch, tokens, heads, size)] + 2 * [(batch, tokens, kv_heads, size)]
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def run(function, tensors, upstream):
    """(out, dq, dk, dv)"""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))


def cut(lengths):
    cuts = [0]
    for length in lengths:
        cuts.append(cuts[-1] + length)
    return torch.tensor(cuts, dtype=torch.int32)


shapes = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 3),
    "size": st.integers(1, 9),
    "seed": st.integers(0, 99),
}


@settings(max_examples=12)
@given(batch=st.integers(1, 2), tokens=st.integers(1, 5), **shapes)
def test_rows_against_the_formula(batch, tokens, kv_heads, group, size, seed):
    tensors = make(batch, tokens, kv_heads * group, kv_heads, size, seed=seed)
    upstream = torch.randn(tensors[0].shape).double()
    for found, truth in zip(
        run(attention, tensors, upstream), run(by_hand, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    **shapes,
)
def test_packed_sequences_against_the_formula(lengths, dtype, kv_heads, group, size, seed):
    tensors = make(1, sum(lengths), kv_heads * group, kv_heads, size, seed=seed)
    upstream = torch.randn(tensors[0].shape).double()
    cuts = cut(lengths)
    exact = run(lambda *x: by_hand(*x, cuts.tolist()), tensors, upstream)
    single = tuple(x.to(dtype) for x in tensors)
    found = run(lambda *x: attention(*x, cu_seqlens=cuts), single, upstream)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth.to(dtype), rtol=tolerance, atol=tolerance)


@settings(max_examples=15)
@given(
    rows=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_several_packed_rows_equal_separate_sequences(rows, seed):
    """Each row is filled up to the longest with a last sequence, as packing does."""
    longest = max(map(sum, rows))
    rows = [lengths + [longest - sum(lengths)] for lengths in rows]
    tensors = make(len(rows), longest, 4, 2, 8, seed=seed)
    out = attention(*tensors, cu_seqlens=cut([n for lengths in rows for n in lengths]))
    for b, lengths in enumerate(rows):
        cuts = cut(lengths).tolist()
        for first, end in zip(cuts, cuts[1:], strict=False):
            alone = attention(*(x[b : b + 1, first:end] for x in tensors))
            torch.testing.assert_close(out[b : b + 1, first:end], alone)


@pytest.mark.parametrize("lengths", [[4, 4], [1, 5, 2], [8], [1] * 8], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients_numerically(lengths, kv_heads):
    tensors = make(1, 8, 2, kv_heads, 3)
    leaves = [t.requires_grad_() for t in tensors]
    cuts = cut(lengths)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, cu_seqlens=cuts), leaves)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5])
def test_scale(scale):
    tensors = make(2, 5, 2, 1, 4)
    torch.testing.assert_close(attention(*tensors, scale=scale), by_hand(*tensors, scale=scale))
    cuts = cut([2, 3, 5])
    found = attention(*tensors, cu_seqlens=cuts, scale=scale)
    torch.testing.assert_close(found, by_hand(*tensors, cuts.tolist(), scale=scale))


def test_the_first_token_sees_itself_alone():
    q, k, v = make(3, 1, 4, 2, 8)
    torch.testing.assert_close(attention(q, k, v), v.repeat_interleave(2, 2))


@pytest.mark.parametrize("cuts", [None, [0, 2, 3, 8, 16]])
def test_the_future_is_not_seen(cuts):
    """Not even as NaN times zero, and no gradient goes there."""
    cuts = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    q, k, v = make(2, 8, 4, 2, 8, torch.float32)
    clean = attention(q, k, v, cu_seqlens=cuts)
    k, v = k.clone(), v.clone()
    k[0, 6:], v[0, 6:] = 1e4, -1e4
    changed = attention(q, k, v, cu_seqlens=cuts)
    assert torch.equal(changed[0, :6], clean[0, :6]) and torch.equal(changed[1], clean[1])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(attention(*leaves, cu_seqlens=cuts)[0, :6].sum(), leaves)
    assert all((g[0, 6:] == 0).all() and (g[1] == 0).all() for g in gradients)


@pytest.mark.parametrize("lengths", [[3, 5, 4], [3, 4, 5, 12], [4, 4, 4]], ids=str)
def test_nan_in_one_sequence_stays_there(lengths):
    """What stands past the last real sequence of a row is rubbish, and often NaN."""
    q, k, v = make(1, sum(lengths), 4, 2, 8, torch.float32)
    cuts = cut(lengths)
    clean = run(lambda *x: attention(*x, cu_seqlens=cuts), (q, k, v), torch.ones(q.shape))
    real = int(cuts[-2])
    dirty = [x.clone() for x in (q, k, v)]
    for x in dirty:
        x[:, real:] = torch.nan
    found = run(lambda *x: attention(*x, cu_seqlens=cuts), dirty, torch.ones(q.shape))
    for mine, truth in zip(found, clean, strict=True):
        assert torch.equal(mine[:, :real], truth[:, :real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, [7, 7], [3, 4, 7]], ids=str)
def test_error_against_pytorch(dtype, lengths, no_worse_than_torch):
    tensors = make(2, 7, 4, 2, 16, dtype)
    upstream = torch.randn(2, 7, 4, 16).to(dtype)
    cuts = None if lengths is None else cut(lengths)

    def peer(*tensors):
        flat = [x.reshape(1, 14, -1, 16).transpose(1, 2) for x in tensors]
        edges = [0, 7, 14] if cuts is None else cuts.tolist()
        parts = [
            scaled_dot_product_attention(
                *(x[:, :, a:b] for x in flat), is_causal=True, enable_gqa=True
            )
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        return torch.cat(parts, 2).transpose(1, 2).reshape(2, 7, 4, 16)

    found = run(lambda *x: attention(*x, cu_seqlens=cuts), tensors, upstream)
    wide = [x.double() for x in tensors]
    edges = None if cuts is None else cuts.tolist()
    exact = run(lambda *x: by_hand(*x, edges), wide, upstream)
    no_worse_than_torch(found, run(peer, tensors, upstream), exact)


@pytest.mark.parametrize("lengths", [None, [2, 3], [1, 4]])
def test_strided_inputs_and_expanded_gradients(lengths):
    cuts = None if lengths is None else cut(lengths)
    fused = torch.randn(1, 5, 8, 6).double()
    tensors = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    upstream = torch.tensor(0.7).double().expand(1, 5, 4, 6)
    found = run(lambda *x: attention(*x, cu_seqlens=cuts), tensors, upstream)
    edges = None if cuts is None else cuts.tolist()
    exact = run(lambda *x: by_hand(*x, edges), tensors, upstream)
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth)


def test_large_scores_do_not_overflow():
    q, k, v = make(1, 6, 2, 2, 8, torch.float32)
    found = attention(q * 1e4, k * 1e4, v)
    exact = by_hand(q.double() * 1e4, k.double() * 1e4, v.double())
    torch.testing.assert_close(found, exact.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_attend(batch, tokens, packed):
    q, k, v = (x.requires_grad_() for x in make(batch, tokens, 4, 2, 8))
    cuts = torch.tensor([0, 0], dtype=torch.int32) if packed else None
    out = attention(q, k, v, cu_seqlens=cuts)
    assert out.shape == (batch, tokens, 4, 8)
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_many_short_sequences_make_no_matrix_of_the_whole_row():
    """1,024 tokens in sequences of 20: a mask over the row would be 1024^2."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outputs = out if isinstance(out, tuple | list) else [out]
            seen.extend(t.numel() for t in outputs if isinstance(t, torch.Tensor))
            return out

    tensors = [x.requires_grad_() for x in make(1, 1024, 2, 2, 4, torch.float32)]
    cuts = cut([20, 21, 19, 20] * 12 + [31, 33])
    with Record():
        attention(*tensors, cu_seqlens=cuts).sum().backward()
    assert max(seen) <= 2 * 1024 * 2 * 4


def test_bad_input():
    q, k, v = make(2, 4, 4, 2, 8)
    with pytest.raises(ValueError, match="expected q"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match="expected q"):
        attention(q, k, v[:, :3])
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8))
    for cuts in ([0, 4], [1, 4, 8], [0, 4, 9], [0]):
        with pytest.raises(ValueError, match="must run from 0 to 8"):
            attention(q, k, v, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    with pytest.raises(ValueError, match="must not fall"):
        attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 3, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="spans rows"):
        attention(q, k, v, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
