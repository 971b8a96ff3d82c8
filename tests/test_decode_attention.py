"""Run: python -m pytest tests/test_decode_attention.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import attention, decode_attention

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def by_hand(q, k_cache, v_cache, lengths, scale=None):
    """Row by row, query by query, in fp64."""
    batch, queries, heads, size = q.shape
    group, scale = heads // k_cache.shape[2], size**-0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for i in range(queries):
            seen = int(lengths[b]) - queries + i + 1
            for h in range(heads):
                keys = k_cache[b, :seen, h // group].double()
                scores = keys @ q[b, i, h].double() * scale
                out[b, i, h] = scores.softmax(0) @ v_cache[b, :seen, h // group].double()
    return out


def make(batch, queries, slots, heads, kv_heads, size, dtype=torch.float64):
    q = torch.randn(batch, queries, heads, size).to(dtype)
    return q, *(torch.randn(batch, slots, kv_heads, size).to(dtype) for _ in range(2))


@settings(max_examples=40)
@given(
    batch=st.integers(0, 4),
    queries=st.integers(1, 3),
    more_slots=st.integers(0, 6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_against_the_formula(batch, queries, more_slots, kv_heads, group, size, seed):
    torch.manual_seed(seed)
    slots = queries + more_slots
    tensors = make(batch, queries, slots, kv_heads * group, kv_heads, size)
    lengths = torch.randint(queries, slots + 1, (batch,))
    exact = by_hand(*tensors, lengths)
    torch.testing.assert_close(decode_attention(*tensors, lengths), exact)
    single = decode_attention(*(x.float() for x in tensors), lengths)
    torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 4, 9, 6], [5, 5, 5, 5]])
@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_past_the_length_nothing_is_read(rubbish, lengths):
    q, k_cache, v_cache = make(4, 1, 9, 4, 2, 8, torch.float32)
    lengths = torch.tensor(lengths)
    clean = decode_attention(q, k_cache, v_cache, lengths)
    past = torch.arange(9) >= lengths[:, None]
    k_cache[past], v_cache[past] = rubbish, rubbish
    kept = k_cache.clone(), v_cache.clone()
    torch.testing.assert_close(decode_attention(q, k_cache, v_cache, lengths), clean)
    for cache, before in zip((k_cache, v_cache), kept, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), before.nan_to_num(7.0))  # and none written


def test_equals_the_last_rows_of_causal_attention():
    q, k, v = (torch.randn(2, 6, 4, 8) for _ in range(3))
    whole = attention(q, k, v)
    for queries in (1, 2, 6):
        found = decode_attention(q[:, -queries:], k, v, torch.tensor([6, 6]))
        torch.testing.assert_close(found, whole[:, -queries:])


def test_a_view_into_a_larger_cache():
    """The model passes one layer's slots up to the longest row: strided, not contiguous."""
    caches = torch.randn(2, 3, 20, 2, 8)  # (L, B, T, K, D)
    q, lengths = torch.randn(3, 1, 6, 8), torch.tensor([2, 7, 5])
    views = caches[0, :, :7], caches[1, :, :7]
    found = decode_attention(q, *views, lengths)
    torch.testing.assert_close(found, by_hand(q, *views, lengths).float())


def test_a_row_does_not_depend_on_its_batch():
    q, k_cache, v_cache = make(5, 1, 9, 4, 2, 8, torch.float32)
    lengths = torch.tensor([9, 1, 4, 6, 3])
    together = decode_attention(q, k_cache, v_cache, lengths)
    for b in range(5):
        alone = decode_attention(
            q[b : b + 1], k_cache[b : b + 1], v_cache[b : b + 1], lengths[b : b + 1]
        )
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-6)


def test_scale():
    tensors, lengths = make(2, 1, 5, 2, 1, 4), torch.tensor([5, 3])
    found = decode_attention(*tensors, lengths, scale=0.3)
    torch.testing.assert_close(found, by_hand(*tensors, lengths, scale=0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_against_pytorch(dtype, no_worse_than_torch):
    torch.manual_seed(0)
    q, k_cache, v_cache = make(3, 1, 33, 4, 2, 16, dtype)
    lengths = torch.tensor([33, 7, 20])
    peer = torch.stack(
        [
            torch.nn.functional.scaled_dot_product_attention(
                q[b].transpose(0, 1),
                *(
                    cache[b, :n].transpose(0, 1).repeat_interleave(2, 0)
                    for cache in (k_cache, v_cache)
                ),
            ).transpose(0, 1)
            for b, n in enumerate(lengths.tolist())
        ]
    )
    found = decode_attention(q, k_cache, v_cache, lengths)
    assert found.dtype == dtype
    no_worse_than_torch([found], [peer], [by_hand(q, k_cache, v_cache, lengths)])


def test_bad_input():
    q, k_cache, v_cache = make(2, 1, 5, 4, 2, 8)
    lengths = torch.tensor([5, 3])
    with pytest.raises(ValueError, match="expected q"):
        decode_attention(q, k_cache, v_cache[:, :4], lengths)
    with pytest.raises(ValueError, match="expected q"):
        decode_attention(q[:1], k_cache, v_cache, lengths)
    with pytest.raises(ValueError, match="not a multiple"):
        decode_attention(q[:, :, :3], k_cache, v_cache, lengths)
    with pytest.raises(ValueError, match=r"lengths have shape \(1,\), expected \(2,\)"):
        decode_attention(q, k_cache, v_cache, lengths[:1])
    for wrong in ([6, 3], [5, 0]):
        with pytest.raises(ValueError, match="allow 1 to 5"):
            decode_attention(q, k_cache, v_cache, torch.tensor(wrong))
