"""Flash decoding's Triton kernels: interpreted on the CPU, or on a GPU.

Run: python -m pytest tests/test_decode_attention_triton.py -q
"""

import importlib

import pytest
import torch
from far_memory import spread
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import attention, decode_attention

source = importlib.import_module("puna.kernels.decode_attention")
pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_device")


def by_hand(q, k_cache, v_cache, lengths, scale=None, dtype=torch.float64):
    """Row by row, query by query, each over the entries that it sees alone."""
    batch, queries, heads, size = q.shape
    group, scale = heads // k_cache.shape[2], size**-0.5 if scale is None else scale
    q, k_cache, v_cache = (x.cpu().to(dtype) for x in (q, k_cache, v_cache))
    out = torch.zeros(q.shape, dtype=dtype)
    for b in range(batch):
        for i in range(queries):
            seen = int(lengths[b]) - queries + i + 1
            for h in range(heads):
                scores = k_cache[b, :seen, h // group] @ q[b, i, h] * scale
                out[b, i, h] = scores.softmax(0) @ v_cache[b, :seen, h // group]
    return out


def drawn(device, batch, queries, slots, heads, kv_heads, size, dtype=torch.float32, seed=0):
    """q and the caches, laid out as the project's: heads before tokens."""
    torch.manual_seed(seed)
    q = torch.randn(batch, queries, heads, size)
    caches = torch.randn(2, batch, kv_heads, slots, size).to(dtype).to(device).transpose(2, 3)
    return q.to(dtype).to(device), *caches


def lengths_of(values, device):
    return torch.tensor(values, dtype=torch.int64, device=device)


@settings(max_examples=15)
@given(
    batch=st.integers(0, 3),
    queries=st.integers(1, 4),
    more_slots=st.integers(0, 40),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    size=st.sampled_from([1, 5, 8, 16, 24, 40]),
    seed=st.integers(0, 99),
)
def test_against_the_formula(
    triton_device, batch, queries, more_slots, kv_heads, group, size, seed
):
    slots = queries + more_slots
    tensors = drawn(triton_device, batch, queries, slots, kv_heads * group, kv_heads, size)
    torch.manual_seed(seed)
    lengths = torch.randint(queries, slots + 1, (batch,)).to(triton_device)
    found = decode_attention(*tensors, lengths).cpu()
    torch.testing.assert_close(found, by_hand(*tensors, lengths).float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 80])
def test_several_splits_no_worse_than_pytorch(triton_device, no_worse_than_torch, dtype, size):
    """Lengths within the first split, at its end, one past it, and in the third."""
    tensors = drawn(triton_device, 4, 1, 600, 2, 1, size, dtype)
    lengths = lengths_of([7, 256, 257, 600], triton_device)
    found = decode_attention(*tensors, lengths)
    assert found.dtype == dtype
    peer = by_hand(*tensors, lengths, dtype=dtype)
    no_worse_than_torch([found.cpu()], [peer], [by_hand(*tensors, lengths)])


def test_more_rows_than_a_tile(triton_device):
    """40 heads of a group, and 6 queries of 8 heads: further programs take what is left."""
    for queries, heads in ((1, 40), (6, 8)):
        tensors = drawn(triton_device, 1, queries, 40, heads, 1, 8)
        lengths = lengths_of([39], triton_device)
        found = decode_attention(*tensors, lengths).cpu()
        torch.testing.assert_close(found, by_hand(*tensors, lengths).float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tokens", [5, 90, 300])
def test_equals_the_last_rows_of_training_attention(triton_device, tokens):
    torch.manual_seed(tokens)
    q = torch.randn(2, tokens, 2, 16, device=triton_device)
    k, v = torch.randn(2, 2, tokens, 1, 16, device=triton_device)
    whole = attention(q, k, v)
    lengths = lengths_of([tokens, tokens], triton_device)
    found = decode_attention(q[:, -3:], k, v, lengths)
    torch.testing.assert_close(found, whole[:, -3:], rtol=1e-5, atol=1e-5)
    found = decode_attention(q[:, -1:], k, v, lengths)
    torch.testing.assert_close(found, whole[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, 1e30])
def test_past_the_length_nothing_is_read(triton_device, rubbish):
    q, k_cache, v_cache = drawn(triton_device, 3, 2, 300, 2, 1, 8)
    lengths = lengths_of([3, 256, 290], triton_device)
    clean = decode_attention(q, k_cache, v_cache, lengths)
    past = torch.arange(300, device=triton_device) >= lengths[:, None]
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[past], v_cache[past] = rubbish, rubbish
    kept = k_cache.clone(), v_cache.clone()
    assert torch.equal(decode_attention(q, k_cache, v_cache, lengths), clean)
    for cache, before in zip((k_cache, v_cache), kept, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), before.nan_to_num(7.0))  # and none written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch_and_any_cache(triton_device, dtype):
    q, k_cache, v_cache = drawn(triton_device, 3, 2, 300, 2, 1, 8, dtype)
    lengths = lengths_of([280, 2, 256], triton_device)
    together = decode_attention(q, k_cache, v_cache, lengths)
    for b, length in enumerate(lengths.tolist()):
        rows = q[b : b + 1], k_cache[b : b + 1], v_cache[b : b + 1], lengths[b : b + 1]
        assert torch.equal(decode_attention(*rows)[0], together[b])
        for slots in (length, 600):
            cache = torch.full((2, 1, slots, 1, 8), torch.nan, dtype=dtype, device=triton_device)
            cache[0, :, :length], cache[1, :, :length] = rows[1][:, :length], rows[2][:, :length]
            assert torch.equal(decode_attention(rows[0], *cache, rows[3])[0], together[b])


def test_wrong_lengths_stay_within_the_cache(triton_device, monkeypatch):
    """Queries left without entries give zeros; where the lengths can be seen, they are refused."""
    q, k_wide, v_wide = drawn(triton_device, 5, 2, 700, 2, 1, 8)
    k_wide[:, :300], k_wide[:, 600:] = torch.nan, torch.nan
    v_wide[:, :300], v_wide[:, 600:] = torch.nan, torch.nan
    k_cache, v_cache = k_wide[:, 300:600], v_wide[:, 300:600]
    wrong = lengths_of([1, 0, -3, 1 << 40, 301], triton_device)
    out = source.decode_attention_forward(q, k_cache, v_cache, wrong, 0.3)
    assert out.isfinite().all()
    right = lengths_of([2, 2, 2, 300, 300], triton_device)
    truth = source.decode_attention_forward(q, k_cache, v_cache, right, 0.3)
    assert torch.equal(out[3:], truth[3:])
    assert (out[0, 0] == 0).all() and (out[1:3] == 0).all()
    torch.testing.assert_close(out[0, 1], v_cache[0, 0].expand(2, -1))
    monkeypatch.setenv("PUNA_DEBUG", "1")
    with pytest.raises(ValueError, match="lengths run from -3 to 1099511627776"):
        decode_attention(q, k_cache, v_cache, wrong)


def test_strided_inputs(triton_device):
    q, k_cache, v_cache = drawn(triton_device, 3, 2, 20, 4, 2, 8)
    lengths = lengths_of([20, 5, 9], triton_device)
    truth = by_hand(q, k_cache, v_cache, lengths).float()
    for laid_out in (
        lambda x: x.contiguous(),
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        lambda x: torch.cat((x, x), 2)[:, :, : x.shape[2]],
    ):
        found = decode_attention(*(laid_out(x) for x in (q, k_cache, v_cache)), lengths).cpu()
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=2e-6)
    every_other = torch.stack((lengths, lengths * 0 + 3), 1)[:, 0]
    expanded = k_cache[:1].expand(3, -1, -1, -1), v_cache[:1].expand(3, -1, -1, -1)
    found = decode_attention(q, *expanded, every_other).cpu()
    truth = by_hand(q, *expanded, lengths).float()
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=2e-6)


def test_offsets_past_32_bits(triton_device):
    q, k_cache, v_cache = drawn(triton_device, 1, 1, 140, 2, 1, 8, torch.float16)
    lengths = lengths_of([138], triton_device)
    found = decode_attention(q, spread(k_cache, (1 << 24) - 8), v_cache, lengths)
    assert torch.equal(found, decode_attention(q, k_cache, v_cache, lengths))


@pytest.mark.parametrize("scale", [0.3, -0.5, 0.0])
def test_scale(triton_device, scale):
    tensors, lengths = drawn(triton_device, 2, 2, 9, 2, 1, 8), lengths_of([9, 4], triton_device)
    found = decode_attention(*tensors, lengths, scale=scale).cpu()
    truth = by_hand(*tensors, lengths, scale=scale).float()
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=2e-6)


def test_large_scores_do_not_overflow(triton_device):
    q, k_cache, v_cache = drawn(triton_device, 1, 1, 300, 2, 1, 8)
    lengths = lengths_of([300], triton_device)
    found = decode_attention(q * 1e4, k_cache * 1e4, v_cache, lengths)
    truth = by_hand(q * 1e4, k_cache * 1e4, v_cache, lengths).float()
    torch.testing.assert_close(found.cpu(), truth, rtol=1e-3, atol=1e-3)


def test_no_gradient(triton_device):
    """Forced, it is refused; left to itself, the reference would run."""
    q, k_cache, v_cache = drawn(triton_device, 1, 1, 5, 2, 1, 8)
    lengths = lengths_of([5], triton_device)
    with pytest.raises(ValueError, match="forced, but a gradient is wanted"):
        decode_attention(q.requires_grad_(), k_cache, v_cache, lengths)
    with torch.no_grad():
        decode_attention(q, k_cache, v_cache, lengths)


def test_operator(triton_device):
    tensors = drawn(triton_device, 1, 1, 260, 1, 1, 8)
    inputs = (*tensors, lengths_of([3], triton_device), 0.3)
    torch.library.opcheck(source.decode_attention_forward.operator, inputs)


def test_compiled(triton_device):
    tensors = drawn(triton_device, 2, 1, 300, 2, 1, 8)
    lengths = lengths_of([290, 4], triton_device)
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, lengths), decode_attention(*tensors, lengths))


def test_launches_need_no_values(monkeypatch):
    """On meta tensors there are none: one-dimensional grids, and no second launch for a cache of
    one split."""
    launches = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **settings: launches.append((self.name, grid))

    for name in ("decode_attention_kernel", "decode_attention_combine_kernel"):
        monkeypatch.setattr(source, name, Recorder(name))

    def launch(slots):
        launches.clear()
        q = torch.empty(512, 1, 64, 128, dtype=torch.bfloat16, device="meta")
        cache = torch.empty(512, slots, 8, 128, dtype=torch.bfloat16, device="meta")
        lengths = torch.empty(512, dtype=torch.int64, device="meta")
        source.decode_attention_forward.__wrapped__(q, cache, cache, lengths, 0.3)
        return [grid for _, grid in launches]

    assert launch(256) == [(512 * 8,)]
    assert launch(4096) == [(512 * 8 * 16,), (512 * 64,)]
    assert launch(0) == [(512 * 8,)]


def test_bad_input(triton_device):
    q, k_cache, v_cache = drawn(triton_device, 2, 1, 5, 4, 2, 8)
    lengths = lengths_of([5, 3], triton_device)
    with pytest.raises(ValueError, match="not the same dtype"):
        decode_attention(q, k_cache.half(), v_cache, lengths)
    with pytest.raises(ValueError, match="not the same device"):
        decode_attention(q, k_cache, v_cache, lengths.to("meta"))
    with pytest.raises(ValueError, match="lengths are torch.float32"):
        decode_attention(q, k_cache, v_cache, lengths.float())
    with pytest.raises(ValueError, match="not a multiple"):
        decode_attention(q[:, :, :3], k_cache, v_cache, lengths)
    with pytest.raises(ValueError, match="forced, but the head size is 136"):
        x = torch.randn(2, 1, 1, 136, device=triton_device)
        decode_attention(x, x, x, lengths * 0 + 1)
