"""Attention's Triton kernels: interpreted on the CPU, or on a GPU.

Run: python -m pytest tests/test_attention_triton.py -q
"""

import importlib
from itertools import pairwise

import pytest
import torch
from attention_peers import close, cut, drawn, exact, ours, run, segments
from far_memory import spread
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import attention

forward = importlib.import_module("puna.kernels.attention.forward")
backward = importlib.import_module("puna.kernels.attention.backward")
pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_device")


@settings(max_examples=10)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 40),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    size=st.sampled_from([1, 5, 8, 16, 24, 40]),
    seed=st.integers(0, 99),
)
def test_rows_against_pytorch(triton_device, batch, tokens, kv_heads, group, size, seed):
    tensors = drawn(triton_device, batch, tokens, kv_heads * group, kv_heads, size, seed=seed)
    close(run(ours, *tensors), exact(*tensors))


@settings(max_examples=8)
@given(
    rows=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), min_size=1, max_size=2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_sequences_against_pytorch(triton_device, rows, kv_heads, group, wide, seed):
    longest = max(1, *map(sum, rows))
    lengths = [n for row in rows for n in (*row, longest - sum(row))]
    tensors = drawn(triton_device, len(rows), longest, kv_heads * group, kv_heads, 8, seed=seed)
    cuts = cut(lengths, triton_device).to(torch.int64 if wide else torch.int32)
    close(run(ours, *tensors, cuts), exact(*tensors, cuts))


@pytest.mark.parametrize("lengths", [None, [64, 3, 127, 0, 6]], ids=["row", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_several_tiles_no_worse_than_pytorch(triton_device, no_worse_than_torch, dtype, lengths):
    """200 tokens are several tiles of queries and of keys, the last ones not full."""
    tensors = drawn(triton_device, 1, 200, 2, 1, 16, dtype)
    cuts = None if lengths is None else cut(lengths, triton_device)
    found = [x.cpu() for x in run(ours, *tensors, cuts)]
    assert all(x.dtype == dtype for x in found)
    peer = run(segments, *(x.cpu() for x in tensors), cuts)
    no_worse_than_torch(found, peer, exact(*tensors, cuts))


@pytest.mark.parametrize("size", [64, 80, 128])
def test_wide_heads(triton_device, no_worse_than_torch, size):
    tensors = drawn(triton_device, 1, 35, 2, 1, size, torch.bfloat16)
    found = [x.cpu() for x in run(ours, *tensors)]
    no_worse_than_torch(found, run(segments, *(x.cpu() for x in tensors)), exact(*tensors))


@pytest.mark.parametrize("scale", [0.3, -0.5, 0.0])
def test_scale(triton_device, scale):
    """PyTorch's own attention gives NaN for a negative one."""

    def by_hand(q, k, v, _):
        scores = scale * torch.einsum("bthd,bshd->bhts", q, k.expand(q.shape))
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v.expand(q.shape))

    tensors = drawn(triton_device, 1, 9, 2, 1, 8)
    truth = run(by_hand, *(x.double().cpu() for x in tensors))
    close(run(ours, *tensors, scale=scale), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_packed(triton_device, dtype):
    q, k, v, d_out = drawn(triton_device, 2, 70, 1, 1, 8, dtype)
    lengths = [3, 67, 20, 50]
    together = run(ours, q, k, v, d_out)
    packed = run(ours, q, k, v, d_out, cut(lengths, triton_device))
    for b in range(2):
        row = run(ours, *(x[b : b + 1] for x in (q, k, v, d_out)))
        for mine, all_rows in zip(row, together, strict=True):
            assert torch.equal(mine[0], all_rows[b])
    edges = cut(lengths).tolist()
    for a, b in zip(edges, edges[1:], strict=False):
        alone = run(ours, *(x.flatten(0, 1)[None, a:b] for x in (q, k, v, d_out)))
        for mine, all_sequences in zip(alone, packed, strict=True):
            assert torch.equal(mine[0], all_sequences.flatten(0, 1)[a:b])


def test_the_same_bits_again(triton_device):
    tensors = drawn(triton_device, 1, 70, 4, 1, 8, torch.bfloat16)
    first, second = (run(ours, *tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("lengths", [[30, 50], [5, 25, 50], [30, 20, 30]], ids=str)
def test_nan_in_one_sequence_stays_there(triton_device, lengths):
    """What stands past the last real sequence of a row is rubbish, and often NaN."""
    tensors = drawn(triton_device, 1, 80, 2, 1, 8)
    cuts = cut(lengths, triton_device)
    clean = run(ours, *tensors, cuts)
    real = int(cuts[-2])
    dirty = [x.clone() for x in tensors]
    for x in dirty:
        x[:, real:] = torch.nan
    for mine, truth in zip(run(ours, *dirty, cuts), clean, strict=True):
        assert torch.equal(mine[:, :real], truth[:, :real])


def test_past_the_last_cut_there_are_zeros(triton_device):
    """Cuts that do not cover the rows are an error where they can be seen, as here; where they
    cannot, the tokens past them are as if they were not there. Even NaN."""
    q, k, v, d_out = drawn(triton_device, 2, 150, 1, 1, 8)
    cuts = cut([20, 100], triton_device)
    with pytest.raises(ValueError, match="must run from 0 to 300"):
        attention(q, k, v, cu_seqlens=cuts.cpu())
    for x in (q, k, v, d_out):
        x.flatten(0, 1)[120:] = torch.nan
    out, lse = forward.attention_forward(q, k, v, cuts, 0.3)
    found = out, *backward.attention_backward(d_out, q, k, v, out, lse, cuts, 0.3)
    truth = run(
        ours, *(x[:1, :120].contiguous() for x in (q, k, v, d_out)), cut([20, 100]), scale=0.3
    )
    for mine, alone in zip(found, truth, strict=True):
        assert torch.equal(mine.flatten(0, 1)[:120], alone[0])
        assert (mine.flatten(0, 1)[120:] == 0).all()


@pytest.mark.parametrize(
    "cuts", [[0, 7, 3, 20], [0, 90, 20], [-5, 10, 1 << 30], [4, 9, 20], [30, 40], [0, 15, 20]]
)
def test_wrong_cuts_stay_within_bounds(triton_device, cuts):
    """The tensors lie in the middle of larger ones, whose edges are neither read nor written."""
    wide = drawn(triton_device, 4, 10, 2, 1, 8)
    q, k, v, d_out = (x[1:3] for x in wide)
    for x in wide:
        x[0], x[3] = torch.nan, torch.nan
    kept = [x.clone() for x in wide]
    cuts = torch.tensor(cuts, dtype=torch.int32, device=triton_device)
    out, lse = forward.attention_forward(q, k, v, cuts, 0.3)
    out, lse = out.nan_to_num(0.0), lse.nan_to_num(0.0)  # what no sequence holds is not written
    found = backward.attention_backward(d_out, q, k, v, out, lse, cuts, 0.3)
    assert all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(wide, kept, strict=True)
    )
    covered = forward.attention_forward(q, k, v, cuts, 0.3)[0].flatten(0, 1)
    clean = forward.attention_forward(*(x.clone() for x in (q, k, v)), cuts, 0.3)[0].flatten(0, 1)
    held = torch.zeros(20, dtype=torch.int64)
    for begin, end in pairwise(cuts.tolist()):
        begin = max(begin, 0)
        held[begin : min(max(end, 0), (begin // 10 + 1) * 10)] += 1  # none goes past its row
    alone = (held == 1).to(triton_device)  # two that hold the same token write it in any order
    assert torch.equal(covered[alone], clean[alone]) and len(found) == 3


def test_the_future_is_not_seen(triton_device):
    q, k, v, d_out = drawn(triton_device, 1, 80, 2, 1, 8)
    clean = attention(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, 50:], v[:, 50:] = 1e4, -1e4
    assert torch.equal(attention(q, k, v)[:, :50], clean[:, :50])
    d_out[:, 50:] = 0
    for gradient in run(ours, q, k, v, d_out)[1:]:
        assert (gradient[:, 50:] == 0).all() and (gradient[:, :50] != 0).any()


def test_large_scores_do_not_overflow(triton_device):
    q, k, v, d_out = drawn(triton_device, 1, 6, 2, 2, 8)
    found = run(ours, q * 1e4, k * 1e4, v, d_out)
    assert all(x.isfinite().all() for x in found)
    close(found[:1], exact(q * 1e4, k * 1e4, v, d_out)[:1], 1e-3)


@pytest.mark.parametrize("lengths", [None, [2, 3, 1, 4]], ids=["rows", "packed"])
def test_strided_inputs_and_gradients(triton_device, lengths):
    """One fused projection, heads before tokens, columns apart, one value for all."""
    cuts = None if lengths is None else cut(lengths, triton_device)
    fused, _, _, d_out = drawn(triton_device, 2, 5, 4, 4, 8)
    heads_first = fused.transpose(1, 2).contiguous().transpose(1, 2)
    columns_first = fused.transpose(1, 3).contiguous().transpose(1, 3)
    d_out, one = d_out[:, :, :2], torch.tensor(0.7, device=triton_device)
    upstreams = (
        d_out,
        one.expand(d_out.shape),
        d_out.transpose(1, 3).contiguous().transpose(1, 3),
        d_out[:, :1].expand(d_out.shape),
    )
    expanded = fused[:, :, :1].expand(-1, -1, 2, -1), fused[:, :1, 2:].expand(-1, 5, -1, -1)
    inputs = [(x[:, :, :2], x[:, :, 2:3], x[:, :, 3:]) for x in (fused, heads_first, columns_first)]
    for given_to, upstream in zip((*inputs, (d_out, *expanded)), upstreams, strict=True):
        close(run(ours, *given_to, upstream, cuts), exact(*given_to, upstream, cuts))


def test_inputs_and_gradients_are_not_written_to(triton_device):
    tensors = drawn(triton_device, 1, 20, 2, 1, 8)
    kept = [x.clone() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors[:3]]
    out = attention(*leaves)
    before = out.detach().clone()
    first = torch.autograd.grad(out, leaves, tensors[3], retain_graph=True)
    second = torch.autograd.grad(out, leaves, tensors[3])
    assert all(map(torch.equal, first, second))
    assert torch.equal(out, before) and all(map(torch.equal, tensors, kept))


def test_the_same_tensor_thrice(triton_device):
    x, _, _, d_out = drawn(triton_device, 1, 9, 2, 2, 8)
    leaf, wide = x.clone().requires_grad_(), x.double().cpu().requires_grad_()
    attention(leaf, leaf, leaf).backward(d_out)
    segments(wide, wide, wide, None).backward(d_out.double().cpu())
    close([leaf.grad], [wide.grad])


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_attend(triton_device, batch, tokens, packed):
    q, k, v, _ = (x.requires_grad_() for x in drawn(triton_device, batch, tokens, 4, 2, 8))
    cuts = torch.tensor([0, 0], dtype=torch.int32) if packed else None
    out = attention(q, k, v, cu_seqlens=cuts)
    assert out.shape == (batch, tokens, 4, 8)
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_a_second_derivative_is_refused(triton_device):
    leaves = [x.requires_grad_() for x in drawn(triton_device, 1, 4, 2, 2, 8)[:3]]
    (gradient,) = torch.autograd.grad(attention(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        gradient.sum().backward()


def test_packed_short_sequences_are_cheap(triton_device):
    """The tiles of 2,000 short sequences: one each, and no more than one to round each up."""
    lengths = [20, 21, 19, 20] * 500
    x = torch.empty(1, sum(lengths), 1, 8)
    assert forward.tiles(x, cut(lengths), 128) <= sum(lengths) // 128 + len(lengths) + 1


@pytest.mark.parametrize(("tokens", "apart"), [(140, (1 << 24) - 8), (4, 1 << 30)])
def test_offsets_past_32_bits(triton_device, tokens, apart):
    """Keys further than 2^31 elements from the first."""
    q, k, v, d_out = drawn(triton_device, 1, tokens, 1, 1, 8, torch.float16)
    far_k = spread(k, apart)
    truth = forward.attention_forward(q, k, v, None, 0.3)
    assert all(map(torch.equal, forward.attention_forward(q, far_k, v, None, 0.3), truth))
    rest = v, *truth, None, 0.3
    gradients = backward.attention_backward(d_out, q, far_k, *rest)
    assert all(map(torch.equal, gradients, backward.attention_backward(d_out, q, k, *rest)))


def test_bad_input(triton_device):
    q, k, v, _ = drawn(triton_device, 2, 4, 4, 2, 8)
    cuts = cut([4, 4], triton_device)
    with pytest.raises(ValueError, match="not the same dtype"):
        attention(q, k.half(), v)
    with pytest.raises(ValueError, match="not the same"):
        attention(q, k.to("meta"), v)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, *2 * [torch.randn(2, 4, 3, 8, device=triton_device)])
    with pytest.raises(ValueError, match=r"cu_seqlens is \(3,\) torch.float32"):
        attention(q, k, v, cu_seqlens=cuts.float())
    with pytest.raises(ValueError, match="at least 2"):
        attention(q, k, v, cu_seqlens=cuts[:1])
    with pytest.raises(ValueError, match="forced, but the head size is 136"):
        attention(*3 * [torch.randn(1, 4, 1, 136, device=triton_device)])
    with pytest.raises(ValueError, match="forced, but its dtype is torch.float64"):
        attention(*(x.double() for x in (q, k, v)))
    for wrong, message in (([0, 3, 8], "spans rows"), ([0, 5, 4, 8], "must not fall")):
        cuts = torch.tensor(wrong, dtype=torch.int32)  # on the CPU: seen without a wait
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, cu_seqlens=cuts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuts_in_pinned_memory_are_read_at_once():
    """The caller may fill it anew while the GPU is still busy with what came before."""
    q, k, v, _ = drawn("cuda", 1, 9, 4, 2, 16, torch.float32)
    cuts = torch.tensor([0, 4, 9]).pin_memory()
    expected = attention(q, k, v, cu_seqlens=cuts.cuda())
    torch.cuda._sleep(10**8)
    found = attention(q, k, v, cu_seqlens=cuts)
    cuts[1] = 2
    assert torch.equal(found, expected)
