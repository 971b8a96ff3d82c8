"""Run: python -m pytest tests/test_rms_norm.py -q"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm as torch_rms_norm

from puna.kernels import add_rms_norm, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned_empty")
EPS = 1e-3  # large enough to be seen


def by_hand(x, weight, upstream, eps=EPS):
    """(y, dx, dweight) in fp64, a row at a time, from the closed form of the gradient."""
    width = x.shape[-1]
    w, y, dx, dw = weight.tolist(), [], [], [0.0] * width
    rows = zip(x.reshape(-1, width).tolist(), upstream.reshape(-1, width).tolist(), strict=True)
    for row, grad in rows:
        r = 1 / math.sqrt(math.fsum(v * v for v in row) / width + eps)
        inner = math.fsum(g * a * v for g, a, v in zip(grad, w, row, strict=True))
        y.append([v * r * a for v, a in zip(row, w, strict=True)])
        dx.append(
            [r * g * a - r**3 / width * v * inner for g, a, v in zip(grad, w, row, strict=True)]
        )
        dw = [d + g * v * r for d, g, v in zip(dw, grad, row, strict=True)]
    shaped = [torch.tensor(part, dtype=torch.float64).view(x.shape) for part in (y, dx)]
    return (*shaped, torch.tensor(dw, dtype=torch.float64))


def run(norm, x, weight, upstream):
    """(y, dx, dweight) of `norm(x, weight)`."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = norm(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), upstream.to(y.dtype)))


def ours(x, weight):
    return rms_norm(x, weight, eps=EPS)


@settings(max_examples=40)
@given(
    leading=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    width=st.integers(1, 19),
    seed=st.integers(0, 99),
)
def test_against_the_formula(leading, width, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(*leading, width).double(), torch.randn(width).double()
    upstream = torch.randn(x.shape).double()
    exact = by_hand(x, weight, upstream)
    for found, truth in zip(run(ours, x, weight, upstream), exact, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    single = run(ours, x.float(), weight.float(), upstream.float())
    for found, truth in zip(single, exact, strict=True):
        torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-4)


def test_gradients_numerically():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x, weight))
    both = torch.randn_like(x, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, eps=EPS), (x, both, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 30.0])
def test_error_against_pytorch(dtype, scale, no_worse_than_torch):
    torch.manual_seed(0)
    x = (torch.randn(7, 131) * scale).to(dtype)
    weight, upstream = torch.randn(131).to(dtype), torch.randn(7, 131).to(dtype)
    peer = run(lambda a, w: torch_rms_norm(a, (131,), w, EPS), x, weight, upstream)
    exact = by_hand(*(t.double() for t in (x, weight, upstream)))
    no_worse_than_torch(run(ours, x, weight, upstream), peer, exact)


@pytest.mark.parametrize(("cast", "dtype"), [("llama", torch.bfloat16), ("hf", torch.float32)])
def test_dtype_of_the_result(cast, dtype):
    """The normalised value is rounded to bf16 before the fp32 weight meets it, in both."""
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    y = rms_norm(x, weight, eps=EPS, cast=cast)
    assert y.dtype == dtype
    plain = by_hand(x.double(), torch.ones(8).double(), torch.zeros(3, 8))[0].bfloat16()
    assert torch.equal(y, (plain.float() * weight).to(dtype))


def test_statistics_do_not_overflow_in_fp16():
    """300^2 exceeds fp16's largest number."""
    y = rms_norm(torch.full((2, 4), 300.0).half(), torch.ones(4).half())
    assert torch.equal(y, torch.ones(2, 4).half())


def test_a_row_of_zeros_has_finite_gradients():
    x = torch.zeros(2, 6)
    for part in run(rms_norm, x, torch.ones(6), torch.ones(2, 6)):
        assert part.isfinite().all()


def test_strided_inputs_and_expanded_gradients():
    x, weight = torch.randn(6, 10).double().T[1:, ::2], torch.randn(6).double()[::2]
    upstream = torch.tensor(0.7).double().expand(9, 3)
    for found, truth in zip(
        run(ours, x, weight, upstream), by_hand(x, weight, upstream), strict=True
    ):
        torch.testing.assert_close(found, truth)


def test_backward_twice_and_inputs_untouched():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    before = x.detach().clone(), weight.detach().clone()
    upstream = torch.randn(3, 5)
    kept = upstream.clone()
    y = rms_norm(x, weight)
    first = torch.autograd.grad(y, (x, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    assert torch.equal(upstream, kept)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_gradient_of_one_input_alone(which):
    tensors = {"x": torch.randn(3, 5), "weight": torch.randn(5)}
    both = run(rms_norm, *tensors.values(), torch.ones(3, 5))
    tensors[which].requires_grad_()
    rms_norm(**tensors).sum().backward()
    torch.testing.assert_close(tensors[which].grad, both[1 if which == "x" else 2])


def test_add_rms_norm_is_add_then_norm():
    x, residual, weight = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    y, summed = add_rms_norm(x, residual, weight, eps=EPS)
    assert torch.equal(summed, residual + x)
    assert torch.equal(y, rms_norm(residual + x, weight, eps=EPS))


def test_bad_input():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match="expected 'llama' or 'hf'"):
        rms_norm(x, torch.ones(4), cast="gemma")
    with pytest.raises(ValueError, match="not equal"):
        add_rms_norm(x, torch.randn(1, 4), torch.ones(4))
