"""Run: python -m pytest tests/test_linear_logprobs.py -q"""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from puna.kernels import backend, derivatives, linear_cross_entropy, linear_logprobs

pytestmark = pytest.mark.usefixtures("poisoned_empty")
module = importlib.import_module("puna.kernels.linear_loss.cross_entropy")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of two or three rows, so that there are several and the last one is short."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 30)


def by_hand(hidden, weight, targets, temperature=1.0):
    """(logprobs, entropy), token by token, label by label."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    nothing = flat.sum() * 0 + weight.sum() * 0
    logprobs, entropy = [nothing], [nothing]
    for n, label in enumerate(targets.reshape(-1).tolist()):
        scores = torch.stack([(flat[n] * row).sum() / temperature for row in weight])
        norm = scores.max() + (scores - scores.max()).exp().sum().log()
        logprobs.append(scores[label] - norm)
        entropy.append(norm - ((scores - norm).exp() * scores).sum())
    return tuple(torch.stack(part)[1:].view(targets.shape) for part in (logprobs, entropy))


def run(function, hidden, weight, upstream):
    """(logprobs, entropy, dhidden, dweight)"""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    outs = function(*leaves)
    grads = torch.autograd.grad(outs, leaves, [u.to(outs[0].dtype) for u in upstream])
    return (*(out.detach() for out in outs), *grads)


def make(shape, width, vocabulary, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(*shape, width).double(), torch.randn(vocabulary, width).double()
    return hidden, weight, torch.randint(vocabulary, shape)


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 13),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    seed=st.integers(0, 99),
)
def test_against_the_formula(shape, width, vocabulary, temperature, seed):
    hidden, weight, targets = make(shape, width, vocabulary, seed)
    upstream = torch.randn(shape).double(), torch.randn(shape).double()
    exact = run(lambda *x: by_hand(*x, targets, temperature), hidden, weight, upstream)

    def ours(*x):
        return linear_logprobs(*x, targets, temperature=temperature)

    for mine, truth in zip(run(ours, hidden, weight, upstream), exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-7, atol=1e-9)
    found = run(ours, hidden.float(), weight.float(), upstream)
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-3, atol=2e-4)


def test_gradients_numerically():
    hidden, weight, targets = make((2, 4), 3, 7)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: linear_logprobs(*x, targets, temperature=0.8), leaves
    )


@settings(max_examples=40)
@given(
    vocabulary=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    temperature=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_logprob_at_most_zero_and_entropy_within_bounds(
    vocabulary, scale, dtype, temperature, seed
):
    """A positive log-prob once collapsed a peer's reward."""
    hidden, weight, targets = make((9,), 5, vocabulary, seed)
    hidden, weight = (hidden * scale).to(dtype), weight.to(dtype)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, temperature=temperature)
    assert logprobs.isfinite().all() and (logprobs <= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocabulary) * (1 + 1e-6) + 1e-6).all()


def test_a_uniform_distribution():
    hidden, weight, targets = make((5,), 3, 11)
    logprobs, entropy = linear_logprobs(hidden * 0, weight, targets)
    torch.testing.assert_close(entropy, torch.full((5,), math.log(11)).double())
    torch.testing.assert_close(logprobs, -entropy)


def test_equals_the_negated_cross_entropy():
    hidden, weight, targets = make((3, 4), 5, 9)
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(linear_logprobs(hidden, weight, targets)[0], -losses)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("upstream", ["expanded", "strided"])
def test_one_output_alone_under_any_upstream_gradient(output, upstream):
    hidden, weight, targets = make((4, 3), 5, 9)
    grad = torch.tensor(-1.3).double().expand(4, 3)
    if upstream == "strided":
        grad = torch.randn(3, 8).double().T[::2]
    found = run(
        lambda *x: linear_logprobs(*x, targets)[output : output + 1], hidden, weight, [grad]
    )
    exact = run(lambda *x: by_hand(*x, targets)[output : output + 1], hidden, weight, [grad])
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth)


def test_backward_twice_and_inputs_untouched():
    hidden, weight, targets = make((7,), 4, 9)
    kept = hidden.clone(), weight.clone()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    outs = linear_logprobs(*leaves, targets)
    upstream = [torch.randn(7).double() for _ in range(2)]
    before = [u.clone() for u in upstream]
    first = torch.autograd.grad(outs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outs, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(upstream, before, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_frozen_input(frozen):
    hidden, weight, targets = make((7,), 4, 9)
    both = run(lambda *x: linear_logprobs(*x, targets), hidden, weight, [torch.ones(7)] * 2)
    learns = weight if frozen == "hidden" else hidden
    learns.requires_grad_()
    sum(linear_logprobs(hidden, weight, targets)).sum().backward()
    torch.testing.assert_close(learns.grad, both[3 if frozen == "hidden" else 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_against_pytorch(dtype, no_worse_than_torch, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 500)
    hidden, weight, targets = make((37,), 32, 50)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    upstream = [torch.randn(37).to(dtype) for _ in range(2)]

    def peer(hidden, weight):
        logp = linear(hidden, weight).log_softmax(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    exact = run(peer, hidden.double(), weight.double(), upstream)
    found = run(lambda *x: linear_logprobs(*x, targets), hidden, weight, upstream)
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == dtype
    no_worse_than_torch(found, run(peer, hidden, weight, upstream), exact)


def test_all_logits_are_never_held(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5000)
    hidden, weight, targets = make((200,), 3, 1000)  # N x V would be 200,000
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    sizes = []
    for place in (backend, derivatives):  # an operator would hide its inside
        monkeypatch.setattr(place, "traced", lambda: False)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outputs = out if isinstance(out, tuple | list) else [out]
            sizes.extend(t.numel() for t in outputs if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        sum(linear_logprobs(*leaves, targets, temperature=0.7)).sum().backward()
    assert max(sizes) == 5000


def test_bad_input():
    hidden, weight, targets = make((6,), 4, 9)
    with pytest.raises(ValueError, match="do not fit"):
        linear_logprobs(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="temperature is 0; it must be a number from 1e-30 to 1e"):
        linear_logprobs(hidden, weight, targets, temperature=0)
    for wrong in (9, -100):
        targets[2] = wrong
        with pytest.raises(ValueError, match="the head has 9 rows"):
            linear_logprobs(hidden, weight, targets)
