"""Run: python -m pytest tests/test_swiglu.py -q"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from puna.kernels import swiglu

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def by_hand(gate, up, upstream):
    """(y, dgate, dup) in fp64, one number at a time."""

    def one(g, u, d):
        s = 1 / (1 + math.exp(-g)) if g > -700 else 0.0
        return g * s * u, d * u * s * (1 + g * (1 - s)), d * g * s

    flat = zip(*(t.reshape(-1).tolist() for t in (gate, up, upstream)), strict=True)
    parts = torch.tensor([one(*each) for each in flat], dtype=torch.float64).view(-1, 3)
    return tuple(part.view(gate.shape) for part in parts.unbind(1))


def run(function, gate, up, upstream):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = function(gate, up)
    return (y.detach(), *torch.autograd.grad(y, (gate, up), upstream.to(y.dtype)))


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    scale=st.sampled_from([0.1, 1.0, 50.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_against_the_formula(shape, scale, seed):
    torch.manual_seed(seed)
    gate, up, upstream = (torch.randn(shape).double() for _ in range(3))
    gate = gate * scale
    exact = by_hand(gate, up, upstream)
    for found, truth in zip(run(swiglu, gate, up, upstream), exact, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    single = run(swiglu, gate.float(), up.float(), upstream.float())
    for found, truth in zip(single, exact, strict=True):
        torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-4)


def test_gradients_numerically():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_against_pytorch(dtype, no_worse_than_torch):
    torch.manual_seed(0)
    gate, up, upstream = ((torch.randn(5, 67) * 3).to(dtype) for _ in range(3))
    peer = run(lambda g, u: silu(g) * u, gate, up, upstream)
    no_worse_than_torch(run(swiglu, gate, up, upstream), peer, by_hand(gate, up, upstream))


def test_result_has_the_dtype_of_gate():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert swiglu(torch.randn(3).to(dtype), torch.randn(3).to(dtype)).dtype == dtype


def test_strided_inputs_and_expanded_gradients():
    both = torch.randn(6, 14).double()
    gate, up = both.chunk(2, -1)
    upstream = torch.tensor(0.3).double().expand(6, 7)
    for found, truth in zip(
        run(swiglu, gate, up, upstream), by_hand(gate, up, upstream), strict=True
    ):
        torch.testing.assert_close(found, truth)


def test_backward_twice_and_inputs_untouched():
    gate, up = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    upstream = torch.randn(3, 5)
    kept = [t.detach().clone() for t in (gate, up, upstream)]
    y = swiglu(gate, up)
    first = torch.autograd.grad(y, (gate, up), upstream, retain_graph=True)
    second = torch.autograd.grad(y, (gate, up), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((gate, up, upstream), kept, strict=True))


def test_bad_input():
    with pytest.raises(ValueError, match="not equal"):
        swiglu(torch.randn(2, 3), torch.randn(3))
