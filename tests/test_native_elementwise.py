"""Run: python -m pytest tests/test_native_elementwise.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from puna import kernels
from puna.core import ops
from puna.core.native import elementwise as native_elementwise
from puna.core.native.loader import extension

pytestmark = [
    pytest.mark.skipif(extension() is None, reason="the native extension is not built"),
    pytest.mark.usefixtures("poisoned_empty"),
]
NAMES = ("rms_norm", "swiglu", "rope")
EPS = 1e-2


def ours(name):
    """The native operation, which must be the one that runs."""

    def call(*inputs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, name, None)
            return getattr(ops, name)(*inputs, **({"eps": EPS} if name == "rms_norm" else {}))

    return call


def theirs(name):
    return lambda *x: getattr(kernels, name)(*x, **({"eps": EPS} if name == "rms_norm" else {}))


def norm(rows, width):
    return torch.randn(rows, width) * 3 + 1, torch.randn(width)


def gates(rows, width):
    return torch.randn(rows, width) * 8, torch.randn(rows, width)


def heads(rows, tokens, query=3, key=1, size=18, each=False):
    """q, k and the angles: of `each` token, or tables that hold more than there are tokens."""
    tables = ops.rope_tables(tokens + 5, size)
    if each:
        tables = [x[torch.randint(tokens + 5, (rows, tokens))] for x in tables]
    return torch.randn(rows, tokens, query, size), torch.randn(rows, tokens, key, size), *tables


MAKE = {"rms_norm": norm, "swiglu": gates, "rope": heads}


def gradients(operation, inputs, upstreams):
    """Results, and the gradients of the first two inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    found = operation(*leaves, *inputs[2:])
    found = found if isinstance(found, tuple) else (found,)
    given = [u.to(found[0].dtype) for u in upstreams]
    return [x.detach() for x in found] + list(torch.autograd.grad(found, leaves, given))


def shapes(name, inputs):
    """Of what an operation returns."""
    return [x.shape for x in (inputs[:2] if name == "rope" else inputs[:1])]


def check(name, inputs, upstreams=None):
    upstreams = upstreams or [torch.randn(shape) for shape in shapes(name, inputs)]
    exact = gradients(theirs(name), [x.double() for x in inputs], upstreams)
    for mine, truth in zip(gradients(ours(name), inputs, upstreams), exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=2e-5)
    with torch.no_grad():  # another way through
        alone = ours(name)(*inputs)
    for mine, truth in zip(alone if name == "rope" else (alone,), exact, strict=False):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
@settings(max_examples=30)
@given(rows=st.integers(0, 19), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_rows_against_the_reference_in_fp64(name, rows, width, seed):
    torch.manual_seed(seed)
    check(name, MAKE[name](rows, width))


@settings(max_examples=30)
@given(
    rows=st.integers(0, 3),
    tokens=st.integers(0, 6),
    query=st.integers(1, 4),
    key=st.integers(1, 4),
    half=st.integers(1, 40),
    each=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rope_against_the_reference_in_fp64(rows, tokens, query, key, half, each, seed):
    torch.manual_seed(seed)
    check("rope", heads(rows, tokens, query, key, 2 * half, each))


LARGE = {"rms_norm": (2048, 96), "swiglu": (300, 96), "rope": (4, 64, 4, 2, 48)}


@pytest.mark.parametrize("name", NAMES)
def test_error_against_pytorch(name, no_worse_than_torch):
    torch.manual_seed(0)
    inputs = MAKE[name](*LARGE[name])
    upstreams = [torch.randn(shape) for shape in shapes(name, inputs)]
    no_worse_than_torch(
        gradients(ours(name), inputs, upstreams),
        gradients(theirs(name), inputs, upstreams),
        gradients(theirs(name), [x.double() for x in inputs], upstreams),
    )


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "base"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_each_instruction_set(name, threads, isa, monkeypatch):
    if isa not in extension().instruction_sets():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setattr(native_elementwise, "best_instructions", lambda: isa)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    large = {"rms_norm": (61, 291), "swiglu": (61, 291), "rope": (3, 53, 3, 2, 36)}[name]
    inputs = MAKE[name](*large)
    assert inputs[0].numel() > 1 << 14  # smaller ones never leave one thread
    check(name, inputs)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "scalar"])
@pytest.mark.parametrize("name", NAMES)
def test_upstream_gradients_lie_anywhere(name, layout):
    torch.manual_seed(0)
    inputs = heads(2, 5) if name == "rope" else MAKE[name](6, 21)

    def laid_out(shape):
        if layout == "expanded":
            return torch.randn(shape[-1]).expand(shape)
        if layout == "transposed":
            first, second, *rest = shape
            return torch.randn(second, first, *rest).transpose(0, 1)
        if layout == "sliced":
            return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
        return torch.tensor(0.7).expand(shape)

    check(name, inputs, [laid_out(shape) for shape in shapes(name, inputs)])


def test_heads_are_read_where_they_are():
    torch.manual_seed(0)
    packed = torch.randn(2, 5, 7, 18)  # q, k and v in one
    q, k, cos, sin = packed[:, :, :3], packed[:, :, 3:5].transpose(0, 1), *ops.rope_tables(5, 18)
    check("rope", (q, k.transpose(0, 1), cos, sin))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_passed_on(name, bad):
    torch.manual_seed(0)
    for place in (0, 17, -1):  # in a whole vector and at the end
        inputs = heads(1, 4) if name == "rope" else MAKE[name](3, 21)
        inputs[0].view(-1)[place] = bad
        upstreams = [torch.randn(shape) for shape in shapes(name, inputs)]
        exact = gradients(theirs(name), [x.double() for x in inputs], upstreams)
        for mine, truth in zip(gradients(ours(name), inputs, upstreams), exact, strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=2e-5, equal_nan=True)


def test_large_gates():
    gate = torch.tensor([-1e30, -200.0, -103.0, -88.5, -87.5, -20.0, 0.0, 20.0, 87.5, 200.0, 1e30])
    check("swiglu", (gate, torch.randn(11)))


@pytest.mark.parametrize("name", NAMES)
def test_there_is_a_first_derivative_only(name):
    inputs = heads(1, 4) if name == "rope" else MAKE[name](3, 21)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    found = ours(name)(*leaves, *inputs[2:])
    total = sum(x.sum() for x in found) if name == "rope" else found.sum()
    first = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        first[0].sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_under_checkpointing(name):
    torch.manual_seed(0)
    inputs = heads(2, 4) if name == "rope" else MAKE[name](3, 21)
    upstreams = [torch.randn(shape) for shape in shapes(name, inputs)]

    def again(*given):
        return checkpoint(ours(name), *given, use_reentrant=False)

    for mine, direct in zip(
        gradients(again, inputs, upstreams), gradients(ours(name), inputs, upstreams), strict=True
    ):
        assert torch.equal(mine, direct)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_the_backward(name):
    """Of a forward: inputs, tables, a norm's one number a row; without gradients nothing."""
    inputs = heads(2, 4) if name == "rope" else MAKE[name](3, 21)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours(name)(*inputs)
        with torch.inference_mode():
            ours(name)(inputs[0].clone(), *inputs[1:])
        assert not kept
        ours(name)(*[x.requires_grad_() for x in inputs[:2]], *inputs[2:])
    own = {x.data_ptr() for x in inputs}
    more = [x.shape for x in kept if x.data_ptr() not in own]
    assert more == ([(3,)] if name == "rms_norm" else [])


def test_one_input_alone_is_trained():
    x, weight = norm(4, 21)
    ours("rms_norm")(x, weight.requires_grad_()).sum().backward()
    truth = (x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()).sum(0)
    torch.testing.assert_close(weight.grad.double(), truth, rtol=1e-5, atol=1e-5)
    assert x.grad is None


def test_what_does_not_fit_is_the_kernels_business():
    x, weight = norm(4, 6)
    with pytest.raises(ValueError, match="expected 'llama' or 'hf'"):
        ops.rms_norm(x, weight, cast="meta")
    with pytest.raises(ValueError, match="weight has shape"):
        ops.rms_norm(x, weight[:5])
    with pytest.raises(ValueError, match="not equal"):
        ops.swiglu(x, x[:3])
    q, k, cos, sin = heads(2, 4)
    with pytest.raises(ValueError, match="tables hold"):
        ops.rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match="detach the tables"):
        ops.rope(q, k, cos.clone().requires_grad_(), sin)
    positions = torch.randint(9, (2, 4))
    for options in ({"positions": positions}, {"interleaved": True}):
        for mine, truth in zip(
            ops.rope(q, k, cos, sin, **options),
            kernels.rope(q, k, cos, sin, **options),
            strict=True,
        ):
            assert torch.equal(mine, truth)
    for other in (x.double(), x.T.contiguous().T):
        found = ops.rms_norm(other, weight.to(other.dtype))
        torch.testing.assert_close(found.float(), kernels.rms_norm(x, weight))
