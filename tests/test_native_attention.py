"""Run: python -m pytest tests/test_native_attention.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from puna import kernels
from puna.core import ops
from puna.core.native import attention as native_attention
from puna.core.native.loader import WIDTHS, extension
from puna.core.ops import use_backend

pytestmark = pytest.mark.skipif(extension() is None, reason="the native extension is not built")


def gradients(attention, q, k, v, upstream, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, **options)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), upstream))


def inputs(rows, tokens, heads, kv_heads, size, seed=0):
    torch.manual_seed(seed)
    shapes = [(rows, tokens, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape) for shape in shapes]


def compare(q, k, v, upstream, **options):
    """No worse than twice PyTorch's error to fp64, or rounding: of d_out . v to d_out . out, and
    of the scores, which spread by scale * sqrt(D)."""
    spread = max(1.0, (options.get("scale") or 0.0) * q.shape[3] ** 0.5)
    found = gradients(ops.attention, q, k, v, upstream, **options)
    wide = (x.double() for x in (q, k, v, upstream))
    exact = gradients(kernels.attention, *wide, **options)
    with use_backend("reference"):
        peer = gradients(ops.attention, q, k, v, upstream, **options)
    for mine, truth, theirs in zip(found, exact, peer, strict=True):
        most = max(2 * float((theirs - truth).abs().max()), 2e-5 * spread)
        assert float((mine - truth).abs().max()) <= most


@settings(max_examples=40)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 75),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([4, 8, 16, 24, 32, 48, 80, 128]),
    scale=st.sampled_from([None, 0.05, 0.4]),
    seed=st.integers(0, 99),
)
def test_rows_against_fp64(rows, tokens, kv_heads, group, size, scale, seed):
    compare(*inputs(rows, tokens, kv_heads * group, kv_heads, size, seed), scale=scale)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    wide=st.booleans(),
)
def test_packed_sequences_against_fp64(lengths, wide):
    """Some of no length; each row filled up to the longest."""
    longest = max(map(sum, lengths)) or 1
    ends = [n for row in lengths for n in (*row, longest - sum(row))]
    cuts = torch.tensor([0, *ends]).cumsum(0)
    q, k, v, upstream = inputs(len(lengths), longest, 4, 2, 16)
    compare(q, k, v, upstream, cu_seqlens=cuts if wide else cuts.int())


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "base"])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_instruction_set(name, threads, monkeypatch):
    if name not in extension().instruction_sets():
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(native_attention, "best_instructions", lambda size: name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for vectors in (1, 2, 3, 4, 5, 6, 7, 9):
            compare(*inputs(2, 60, 4, 2, vectors * WIDTHS[name]))
    finally:
        torch.set_num_threads(before)


def test_views_and_expanded_gradients():
    q, k, v, _ = inputs(2, 20, 4, 2, 16)
    joined = torch.cat([x.flatten(2) for x in (q, k, v)], 2)
    parts = [x.unflatten(2, (-1, 16)) for x in joined.split([64, 32, 32], 2)]
    one = torch.ones(1, 1, 1, 1).expand(q.shape)
    for mine, plain in zip(
        gradients(ops.attention, *parts, one),
        gradients(ops.attention, q, k, v, torch.ones_like(q)),
        strict=True,
    ):
        assert torch.equal(mine, plain)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(ops.attention(*turned), ops.attention(q, k, v))


def test_the_future_is_not_seen():
    q, k, v, upstream = inputs(1, 40, 2, 2, 16)
    upstream[:, 30:] = 0
    clean = gradients(ops.attention, q, k, v, upstream)
    for x in (q, k, v):
        x[:, 30:] *= 1e15
    found = gradients(ops.attention, q, k, v, upstream)
    for mine, before in zip(found, clean, strict=True):
        assert torch.equal(mine[:, :30], before[:, :30])


def test_what_is_not_a_number_stays_none():
    q, k, v, upstream = inputs(1, 40, 2, 2, 16)
    q[0, 3, 1, 2] = float("nan")
    out = ops.attention(q, k, v)
    assert out[0, 3, 1].isnan().all() and out.isnan().sum() == 16
    assert gradients(ops.attention, q, k, v, upstream)[2][0, :4, 1].isnan().all()


def test_large_scores():
    q, k, v, upstream = inputs(1, 30, 2, 2, 16)
    compare(q * 1e3, k * 1e3, v, upstream)


def test_threads_do_not_change_a_bit():
    q, k, v, upstream = inputs(2, 50, 6, 3, 32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(gradients(ops.attention, q, k, v, upstream))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointed_and_without_gradients():
    q, k, v, upstream = inputs(1, 20, 2, 1, 16)
    plain = gradients(ops.attention, q, k, v, upstream)
    again = gradients(
        lambda *x: checkpoint(ops.attention, *x, use_reentrant=False), q, k, v, upstream
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.inference_mode():
        assert torch.equal(ops.attention(q, k, v), plain[0])


@pytest.mark.parametrize(
    "why",
    [
        dict(q=torch.zeros(1, 4, 2, 16).double()),
        dict(q=torch.zeros(1, 4, 3, 16)),
        dict(q=torch.zeros(1, 4, 2, 8)),
        dict(k=torch.zeros(1, 5, 2, 16)),
        dict(cu_seqlens=torch.tensor([0, 3])),
        dict(cu_seqlens=torch.tensor([0, 3, 2, 4])),
        dict(cu_seqlens=torch.tensor([0.0, 4.0])),
    ],
    ids=str,
)
def test_mistakes_are_explained_by_the_kernels(why):
    good = {name: torch.zeros(1, 4, 2, 16) for name in "qkv"}
    with pytest.raises(ValueError, match=r"expected|multiple|same dtype|cu_seqlens"):
        ops.attention(**{**good, **why})


def test_head_sizes_without_whole_vectors_are_the_kernels():
    q, k, v, upstream = inputs(1, 9, 2, 1, 6)
    assert not native_attention.fits(q, k, v, None, None)
    compare(q, k, v, upstream)


def test_gradients_are_not_differentiated_again():
    q, k, v, _ = (x.requires_grad_() for x in inputs(1, 9, 2, 1, 16))
    (dq,) = torch.autograd.grad(ops.attention(q, k, v).pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative"):
        dq.sum().backward()
