"""Run: python -m pytest tests/test_kv_cache.py -q"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.config import SIZES, ModelConfig
from puna.core.generation.kv_cache import CACHE_BYTES, KVCache, room, rows_within

CONFIG = ModelConfig(16, 3, 4, 2, 24, vocab_size=11)
B, SLOTS, K, D = 4, 7, 2, 4


def filled():
    """Each number says where it was written: layer * 1000 + row * 100 + slot; values negated."""
    cache = KVCache(CONFIG, B, SLOTS)
    for layer in range(3):
        rows = torch.arange(B)[:, None] * 100.0 + torch.arange(5)
        keys = (layer * 1000 + rows)[..., None, None].expand(B, 5, K, D)
        cache.fill(layer, keys, -keys)
    cache.lengths = torch.tensor([5, 2, 3, 1])
    return cache


def test_starts_empty_and_finite():
    cache = KVCache(CONFIG, B, SLOTS, dtype=torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (3, B, SLOTS, K, D)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert (cache.k == 0).all() and (cache.v == 0).all() and (cache.lengths == 0).all()
    assert cache.max_tokens == SLOTS


def test_fill_writes_the_first_slots_of_its_layer():
    cache = filled()
    for layer in range(3):
        for row in range(B):
            for slot in range(SLOTS):
                expected = layer * 1000 + row * 100 + slot if slot < 5 else 0
                assert (cache.k[layer, row, slot] == expected).all()
                assert (cache.v[layer, row, slot] == -expected).all()


def test_append_writes_at_each_rows_length():
    cache = filled()
    before = cache.k.clone()
    keys = torch.arange(B).float()[:, None, None, None].expand(B, 1, K, D) + 0.5
    k, v = cache.append(1, keys, keys + 10)
    assert k.shape == v.shape == (B, 6, K, D)  # up to the longest row's new token
    for row, length in enumerate([5, 2, 3, 1]):
        assert (k[row, length] == row + 0.5).all() and (v[row, length] == row + 10.5).all()
        assert torch.equal(k[row, :length], before[1, row, :length])
    assert torch.equal(cache.k[0], before[0]) and torch.equal(cache.k[2], before[2])
    assert cache.lengths.tolist() == [5, 2, 3, 1]  # moved on by the caller, once a step


@given(st.lists(st.integers(0, B - 1), unique=True, min_size=1))
def test_keep(rows):
    cache = filled()
    k, v, lengths = cache.k.clone(), cache.v.clone(), cache.lengths.clone()
    kept = torch.tensor(rows)
    cache.keep(kept)
    assert torch.equal(cache.k, k[:, kept]) and torch.equal(cache.v, v[:, kept])
    assert torch.equal(cache.lengths, lengths[kept])
    cache.append(0, torch.ones(len(rows), 1, K, D), torch.ones(len(rows), 1, K, D))


@given(st.lists(st.integers(0, B - 1), unique=True, min_size=1, max_size=B - 1))
def test_dropped_rows_leave_no_second_copy(rows):
    cache = filled()
    before = cache._k.untyped_storage().data_ptr(), cache._v.untyped_storage().data_ptr()
    cache.keep(torch.tensor(rows))
    assert before == (cache._k.untyped_storage().data_ptr(), cache._v.untyped_storage().data_ptr())


def test_too_many_tokens():
    with pytest.raises(ValueError, match="8 tokens do not fit a cache of 7"):
        KVCache(CONFIG, B, SLOTS).fill(0, torch.zeros(B, 8, K, D), torch.zeros(B, 8, K, D))


def test_what_is_free_on_a_gpu_may_be_taken(monkeypatch):
    """A GPU of 80 GB with 7B's weights. PyTorch holds 5 GB that nothing uses, 2 GB of them in
    pieces that cannot be given back."""
    kept = {"reserved": 18_500_000_000, "active": 13_500_000_000, "inactive_split": 2_000_000_000}
    free = {"bytes": 65_000_000_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 85 * 10**9))
    monkeypatch.setattr(
        torch.cuda,
        "memory_stats",
        lambda device: {f"{name}_bytes.all.current": size for name, size in kept.items()},
    )
    config, gpu, kind = SIZES["7b"], torch.device("cuda"), torch.bfloat16
    taken = room(config, gpu, kind)
    assert 0.85 * 68e9 < taken < 0.9 * 68e9
    assert rows_within(taken, config, kind, 256) > 256  # as many as are ever asked for
    assert 40 < rows_within(taken, config, kind, 2048) < 64
    # A prompt as long as that is run in one piece, whose keys and values are a second cache.
    assert taken - room(config, gpu, kind, 2 * 4096) > 4096 * 2 * 32 * 4096 * 2
    free["bytes"] = kept["reserved"] = 0
    assert room(config, gpu, kind) == 0 and rows_within(0, config, kind, 2048) == 1
    assert room(config, torch.device("cpu"), kind) == CACHE_BYTES
