"""Run: python -m pytest tests/test_native_logprobs.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna import kernels
from puna.core import ops
from puna.core.native import cross_entropy as native_loss
from puna.core.native import logprobs as native_logprobs
from puna.core.native.loader import extension

pytestmark = [
    pytest.mark.skipif(extension() is None, reason="the native extension is not built"),
    pytest.mark.usefixtures("poisoned_empty"),
]
SETS = ("avx512_bf16", "avx512", "avx2", "base")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one short."""
    monkeypatch.setattr(native_loss, "CHUNK_ELEMENTS", 300)


def ours(*inputs, temperature=1.0):
    """The native operation, which must be the one that runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "linear_logprobs", None)
        return ops.linear_logprobs(*inputs, temperature=temperature)


def make(shape, width, vocabulary, spread=1.0):
    hidden, weight = torch.randn(*shape, width), torch.randn(vocabulary, width) * spread
    return hidden, weight, torch.randint(vocabulary, shape)


def run(operation, hidden, weight, targets, upstream, temperature):
    """logprobs, entropy, d hidden, d weight"""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    found = operation(*leaves, targets, temperature=temperature)
    given = [u.to(found[0].dtype) for u in upstream]
    return [x.detach() for x in found] + list(torch.autograd.grad(found, leaves, given))


def exact(hidden, weight, targets, upstream, temperature):
    wide = hidden.double(), weight.double(), targets
    return run(kernels.linear_logprobs, *wide, upstream, temperature)


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    width=st.integers(1, 20),
    vocabulary=st.integers(1, 150),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    isa=st.sampled_from(SETS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_against_the_reference_in_fp64(shape, width, vocabulary, temperature, isa, threads, seed):
    torch.manual_seed(seed)
    inputs = make(shape, width, vocabulary)
    upstream = torch.randn(shape), torch.randn(shape)
    with pytest.MonkeyPatch.context() as patch:
        if isa in extension().instruction_sets():
            patch.setattr(native_logprobs, "best_instructions", lambda: isa)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        found = run(ours, *inputs, upstream, temperature)
        with torch.no_grad():
            alone = ours(*inputs, temperature=temperature)
    for mine, truth in zip(found, exact(*inputs, upstream, temperature), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=2e-4)
    assert torch.equal(alone[0], found[0]) and torch.equal(alone[1], found[1])


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_error_against_pytorch(no_worse_than_torch, spread):
    torch.manual_seed(0)
    inputs, upstream = make((400,), 64, 1000, spread), (torch.randn(400), torch.randn(400))
    no_worse_than_torch(
        run(ours, *inputs, upstream, 1.0),
        run(kernels.linear_logprobs, *inputs, upstream, 1.0),
        exact(*inputs, upstream, 1.0),
    )


def test_a_label_without_probability():
    """Its log-probability is right where its probability is none in fp32."""
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = ours(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == -600 and entropy.item() == pytest.approx(0, abs=1e-30)


def test_only_the_row_that_is_not_finite():
    hidden, weight, targets = make((6,), 5, 40)
    hidden[2, 1] = torch.nan
    found = run(ours, hidden, weight, targets, (torch.ones(6), torch.ones(6)), 1.0)
    for each in found[:3]:
        bad = [not row.isfinite().all() for row in each]
        assert bad == [False, False, True, False, False, False]


@pytest.mark.parametrize("trained", [0, 1])
def test_one_input_alone_is_trained(trained):
    inputs = list(make((7,), 5, 40))
    upstream = torch.randn(7), torch.randn(7)
    truth = exact(*inputs, upstream, 1.0)[2 + trained]
    inputs[trained].requires_grad_()
    torch.autograd.backward(ours(*inputs), upstream)
    torch.testing.assert_close(inputs[trained].grad.double(), truth, rtol=1e-4, atol=1e-4)
    assert inputs[1 - trained].grad is None


def test_there_is_a_first_derivative_only():
    hidden, weight, targets = make((7,), 5, 40)
    logprobs, _ = ours(hidden.requires_grad_(), weight, targets)
    first = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        first[0].sum().backward()


def test_logits_are_not_kept():
    hidden, weight, targets = make((30,), 5, 400)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert max(x.numel() for x in kept) == weight.numel()


def test_mistakes():
    hidden, weight, targets = make((7,), 5, 40)
    with pytest.raises(ValueError, match="targets holds 40; expected 0 to 39"):
        ours(hidden, weight, torch.full_like(targets, 40))
    with pytest.raises(ValueError, match="targets holds -1"):
        ours(hidden, weight, torch.full_like(targets, -1))
    with pytest.raises(ValueError, match="must be a number from 1e-30"):
        ops.linear_logprobs(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear_logprobs(hidden[:3], weight, targets)
