"""Run: python -m pytest tests/test_linear_cross_entropy.py -q"""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from puna.kernels import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_empty")
module = importlib.import_module("puna.kernels.linear_loss.cross_entropy")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of two or three rows, so that there are several and the last one is short."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 30)


def by_hand(hidden, weight, targets, weights=None, reduction="mean", z_loss=0.0, ignore=-100):
    """Token by token, label by label, in the dtype given."""
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).tolist()
    scale = [1.0] * len(labels) if weights is None else weights.reshape(-1).tolist()
    scale = [0.0 if y == ignore else w for w, y in zip(scale, labels, strict=True)]
    nothing = flat.sum() * 0 + weight.sum() * 0
    losses = []
    for n, (label, factor) in enumerate(zip(labels, scale, strict=True)):
        if factor == 0:
            losses.append(nothing)
            continue
        scores = torch.stack([(flat[n] * row).sum() for row in weight])
        norm = scores.max() + (scores - scores.max()).exp().sum().log()
        losses.append(factor * (norm - scores[label] + z_loss * norm * norm))
    if reduction == "none":
        return torch.stack([nothing, *losses])[1:].view(targets.shape)
    total = sum(losses, nothing)
    return total if reduction == "sum" or not any(scale) else total / math.fsum(scale)


def run(function, hidden, weight, upstream=None):
    """(loss, dhidden, dweight)"""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(*leaves)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    grads = torch.autograd.grad(loss, leaves, upstream, allow_unused=True, materialize_grads=True)
    return (loss.detach(), *grads)


def make(shape, width, vocabulary, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(*shape, width).double(), torch.randn(vocabulary, width).double()
    return hidden, weight, torch.randint(vocabulary, shape)


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 13),
    dropped=st.sampled_from([0.0, 0.4, 1.0]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    z_loss=st.sampled_from([0.0, 0.01]),
    seed=st.integers(0, 99),
)
def test_against_the_formula(shape, width, vocabulary, dropped, weighted, reduction, z_loss, seed):
    hidden, weight, targets = make(shape, width, vocabulary, seed)
    targets[torch.rand(shape) < dropped] = -100
    weights = torch.rand(shape) * (torch.rand(shape) < 0.7) if weighted else None
    upstream = torch.randn(shape if reduction == "none" else ()).double()
    options = {"weights": weights, "reduction": reduction, "z_loss": z_loss}
    exact = run(lambda *x: by_hand(*x, targets, **options), hidden, weight, upstream)
    found = run(lambda *x: linear_cross_entropy(*x, targets, **options), hidden, weight, upstream)
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-7, atol=1e-9)
    single = hidden.float(), weight.float()
    found = run(lambda *x: linear_cross_entropy(*x, targets, **options), *single, upstream)
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_numerically(reduction):
    hidden, weight, targets = make((2, 4), 3, 7)
    targets[1, 2] = -100
    weights = torch.tensor([[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 0.25]])
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss(*x):
        return linear_cross_entropy(*x, targets, weights=weights, reduction=reduction, z_loss=0.02)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_labels_ignored(reduction):
    hidden, weight, targets = make((3, 2), 4, 5)
    loss, *grads = run(
        lambda *x: linear_cross_entropy(*x, targets.fill_(-100), reduction=reduction),
        hidden,
        weight,
    )
    assert (loss == 0).all() and all((g == 0).all() and g.isfinite().all() for g in grads)


def test_dropped_rows_may_hold_anything():
    """NaN behind a zero weight or an ignored label reaches neither loss nor gradients."""
    hidden, weight, targets = make((6,), 4, 5)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, torch.nan])
    targets[4], targets[5], targets[1] = 7, 7, 99
    hidden[1] = hidden[4] = hidden[5] = torch.nan
    keep = torch.tensor([0, 2, 3])

    def whole(*x):
        return linear_cross_entropy(*x, targets, weights=weights, ignore_index=7)

    def kept(h, w):
        return linear_cross_entropy(h[keep], w, targets[keep], weights=weights[keep])

    for mine, truth in zip(run(whole, hidden, weight), run(kept, hidden, weight), strict=True):
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("upstream", ["random", "expanded", "strided", "zero"])
def test_none_under_any_upstream_gradient(upstream):
    """The mode in which a peer gave wrong weight gradients for a year and a half."""
    hidden, weight, targets = make((4, 3), 5, 9)
    weights = torch.rand(4, 3)
    grads = {
        "random": torch.randn(4, 3).double(),
        "expanded": torch.tensor(-1.3).double().expand(4, 3),
        "strided": torch.randn(3, 8).double().T[::2],
        "zero": torch.zeros(4, 3).double(),
    }[upstream]
    options = {"weights": weights, "reduction": "none"}
    found = run(lambda *x: linear_cross_entropy(*x, targets, **options), hidden, weight, grads)
    exact = run(lambda *x: by_hand(*x, targets, **options), hidden, weight, grads)
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_twice_and_inputs_untouched(reduction):
    hidden, weight, targets = make((7,), 4, 9)
    kept = hidden.clone(), weight.clone(), targets.clone()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, targets, reduction=reduction)
    upstream = torch.randn(loss.shape).double()
    before = upstream.clone()
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*leaves, targets), kept, strict=True))
    assert torch.equal(upstream, before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_frozen_input(reduction, frozen):
    hidden, weight, targets = make((7,), 4, 9)
    both = run(
        lambda *x: linear_cross_entropy(*x, targets, reduction=reduction).sum(), hidden, weight
    )
    learns = weight if frozen == "hidden" else hidden
    learns.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()
    torch.testing.assert_close(learns.grad, both[2 if frozen == "hidden" else 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_error_against_pytorch(dtype, reduction, no_worse_than_torch, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 500)
    hidden, weight, targets = make((37,), 32, 50)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    upstream = torch.randn(37 if reduction == "none" else ())
    exact = run(
        lambda *x: cross_entropy(linear(*x), targets, reduction=reduction),
        hidden.double(),
        weight.double(),
        upstream,
    )
    peer = run(
        lambda *x: cross_entropy(linear(*x), targets, reduction=reduction),
        hidden,
        weight,
        upstream.to(dtype),
    )
    found = run(
        lambda *x: linear_cross_entropy(*x, targets, reduction=reduction),
        hidden,
        weight,
        upstream.to(dtype),
    )
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    no_worse_than_torch(found, peer, exact)


def test_weight_gradient_of_many_chunks_is_summed_in_fp32():
    """512 chunks of equal rows: a bf16 sum would stop growing at 256 times an addend."""
    hidden, weight = torch.ones(2048, 2).bfloat16(), torch.zeros(7, 2).bfloat16()
    targets = torch.zeros(2048, dtype=torch.int64)
    _, _, d_weight = run(
        lambda *x: linear_cross_entropy(*x, targets, reduction="sum"), hidden, weight
    )
    exact = torch.full((7, 2), 2048 / 7).double()
    exact[0] -= 2048
    torch.testing.assert_close(d_weight.double(), exact, rtol=1e-2, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else [out]
        sizes = [t.numel() for t in outputs if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_logits_are_never_held(reduction, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5000)
    hidden, weight, targets = make((200,), 3, 1000)  # N x V would be 200,000
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        linear_cross_entropy(*leaves, targets, reduction=reduction).sum().backward()
    assert largest.elements == 5000


def test_evaluation_forms_no_gradients():
    """Under no_grad the head still asks for a gradient; nobody will ever read one."""
    hidden, weight, targets = make((6,), 4, 9)
    weight.requires_grad_()
    sizes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "mm" in function.__name__:
                sizes.append(tuple(out.shape))
            return out

    with torch.no_grad(), Products():
        linear_cross_entropy(hidden, weight, targets)
    assert sizes == [(3, 9), (3, 9)]


def test_weights_are_constants():
    hidden, weight, targets = make((6,), 4, 9)
    weights = torch.rand(6, requires_grad=True)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, weights=weights)
    loss.backward()
    assert weights.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_derivative_is_refused(reduction):
    hidden, weight, targets = make((6,), 4, 9)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, reduction=reduction)
    (first,) = torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only: where you need a second"):
        first.sum().backward()


def test_bad_input():
    hidden, weight, targets = make((6,), 4, 9)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match="weights are"):
        linear_cross_entropy(hidden, weight, targets, weights=torch.ones(3, 2))
    with pytest.raises(ValueError, match="expected 'mean', 'sum' or 'none'"):
        linear_cross_entropy(hidden, weight, targets, reduction="avg")
    for wrong in (9, -1):
        with pytest.raises(ValueError, match="the head has 9 rows"):
            linear_cross_entropy(
                hidden, weight, targets.clone().index_fill_(0, torch.tensor([2]), wrong)
            )
