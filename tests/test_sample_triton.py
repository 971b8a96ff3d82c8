"""The sampling kernel, interpreted on the CPU or on a GPU: the reference's tokens, draw by draw.

Run: python -m pytest tests/test_sample_triton.py -q     (-m slow: thousands of truncated draws)
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import sample, use_backend

source = importlib.import_module("puna.kernels.sample")
pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "triton_device"),
    pytest.mark.filterwarnings("ignore:(invalid|divide):RuntimeWarning"),  # rows of NaN
]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def drawn(rows, width, dtype=F32, device="cpu", seed=0):
    torch.manual_seed(seed)
    return (torch.randn(rows, width) * 3).to(dtype).to(device)


def both(logits, seeds, **options):
    """(kernel's, reference's), each (tokens, logprobs) on the CPU."""
    found = [x.cpu() for x in sample(logits, seeds=seeds, **options)]
    with use_backend("reference"):
        return found, list(sample(logits.cpu(), seeds=seeds.cpu(), **options))


def exact_bounds(row, temperature, top_k, top_p):
    """Where in [0, 1] one kept token's interval ends and the next begins, in fp64."""
    probs = (row.double() / temperature).softmax(-1)
    if top_k or top_p < 1:
        probs = probs[row.double().sort(descending=True, stable=True).indices]
        probs[top_k or len(row) :] = 0
        probs = probs * (probs.cumsum(0) - probs <= top_p * probs.sum())
    return probs.cumsum(0) / probs.sum()


def check_same_tokens(logits, seeds, temperature=1.0, top_k=0, top_p=1.0):
    """Equal but where the uniform number lies within 1e-6 of a bound; and few lie there."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    (tokens, logprobs), (expected, expected_logprobs) = both(logits, seeds, **options)
    different = (tokens != expected).nonzero().flatten().tolist()
    for i in different:
        bounds = exact_bounds(logits[i].cpu(), temperature, top_k, top_p)
        assert (bounds - source.uniform(seeds.cpu())[i]).abs().min() < 1e-6
    assert len(different) <= 1 + len(seeds) // 1000
    same = tokens == expected
    torch.testing.assert_close(logprobs[same], expected_logprobs[same])


def many(device, interpreted, real):
    return real if device.type == "cuda" else interpreted


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_untruncated_draws_are_the_references(triton_device, dtype):
    rows = many(triton_device, 200, 20_000)
    logits = drawn(rows, 300, dtype, triton_device)
    check_same_tokens(logits, torch.arange(rows, device=triton_device) - 9, temperature=0.8)


TRUNCATIONS = [(0.8, 40, 1.0), (1.0, 0, 0.9), (1.3, 20, 0.7), (0.5, 7, 0.999), (1.0, 1, 1.0)]


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), TRUNCATIONS)
def test_truncated_draws_are_the_references(triton_device, dtype, temperature, top_k, top_p):
    rows = many(triton_device, 6, 5_000)
    logits = drawn(rows, 300, dtype, triton_device, seed=top_k)
    seeds = torch.arange(rows, device=triton_device) * 7919
    check_same_tokens(logits, seeds, temperature, top_k, top_p)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), *TRUNCATIONS])
def test_thousands_of_draws(triton_device, dtype, temperature, top_k, top_p):
    rows = many(triton_device, 500, 50_000)
    logits = drawn(rows, 512, dtype, triton_device, seed=1)
    seeds = torch.arange(rows, device=triton_device) * 104729
    check_same_tokens(logits, seeds, temperature, top_k, top_p)


@settings(max_examples=25)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_ties(triton_device, values, top_k, top_p, seed):
    """Few values, so that top-k and top-p cut through equals, and through zeros of both signs."""
    logits = torch.tensor([values], dtype=F32)
    logits[0, ::2] *= -1.0  # 0.0 becomes -0.0
    seeds = torch.tensor([seed])
    (tokens, _), (expected, _) = both(
        logits.to(triton_device), seeds.to(triton_device), top_k=top_k, top_p=top_p
    )
    if tokens != expected:
        bounds = exact_bounds(logits[0], 1.0, top_k, top_p)
        assert (bounds - source.uniform(seeds)).abs().min() < 1e-6


@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_top_p_keeps_the_same_equals(triton_device, top_p):
    """Ten equals: p times ten is rounded, and decides whether one more is kept."""
    logits = torch.zeros(1, 10, device=triton_device).expand(10, 10)
    last = 1 - torch.arange(10) / 1e4
    seeds = seeds_with(last).to(triton_device)
    (tokens, _), (expected, _) = both(logits, seeds, top_p=top_p)
    assert torch.equal(tokens, expected)


def seeds_with(uniforms):
    """Seeds whose uniform numbers are near the ones asked for."""
    seeds = torch.arange(400_000)
    order = source.uniform(seeds).sort()
    return order.indices[torch.searchsorted(order.values, uniforms.double()).clamp(max=399_999)]


@pytest.mark.parametrize(("held", "tile"), [(32768, 256), (0, 512)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 30, "top_p": 0.8}])
def test_rows_of_many_tiles(triton_device, monkeypatch, held, tile, options):
    """A row held in several tiles, and one that every pass loads again."""
    monkeypatch.setattr(source, "WIDEST_HELD", held)
    monkeypatch.setattr(source, "LARGEST_TILE", tile)
    logits = drawn(6, 700, BF16, triton_device)
    seeds = torch.arange(6, device=triton_device)
    if options.get("temperature") == 0:
        (tokens, _), (expected, _) = both(logits, seeds, **options)
        assert torch.equal(tokens, expected)
    else:
        check_same_tokens(logits, seeds, **options)
    uniforms = torch.tensor([0.0, 0.3, 0.5, 0.9, 0.9999, 0.01])
    check_same_tokens(torch.zeros_like(logits), seeds_with(uniforms).to(triton_device))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 3.0])
def test_logprobs_against_fp64(triton_device, no_worse_than_torch, dtype, temperature):
    logits = drawn(24, 257, dtype, triton_device)
    seeds = torch.arange(24, device=triton_device)
    tokens, logprobs = sample(logits, temperature=temperature, seeds=seeds)
    assert logprobs.dtype == F32 and tokens.dtype == torch.int64 and (logprobs <= 0).all()

    def of(values):
        return (values / (temperature or 1.0)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    no_worse_than_torch((logprobs,), (of(logits.float()),), (of(logits.double()),))


def test_greedy(triton_device):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, -1.0, 2.0, -torch.inf]])
    tokens, logprobs = sample(
        logits.to(triton_device), temperature=0, top_k=2, seeds=torch.arange(2).to(triton_device)
    )
    assert tokens.tolist() == [1, 0]  # the first of equals
    expected = logits.log_softmax(-1)[torch.arange(2), tokens.cpu()]
    torch.testing.assert_close(logprobs.cpu(), expected)


@pytest.mark.parametrize("place", [0, 300, 511])
def test_tokens_of_probability_zero_are_never_drawn(triton_device, place):
    """Nor is k larger than the tokens that may be drawn."""
    logits = torch.full((1, 512), -torch.inf)
    logits[0, [place, 17]] = torch.tensor([1.0, -200.0])
    logits = logits.to(triton_device).expand(6, 512)
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 1e-30}):
        seeds = seeds_with(torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 1.0])).to(triton_device)
        tokens, logprobs = sample(logits, seeds=seeds, **options)
        assert (tokens == place).all() and (logprobs == 0).all()


def test_a_draw_does_not_depend_on_its_batch(triton_device):
    logits = drawn(7, 300, BF16, triton_device)
    seeds = torch.arange(100, 107, device=triton_device)
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    together = sample(logits, seeds=seeds, **options)
    order = torch.tensor([3, 0, 6], device=triton_device)
    for some in (sample(logits[order], seeds=seeds[order], **options),):
        assert all(torch.equal(w[order], s) for w, s in zip(together, some, strict=True))
    for b in (2, 5):
        alone = sample(logits[b : b + 1], seeds=seeds[b : b + 1], **options)
        assert all(torch.equal(w[b : b + 1], a) for w, a in zip(together, alone, strict=True))


def test_strided_and_expanded_logits(triton_device):
    logits = drawn(4, 90, F32, triton_device)
    seeds = torch.arange(8, device=triton_device)[::2]
    expected = sample(logits, seeds=seeds.contiguous())
    wide = torch.full((4, 200), torch.nan, device=triton_device)
    wide[:, 60:150] = logits
    for same in (wide[:, 60:150], logits.t().contiguous().t()):
        found = sample(same, seeds=seeds)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = sample(logits[:1].expand(4, 90), seeds=seeds)
    expected = sample(logits[:1].repeat(4, 1), seeds=seeds)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_far_apart(triton_device):
    """Two rows 2^31 elements apart: 4 GB of addresses, a page or two of memory."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=triton_device)
    far = torch.empty(0, dtype=BF16, device=triton_device)
    far.set_(storage, 0, (2, 50), (2**31, 1))
    far.copy_(drawn(2, 50, BF16, triton_device))
    seeds = torch.arange(2, device=triton_device)
    found, expected = sample(far, seeds=seeds), sample(far.clone(), seeds=seeds)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_empty_batch_and_inputs_stay(triton_device):
    tokens, logprobs = sample(
        torch.zeros(0, 9, device=triton_device), seeds=torch.arange(0, device=triton_device)
    )
    assert tokens.shape == logprobs.shape == (0,)
    logits = drawn(2, 9, F32, triton_device).requires_grad_()
    before = logits.detach().clone()
    _, logprobs = sample(logits, top_k=2, seeds=torch.arange(2, device=triton_device))
    assert torch.equal(logits.detach(), before) and not logprobs.requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 0.9)])
def test_rows_that_hold_no_distribution(triton_device, monkeypatch, bad, options):
    """The token is one of the vocabulary all the same, the log-prob NaN, the next row's right."""
    logits = drawn(3, 60, F32, triton_device)
    logits[0, 33], logits[2] = bad, -torch.inf
    seeds = torch.arange(3, device=triton_device)
    tokens, logprobs = source.sample_draw(logits, seeds, *options)
    assert ((tokens >= 0) & (tokens < 60)).all()
    assert logprobs.isnan().tolist() == [True, False, True]
    temperature, top_k, top_p = options
    monkeypatch.setenv("PUNA_DEBUG", "1")
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="row 0"):
            sample(logits, seeds=seeds, temperature=temperature, top_k=top_k, top_p=top_p)


def test_operator(triton_device):
    logits, seeds = drawn(2, 9, F32, triton_device), torch.arange(2, device=triton_device)
    for options in ((1.0, 0, 1.0), (0.7, 3, 0.9), (0.0, 0, 1.0)):
        torch.library.opcheck(source.sample_draw.operator, (logits, seeds, *options))


def test_compiles_to_one_graph(triton_device):
    torch._dynamo.reset()

    def step(logits, seeds):
        tokens, logprobs = sample(logits * 2, temperature=0.9, top_k=4, seeds=seeds)
        return tokens + 1, logprobs

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        logits = drawn(rows, 20, F32, triton_device)
        seeds = torch.arange(rows, device=triton_device)
        found, expected = compiled(logits, seeds), step(logits, seeds)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bad_input(triton_device):
    logits, seeds = drawn(2, 5, F32, triton_device), torch.arange(2, device=triton_device)
    with pytest.raises(ValueError, match="int64"):
        sample(logits, seeds=seeds.int())
    with pytest.raises(ValueError, match="int64 on meta"):
        sample(logits.to("meta"), seeds=seeds)
    with pytest.raises(ValueError, match="at least one token"):
        sample(logits[:, :0], seeds=seeds)
    with pytest.raises(ValueError, match="at least one token"):
        sample(logits.long(), seeds=seeds)
    with pytest.raises(ValueError, match="dtype"):
        sample(logits.double(), seeds=seeds)
    with pytest.raises(ValueError, match="must be"):
        sample(logits, temperature=float("nan"), seeds=seeds)
    wide = torch.zeros(1, 1, device=triton_device).expand(2, (1 << 18) + 1)
    with pytest.raises(ValueError, match="wide"):
        sample(wide, seeds=seeds)
