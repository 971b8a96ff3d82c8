"""Every operation's second derivative: right, or refused in our words; never dropped in silence.

Run: python -m pytest tests/test_second_derivatives.py -q
"""

import os

import pytest
import torch
from torch.nn import functional as F

from puna import kernels
from puna.core import ops
from puna.core.native.loader import extension

OURS = "a first derivative only: where you need a second one, write it in plain PyTorch"
WITHOUT = {"gae", "sample", "rope_tables", "use_backend"}  # no gradient, or no operation
PLAIN = {"linear", "linears"}  # PyTorch's own wherever native code does not take them
TWICE = {
    "reference": PLAIN | {"feed_forward", "rope", "swiglu"},
    "triton": PLAIN,
    "native": set(),
}


def leaves_of(device, *shapes):
    torch.manual_seed(0)
    return [torch.randn(*shape, device=device).requires_grad_() for shape in shapes]


TABLES = kernels.rope_tables(9, 16)
CUTS = torch.tensor([0, 4, 9, 18])


def labels(device):
    return (torch.arange(18, device=device) * 5 % 23).view(2, 9)


# Operation -> (its leaves' shapes, the call). Enough rows for native code to take it.
HEADS = (2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16)
HEAD = (2, 9, 24), (23, 24)
CASES = {
    "linear": (HEAD, lambda on, x, w: on.linear(x, w)),
    "linears": ((*HEAD, (5, 24)), lambda on, *x: on.linears(*x)),
    "feed_forward": (
        ((2, 9, 24), (32, 24), (32, 24), (24, 32)),
        lambda on, *x: on.feed_forward(*x),
    ),
    "swiglu": (((2, 9, 32),) * 2, lambda on, gate, up: on.swiglu(gate, up)),
    "rope": (HEADS[:2], lambda on, q, k: on.rope(q, k, *(t.to(q) for t in TABLES))),
    "rms_norm": (((2, 9, 24), (24,)), lambda on, x, w: on.rms_norm(x, w)),
    "add_rms_norm": (
        ((2, 9, 24), (2, 9, 24), (24,)),
        lambda on, x, r, w: on.add_rms_norm(x, r, w)[0],
    ),
    "attention": (HEADS, lambda on, q, k, v: on.attention(q, k, v)),
    "attention, packed": (
        HEADS,
        lambda on, q, k, v: on.attention(q, k, v, cu_seqlens=CUTS.to(q.device)),
    ),
    "decode_attention": (
        ((2, 1, 4, 16), *HEADS[1:]),
        lambda on, *x: on.decode_attention(*x, torch.tensor([3, 9], device=x[0].device)),
    ),
    **{
        f"linear_cross_entropy, {reduction}": (
            HEAD,
            lambda on, h, w, r=reduction: on.linear_cross_entropy(
                h, w, labels(h.device), reduction=r
            ),
        )
        for reduction in ("mean", "sum", "none")
    },
    "linear_logprobs": (HEAD, lambda on, h, w: on.linear_logprobs(h, w, labels(h.device))[0]),
    "linear_logprobs, entropy": (
        HEAD,
        lambda on, h, w: on.linear_logprobs(h, w, labels(h.device))[1],
    ),
}


class Exact:
    """The operations that may be differentiated twice, by their formulas."""

    @staticmethod
    def linear(x, w):
        return x @ w.T

    @staticmethod
    def linears(x, *weights):
        return tuple(x @ w.T for w in weights)

    @staticmethod
    def swiglu(gate, up):
        return gate / (1 + (-gate).exp()) * up

    @staticmethod
    def feed_forward(x, gate, up, down):
        return Exact.swiglu(x @ gate.T, x @ up.T) @ down.T

    @staticmethod
    def rope(q, k, cos, sin):
        turn = torch.complex(cos, sin)[:, None]
        out = []
        for x in (q, k):
            pairs = torch.complex(*x.chunk(2, -1)) * turn
            out.append(torch.cat((pairs.real, pairs.imag), -1))
        return tuple(out)


def first_gradients(way, on, call, leaves):
    """The leaves' gradients, to be differentiated again."""
    found = call(on, *leaves)
    found = found if isinstance(found, tuple) else (found,)
    upstream = [torch.ones_like(x) for x in found]
    if way == "weighted":
        upstream = [torch.arange(1.0, x.numel() + 1).to(x).view(x.shape).cos() for x in found]
    if way == "of the leaves":  # the upstream gradient has a derivative too
        upstream = [leaves[0].square().mean() * x.detach().cos() for x in found]
    return torch.autograd.grad(found, leaves, upstream, create_graph=True)


def second_gradients(first, leaves):
    """The leaves' gradients of a function of their first gradients."""
    # Plus the leaves: gradients that are constants, rightly or not, then count as such.
    penalty = sum(x.square().sum() for x in first) + sum(x.sum() for x in leaves)
    return torch.autograd.grad(penalty, leaves)


def refused(way, on, call, leaves):
    """The first gradients are given; of theirs, asked for by leaf or by backward(), none."""
    first = first_gradients(way, on, call, leaves)
    with pytest.raises(RuntimeError, match=OURS):
        second_gradients(first, leaves)
    with pytest.raises(RuntimeError, match=OURS):
        sum(x.sum() for x in first_gradients(way, on, call, leaves)).backward()


@pytest.mark.parametrize("way", ["penalty", "weighted", "of the leaves"])
@pytest.mark.parametrize("backend", TWICE)
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name, backend, way):
    device = "cpu"
    if backend == "native" and extension() is None:
        pytest.skip("the extension is not built")
    if backend == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET=1 is not set")
    shapes, call = CASES[name]
    leaves = leaves_of(device, *shapes)
    with ops.use_backend(backend):
        if name == "decode_attention" and backend == "triton":
            with pytest.raises(ValueError, match="forced, but"):  # not even the first one
                call(ops, *leaves)
        elif name in TWICE[backend]:
            found = second_gradients(first_gradients(way, ops, call, leaves), leaves)
            exact = [x.detach().double().requires_grad_() for x in leaves]
            truths = second_gradients(first_gradients(way, Exact, call, exact), exact)
            for mine, truth in zip(found, truths, strict=True):
                assert (mine - truth).abs().max() <= 1e-4 * truth.abs().max()
        else:
            refused(way, ops, call, leaves)


def test_every_operation_is_asked():
    public = {name for name in vars(kernels) if callable(getattr(kernels, name))} - WITHOUT
    assert {name.partition(",")[0] for name in CASES} == public | PLAIN | {"feed_forward"}


def test_kernels_alone_refuse_too():
    """What a project gets that copies the folder: `core.ops` is not in between."""
    for name, (shapes, call) in CASES.items():
        if name in TWICE["reference"] or not hasattr(kernels, name.partition(",")[0]):
            continue
        with kernels.use_backend("reference"):
            refused("penalty", kernels, call, leaves_of("cpu", *shapes))


def test_wide_and_low_precision_are_refused_too():
    """fp64 and bf16 take the reference on the CPU, where PyTorch chooses other kernels."""
    for dtype in (torch.float64, torch.bfloat16):
        for name in ("attention", "attention, packed", "linear_logprobs", "rms_norm"):
            shapes, call = CASES[name]
            leaves = [x.detach().to(dtype).requires_grad_() for x in leaves_of("cpu", *shapes)]
            refused("penalty", ops, call, leaves)


def test_first_derivatives_are_as_without_the_refusal():
    """Attention's inputs pass through one more step on the reference: not a bit changes."""
    q, k, v = leaves_of("cpu", *HEADS)
    with ops.use_backend("reference"):
        found = torch.autograd.grad(ops.attention(q, k, v).square().sum(), (q, k, v))
    heads = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in heads), is_causal=True, enable_gqa=True
    )
    expected = torch.autograd.grad(out.transpose(1, 2).square().sum(), heads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
