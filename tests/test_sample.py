"""Run: python -m pytest tests/test_sample.py -q"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import sample

pytestmark = pytest.mark.usefixtures("poisoned_empty")
module = importlib.import_module("puna.kernels.sample")
MASK = (1 << 64) - 1
# 99.9% quantiles of chi-square by degrees of freedom
CHI_SQUARE = {2: 13.82, 3: 16.27, 5: 20.52, 7: 24.32}


def splitmix(x):
    """SplitMix64 on Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def by_hand(logits, temperature, top_k, top_p, seed):
    """One row, in plain Python: (token, tokens that may be drawn)."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda v: -probs[v])
    order = order[: top_k or None]
    kept, mass, whole = [], 0.0, sum(probs[v] for v in order)
    for v in order:
        if mass > top_p * whole:
            break
        kept.append(v)
        mass += probs[v]
    # untruncated draws run through the vocabulary in its own order
    order = sorted(kept) if top_k == 0 and top_p == 1.0 else kept
    threshold = (splitmix(seed & MASK) >> 11) * 2.0**-53 * sum(probs[v] for v in order)
    below = 0.0
    for v in order:
        below += probs[v]
        if below > threshold:
            return v, kept
    return order[-1], kept


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_mix64_is_splitmix64(seeds):
    hashed = module.mix64(torch.tensor(seeds))
    assert [h & MASK for h in hashed.tolist()] == [splitmix(s & MASK) for s in seeds]
    numbers = module.uniform(torch.tensor(seeds)).tolist()
    assert numbers == [(splitmix(s & MASK) >> 11) / 2**53 for s in seeds]


def test_uniform_numbers_of_neighbouring_seeds_are_uniform_and_unrelated():
    u = module.uniform(torch.arange(40000))
    assert 0 <= u.min() and u.max() < 1
    counts = (u * 8).long().bincount(minlength=8)
    assert ((counts - 5000.0) ** 2 / 5000).sum() < CHI_SQUARE[7]
    pairs = ((u[:-1] > 0.5).long() * 2 + (u[1:] > 0.5).long()).bincount(minlength=4)
    assert ((pairs - 39999 / 4) ** 2 / (39999 / 4)).sum() < CHI_SQUARE[3]


@settings(max_examples=60)
@given(
    batch=st.integers(0, 5),
    vocabulary=st.integers(1, 30),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    seed=st.integers(-(2**62), 2**62),
)
def test_draws_those_of_plain_python(batch, vocabulary, temperature, top_k, top_p, seed):
    torch.manual_seed(seed % 1000)
    logits = torch.randn(batch, vocabulary).double() * 2
    seeds = seed + torch.arange(batch)
    tokens, logprobs = sample(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds
    )
    for b in range(batch):
        token, kept = by_hand(logits[b], temperature, top_k, top_p, int(seeds[b]))
        assert int(tokens[b]) == token and token in kept
    untruncated = (logits / temperature).softmax(-1).log()
    torch.testing.assert_close(logprobs, untruncated.gather(1, tokens[:, None]).squeeze(1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [(1.0, 0, 1.0, 8), (0.5, 0, 1.0, 8), (1.0, 3, 1.0, 3), (2.0, 0, 0.8, 6), (1.0, 4, 0.7, 3)],
)
def test_frequencies_match_probabilities(temperature, top_k, top_p, kept):
    draws = 20000
    logits = torch.tensor([0.3, 1.5, -0.4, 0.9, -1.0, 1.1, 0.0, 0.6])
    probs = (logits.double() / temperature).softmax(-1)
    ordered, order = probs.sort(descending=True)
    if top_k:
        ordered[top_k:] = 0
    gone = ordered.cumsum(0) - ordered > top_p * ordered.sum()
    probs[order[gone | (ordered == 0)]] = 0
    expected = probs / probs.sum() * draws
    assert (expected > 0).sum() == kept
    tokens, _ = sample(
        logits.expand(draws, 8),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=torch.arange(draws),
    )
    counts = tokens.bincount(minlength=8)
    assert (counts[expected == 0] == 0).all()
    real = expected > 0
    statistic = ((counts - expected)[real] ** 2 / expected[real]).sum()
    assert statistic < CHI_SQUARE[kept - 1]


@pytest.mark.parametrize("seed", range(8))
def test_top_k_with_top_p_is_as_in_transformers(seed):
    """top-p counts the mass that top-k left; every token that may be drawn is."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(seed)
    logits, top_k, top_p = torch.randn(1, 20) * 2, 3 + seed, [0.5, 0.7, 0.9, 0.97][seed % 4]
    left = warpers.TopKLogitsWarper(top_k)(None, logits)
    expected = warpers.TopPLogitsWarper(top_p)(None, left)[0].softmax(-1)
    draws = 4000
    tokens, _ = sample(
        logits.expand(draws, 20), top_k=top_k, top_p=top_p, seeds=torch.arange(draws)
    )
    found = tokens.bincount(minlength=20) / draws
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_draw_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    logits, seeds = torch.randn(40, 50), torch.arange(100, 140)
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    together = sample(logits, seeds=seeds, **options)
    order = torch.randperm(40)
    shuffled = sample(logits[order], seeds=seeds[order], **options)
    for whole, mixed in zip(together, shuffled, strict=True):
        assert torch.equal(whole[order], mixed)
    for b in range(0, 40, 7):
        alone = sample(logits[b : b + 1], seeds=seeds[b : b + 1], **options)
        assert all(torch.equal(w[b : b + 1], a) for w, a in zip(together, alone, strict=True))


def test_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]])
    tokens, logprobs = sample(logits, temperature=0, seeds=torch.arange(2))
    assert tokens.tolist() == [1, 0]  # the first of equals
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[torch.arange(2), tokens])
    cold, _ = sample(logits[:1].expand(99, 3), temperature=1e-3, seeds=torch.arange(99))
    assert (cold == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logprobs_are_fp32(dtype):
    logits = (torch.randn(3, 9) * 5).to(dtype)
    tokens, logprobs = sample(logits, temperature=0.7, seeds=torch.arange(3))
    assert logprobs.dtype == torch.float32 and (logprobs <= 0).all()
    exact = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, exact.float())


@pytest.mark.parametrize("place", [0, 3, 6])
def test_tokens_of_probability_zero_are_never_drawn(place):
    """Forbidden tokens at the start, in the middle and at the end of the vocabulary."""
    logits = torch.full((1, 7), -torch.inf)
    logits[0, place] = 1.0
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
        tokens, logprobs = sample(logits.expand(500, 7), seeds=torch.arange(500), **options)
        assert (tokens == place).all() and (logprobs == 0).all()


def test_the_extreme_numbers():
    """u = 0 and the largest u below 1 pick the first and the last token that may be drawn."""
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for u, token in ((0.0, 1), (1 - 2.0**-53, 3)):
        assert module._invert(weights, torch.tensor([u]).double()).tolist() == [token]


def test_the_input_is_not_changed():
    logits = torch.randn(3, 9)
    before = logits.clone()
    sample(logits, temperature=0.5, top_k=2, top_p=0.5, seeds=torch.arange(3))
    assert torch.equal(logits, before)


def test_bad_input():
    logits, seeds = torch.randn(2, 5), torch.arange(2)
    nan, inf = float("nan"), float("inf")
    temperatures = [{"temperature": value} for value in (-1.0, 1e-40, 1e40, inf, nan)]
    for wrong in (*temperatures, {"top_k": -1}, *({"top_p": p} for p in (0.0, 1.1, nan, -inf))):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
            sample(logits, seeds=seeds, **wrong)
    with pytest.raises(ValueError, match="do not fit"):
        sample(logits, seeds=torch.arange(3))
    with pytest.raises(ValueError, match="do not fit"):
        sample(logits[0], seeds=seeds)
