"""Every operation under autocast, under torch.func's transforms, and on tensors without values.

Run: python -m pytest tests/test_surroundings.py -q
"""

import threading

import pytest
import torch
from test_second_derivatives import CASES, leaves_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from puna import kernels
from puna.core import ops
from puna.core.native.loader import extension

OURS = "does not go under torch.func's transforms"
PRODUCTS = {
    "linear",
    "linears",
    "feed_forward",
    "attention",
    "decode_attention",
}  # in low precision
LOSSES = {"linear_cross_entropy", "linear_logprobs"}  # of low precision, in fp32
PLAIN = {"linear", "linears", "feed_forward", "swiglu", "rope", "rms_norm", "add_rms_norm"}
TRANSFORMED = PLAIN | {"attention"}  # packed attention apart
WITHOUT = {  # what no gradient flows through -> (its tensors, the call)
    "gae": (
        ((3, 5), (3, 5)),
        lambda on, r, v: on.gae(r, v, torch.tensor([2, 5, 0], device=r.device)),
    ),
    "sample": (
        ((3, 7),),
        lambda on, x: on.sample(x, seeds=torch.tensor([3, 5, 9], device=x.device), top_k=3),
    ),
}  # fmt: skip
ALL = {**CASES, **WITHOUT}


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and extension() is None:
        pytest.skip("the native engine is not built")
    with ops.use_backend(request.param):
        yield request.param


def kind(name: str) -> str:
    return name.partition(",")[0]


def several(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


def weighted(found) -> torch.Tensor:
    return sum(
        (x * torch.linspace(1, 2, x.numel(), device=x.device).view(x.shape)).sum()
        for x in several(found)
        if x.is_floating_point()
    )


def test_every_operation_is_asked():
    public = {name for name in vars(kernels) if callable(getattr(kernels, name))}
    assert public - {"use_backend", "rope_tables"} <= {kind(name) for name in ALL}


# -- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_autocast_is_pytorchs_rule(name, backend):
    """Products take bf16 operands, losses of them are fp32, all else stays as it is: values and
    gradients are those of operands that were rounded beforehand, to the bit."""
    shapes, call = ALL[name]
    leaves = leaves_of("cpu", *shapes)
    with torch.autocast("cpu", torch.bfloat16):
        found = several(call(ops, *leaves))
    if kind(name) in PRODUCTS:
        assert all(x.dtype == torch.bfloat16 for x in found)
    elif name in CASES:
        assert all(x.dtype == torch.float32 for x in found)
    low = kind(name) in PRODUCTS | LOSSES
    by_hand = [x.detach().requires_grad_() for x in leaves]
    with ops.use_backend("reference"):
        given = [x.bfloat16() for x in by_hand] if low else by_hand
        expected = several(call(ops, *given))
    for mine, truth in zip(found, expected, strict=True):
        if backend == "reference" or low:
            assert torch.equal(mine, truth)
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)
    if name in WITHOUT:
        return
    truths = torch.autograd.grad(weighted(expected), by_hand)
    with torch.autocast("cpu", torch.bfloat16):  # nobody should, and many do
        inside = torch.autograd.grad(weighted(call(ops, *leaves)), leaves)
    outside = torch.autograd.grad(weighted(found), leaves)
    for mine, other, truth in zip(outside, inside, truths, strict=True):
        assert mine.dtype == other.dtype == torch.float32
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, truth, rtol=1e-5, atol=1e-5)


def test_autocast_takes_operands_of_two_dtypes(backend):
    """A parameter in fp32 beside activations that a layer before made bf16: refused without."""
    shapes, call = CASES["linear_logprobs"]
    hidden, weight = leaves_of("cpu", *shapes)
    hidden = hidden.detach().bfloat16()
    with pytest.raises(ValueError, match="not the same dtype"):
        call(ops, hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(ops, hidden, weight).dtype == torch.float32
        wide = hidden.double()
        with pytest.raises(ValueError, match="not the same dtype"):  # fp64 is left alone
            call(ops, wide, weight)


# -- torch.func ---------------------------------------------------------------------------------


def works(name: str) -> bool:
    return name in TRANSFORMED or name in WITHOUT


def transformed(name, transform):
    """(what the transform gives, what plain autograd gives); or the refusal is checked."""
    shapes, call = ALL[name]
    leaves = [x.detach() for x in leaves_of("cpu", *shapes)]

    def scalar(*given):
        return weighted(call(ops, *given))

    if not works(name):
        with pytest.raises(RuntimeError, match=OURS):
            transform(scalar, leaves)
        return None
    with ops.use_backend("reference"):
        asked = [x.clone().requires_grad_() for x in leaves]
        gradients = torch.autograd.grad(scalar(*asked), asked) if name in CASES else None
    return transform(scalar, leaves), gradients, leaves


@pytest.mark.parametrize("name", CASES)
def test_grad(name, backend):
    found = transformed(name, lambda f, x: torch.func.grad(f, argnums=tuple(range(len(x))))(*x))
    if found is not None:
        for mine, truth in zip(found[0], found[1], strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)


def forward_mode(f, x):
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(each, each.cos()) for each in x]
        return forward_ad.unpack_dual(f(*dual)).tangent


@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name, way, backend):
    """A tangent must not be dropped in silence."""
    ways = {
        "jvp": lambda f, x: torch.func.jvp(f, tuple(x), tuple(each.cos() for each in x))[1],
        "dual numbers": forward_mode,
    }
    found = transformed(name, ways[way])
    if found is not None:
        tangent, gradients, leaves = found
        truth = sum((g * x.cos()).sum() for g, x in zip(gradients, leaves, strict=True))
        torch.testing.assert_close(tangent, truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_vmap(name, backend):
    shapes, call = ALL[name]
    many = [
        torch.stack([x.detach(), -x.detach().flip(0), x.detach().cos()])
        for x in leaves_of("cpu", *shapes)
    ]

    def one(*given):
        return several(call(ops, *given))

    if not works(name):
        with pytest.raises(RuntimeError, match=OURS):
            torch.func.vmap(one)(*many)
        return
    found = torch.func.vmap(one)(*many)
    with ops.use_backend("reference"):
        each = [one(*(x[i] for x in many)) for i in range(3)]
    for mine, *truths in zip(found, *each, strict=True):
        torch.testing.assert_close(mine, torch.stack(truths), rtol=1e-4, atol=1e-5)


def test_vmap_over_an_index_is_refused_too(backend):
    """The leaves are plain; what is mapped over is what has to be read."""
    hidden, weight = (x.detach() for x in leaves_of("cpu", (6, 8), (5, 8)))
    many = torch.arange(12).view(2, 6) % 5
    for name in ("linear_cross_entropy", "linear_logprobs"):
        with pytest.raises(RuntimeError, match=OURS):
            torch.func.vmap(lambda labels, n=name: getattr(ops, n)(hidden, weight, labels))(many)


def test_functional_call_is_no_transform(backend):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x):
            return ops.rms_norm(x, self.weight)

    x = torch.randn(3, 8)
    other = torch.full((8,), 2.0, requires_grad=True)
    found = torch.func.functional_call(Norm(), {"weight": other}, (x,))
    torch.testing.assert_close(found, 2 * ops.rms_norm(x, torch.ones(8)))
    assert torch.autograd.grad(found.sum(), other)[0].isfinite().all()


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_a_tangent_of_one_operand_is_seen(name, which):
    """Whichever it is: taken along, or refused."""
    if not hasattr(kernels, kind(name)):
        pytest.skip("it is not in kernels")
    shapes, call = CASES[name]
    for place in range(len(shapes)):
        leaves = [x.detach() for x in leaves_of("cpu", *shapes)]
        with kernels.use_backend(which), forward_ad.dual_level():
            leaves[place] = forward_ad.make_dual(leaves[place], leaves[place].cos())
            try:
                found = several(call(kernels, *leaves))
            except (RuntimeError, ValueError) as error:
                assert OURS in str(error) or "a transform of torch" in str(error)
                continue
            assert any(forward_ad.unpack_dual(x).tangent is not None for x in found)


@pytest.mark.parametrize("name", sorted(works for works in CASES if kind(works) in TRANSFORMED))
def test_what_goes_under_transforms_has_a_second_derivative_there(name):
    """Plain PyTorch runs: forward over reverse, in fp64, is the difference of first gradients."""
    if not works(name) or not hasattr(kernels, kind(name)):
        pytest.skip("it does not go under transforms, or is PyTorch's own")
    shapes, call = CASES[name]
    leaves = [x.detach().double() for x in leaves_of("cpu", *shapes)]
    ways = [x.cos() for x in leaves]

    def scalar(*given):
        return sum(x.pow(3).sum() for x in several(call(kernels, *given)))

    def first(*given):
        return torch.func.grad(scalar, argnums=tuple(range(len(given))))(*given)

    found = torch.func.jvp(first, tuple(leaves), tuple(ways))[1]
    step = 1e-5
    ahead, behind = (
        first(*(x + sign * step * way for x, way in zip(leaves, ways, strict=True)))
        for sign in (1, -1)
    )
    for mine, a, b in zip(found, ahead, behind, strict=True):
        truth = (a - b) / (2 * step)
        assert (mine - truth).abs().max() <= 1e-6 * truth.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", CASES)
def test_a_dual_level_of_another_thread_is_none_of_ours(name):
    """The level is the process's; tensors tell whose derivative it is."""
    if not hasattr(kernels, kind(name)):
        pytest.skip("it is not in kernels")
    shapes, call = CASES[name]
    ready, done = threading.Event(), threading.Event()

    def other():
        with forward_ad.dual_level():
            ready.set()
            done.wait()

    def run():
        leaves = leaves_of("cpu", *shapes)
        found = several(call(kernels, *leaves))
        return *found, *torch.autograd.grad(weighted(found), leaves)

    with kernels.use_backend("reference"):
        expected = run()
        thread = threading.Thread(target=other)
        thread.start()
        ready.wait()
        try:
            found = run()
        finally:
            done.set()
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_triton_that_is_forced_says_so():
    x = torch.randn(3, 8)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="a transform of torch"):
        torch.func.vmap(lambda row: kernels.swiglu(row, row))(x)


# -- without values -----------------------------------------------------------------------------


def outline(x):
    return tuple(x.shape), x.dtype, x.stride()


@pytest.mark.parametrize("way", ["meta", "fake", "fake, from outside"])
@pytest.mark.parametrize("name", ALL)
def test_shapes_dtypes_and_strides_without_values(name, way, backend):
    """As of real tensors, of the results and, but for strides, of the gradients."""
    shapes, call = ALL[name]
    leaves = leaves_of("cpu", *shapes)
    real = several(call(ops, *leaves))
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def asked():
        if way == "meta":
            given = [x.detach().to("meta").requires_grad_() for x in leaves]
        else:
            given = [mode.from_tensor(x.detach()).requires_grad_() for x in leaves]
        found = several(call(ops, *given))
        if name in WITHOUT:
            return found, []
        return found, torch.autograd.grad(weighted(found), given)

    if way == "fake":
        with mode:
            found, gradients = asked()
    else:
        found, gradients = asked()
    assert [outline(x) for x in found] == [outline(x) for x in real]
    if name not in WITHOUT:
        truths = torch.autograd.grad(weighted(real), leaves)
        # Not their strides: PyTorch lays gradients out as it likes, and on meta otherwise.
        assert [outline(x)[:2] for x in gradients] == [outline(x)[:2] for x in truths]


@pytest.mark.parametrize("name", ALL)
def test_results_in_triton_without_values(name, triton_device):
    """No kernel runs, and nothing asks for a value."""
    if not hasattr(kernels, kind(name)):
        pytest.skip("it is not in kernels")
    shapes, call = ALL[name]
    leaves = leaves_of("cpu", *shapes)
    learns = name not in WITHOUT and name != "decode_attention"
    with kernels.use_backend("reference"):
        real = several(call(kernels, *leaves))
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.empty(x.shape, device=triton_device) for x in leaves]
        given = [x.requires_grad_(learns) for x in given]
        found = several(call(kernels, *given))
        assert [outline(x) for x in found] == [outline(x) for x in real]
        if learns:
            gradients = torch.autograd.grad(weighted(found), given)
            assert [x.shape for x in gradients] == [x.shape for x in given]


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "columns apart": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads", [(3, 3), (3, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_of_attention_are_laid_out_alike(layout, which, heads, queries):
    """Whatever layout the operands have."""
    made = torch.randn(2, queries, heads[0], 8), *torch.randn(2, 2, 5, heads[1], 8)
    q, k, v = (LAYOUTS[layout](x) if i in which else x for i, x in enumerate(made))
    with kernels.use_backend("reference"):
        for lengths in (torch.tensor([5, 4]), torch.tensor([5, 5])):
            assert kernels.decode_attention(q, k, v, lengths).is_contiguous()
        assert kernels.attention(q, k[:, :queries], v[:, :queries]).is_contiguous()
