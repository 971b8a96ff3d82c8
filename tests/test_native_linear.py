"""Run: python -m pytest tests/test_native_linear.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from puna.core import ops
from puna.core.native import feed_forward as native_feed_forward
from puna.core.native import linear as native_linear
from puna.core.native.loader import best_instructions, extension

pytestmark = [
    pytest.mark.skipif(extension() is None, reason="the native extension is not built"),
    pytest.mark.usefixtures("poisoned_empty"),
]
SETS = ("avx512_bf16", "avx512", "avx2", "base")


def laid_out(rows, columns, layout):
    """Random numbers (rows, columns) in a memory of NaN, which lie as `layout` says."""
    made = torch.randn(rows, columns)
    if layout == "dense":
        return made
    if layout == "transposed":
        return made.T.contiguous().T
    step = 3 if layout == "sparse" else 1
    room = torch.full((rows + 2, step * columns + 5), torch.nan)
    inside = room[1 : rows + 1, 2 : 2 + step * columns : step]
    inside.copy_(made)
    return inside


LAYOUTS = ("dense", "transposed", "inside", "sparse")


@settings(max_examples=60)
@given(
    rows=st.integers(0, 41),
    columns=st.integers(0, 120),
    inner=st.integers(0, 40) | st.integers(500, 530),
    a=st.sampled_from(LAYOUTS),
    b=st.sampled_from(LAYOUTS),
    add=st.booleans(),
    isa=st.sampled_from(SETS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_product_against_fp64(rows, columns, inner, a, b, add, isa, threads, seed):
    if isa not in extension().instruction_sets():
        isa = "base"
    torch.manual_seed(seed)
    a, b = laid_out(rows, inner, a), laid_out(inner, columns, b)
    room = torch.full((rows * columns + 32,), 7.0)
    out = room[16:-16].view(rows, columns)
    out.copy_(torch.randn(rows, columns) if add else torch.full((rows, columns), torch.nan))
    truth = a.double() @ b.double() + (out.double() if add else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_linear, "best_instructions", lambda: isa)
        patch.setattr(native_linear, "FAST", SETS)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        native_linear.matmul(a, b, out, add=add)
    near = 1e-5 * max(1, inner) ** 0.5  # sums of so many normal numbers
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=near)
    assert (room[:16] == 7).all() and (room[-16:] == 7).all()


@pytest.mark.parametrize("add", [False, True])
def test_where_the_blas_is_faster(add, monkeypatch):
    monkeypatch.setattr(native_linear, "FAST", ())
    a, b, out = torch.randn(20, 30), torch.randn(30, 50), torch.randn(20, 50)
    truth = a.double() @ b.double() + (out.double() if add else 0)
    torch.testing.assert_close(native_linear.matmul(a, b, out, add=add).double(), truth,
                               rtol=0, atol=1e-4)  # fmt: skip


@pytest.mark.skipif(best_instructions() == "base", reason="the BLAS does products here")
@pytest.mark.parametrize("transposed", [False, True])
def test_same_bits_with_any_threads_and_other_rows(transposed, monkeypatch):
    check_same_bits(1100, transposed, monkeypatch)


def check_same_bits(inner, transposed, monkeypatch):
    """A product's rows, on other threads and beside other rows."""
    torch.manual_seed(0)
    a, b = laid_out(300, inner, "transposed" if transposed else "dense"), torch.randn(inner, 113)
    whole = native_linear.matmul(a, b, torch.empty(300, 113))
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(native_linear.matmul(a, b, torch.empty(300, 113)), whole)
    for first, last in ((0, 1), (5, 18), (299, 300)):
        part = native_linear.matmul(a[first:last], b, torch.empty(last - first, 113))
        assert torch.equal(part, whole[first:last])


def test_error_against_pytorch():
    """Over many sums, so that luck does not decide."""
    torch.manual_seed(0)
    for inner in (192, 512, 1300):
        a, b = torch.randn(200, inner), torch.randn(300, inner).T
        exact = a.double() @ b.double()
        ours = native_linear.matmul(a, b, torch.empty(200, 300)).double() - exact
        theirs = (a @ b).double() - exact
        assert ours.square().mean() <= (1.5 * theirs).square().mean()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    a, b = torch.randn(20, 30), torch.randn(30, 50)
    a[13, 29] = bad
    found = native_linear.matmul(a, b, torch.empty(20, 50))
    assert not found[13].isfinite().any() and found[:13].isfinite().all()
    assert found[14:].isfinite().all()


def projections(rows, inputs, outputs):
    return torch.randn(2, rows // 2, inputs), torch.randn(outputs, inputs) / inputs**0.5


def layers(rows, width, inner):
    gate, up = (torch.randn(inner, width) / width**0.5 for _ in range(2))
    return torch.randn(2, rows // 2, width), gate, up, torch.randn(width, inner) / inner**0.5


def reference(name, inputs):
    if name == "linear":
        return linear(*inputs)
    x, gate, up, down = inputs
    return linear(silu(linear(x, gate)) * linear(x, up), down)


MAKE = {"linear": projections, "feed_forward": layers}
NAMES = tuple(MAKE)


def ours(name, inputs):
    """The native operation, which must be the one that runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", None)
        return getattr(ops, name)(*inputs)


def gradients(operation, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = operation(leaves)
    return [found.detach(), *torch.autograd.grad(found, leaves, upstream.to(found.dtype))]


def check(name, inputs, upstream=None):
    upstream = torch.randn(*inputs[0].shape[:-1], len(inputs[-1])) if upstream is None else upstream
    exact = gradients(lambda x: reference(name, x), [x.double() for x in inputs], upstream)
    found = gradients(lambda x: ours(name, x), inputs, upstream)
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # another way through
        assert torch.equal(ours(name, inputs), found[0])


@pytest.mark.skipif(best_instructions() == "base", reason="the BLAS does linear layers here")
class TestLayers:
    @pytest.mark.parametrize("rows", [64, 130, 1100])
    @pytest.mark.parametrize("name", NAMES)
    def test_against_pytorch_in_fp64(self, name, rows):
        torch.manual_seed(rows)
        check(name, MAKE[name](rows, 37, 51))

    @pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
    @pytest.mark.parametrize("name", NAMES)
    def test_upstream_gradients_lie_anywhere(self, name, layout):
        torch.manual_seed(0)
        inputs = MAKE[name](80, 24, 32)
        first, second, width = 2, 40, len(inputs[-1])
        upstream = {
            "expanded": torch.tensor(0.7).expand(first, second, width),
            "transposed": torch.randn(second, first, width).transpose(0, 1),
            "sliced": torch.randn(first, second, 2 * width)[..., ::2],
        }[layout]
        check(name, inputs, upstream)

    @pytest.mark.parametrize("name", NAMES)
    def test_under_checkpointing(self, name):
        torch.manual_seed(0)
        inputs = MAKE[name](80, 24, 32)
        upstream = torch.randn(2, 40, len(inputs[-1]))

        def again(given):
            return checkpoint(lambda *x: ours(name, x), *given, use_reentrant=False)

        for mine, direct in zip(
            gradients(again, inputs, upstream),
            gradients(lambda x: ours(name, x), inputs, upstream),
            strict=True,
        ):
            assert torch.equal(mine, direct)

    @pytest.mark.parametrize("name", NAMES)
    def test_there_is_a_first_derivative_only(self, name):
        leaves = [x.requires_grad_() for x in MAKE[name](80, 24, 32)]
        first = torch.autograd.grad(ours(name, leaves).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivative only"):
            first[0].sum().backward()

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_kept_for_the_backward(self, name):
        """The inputs; of a feed-forward layer what its gate is made of, too, and no third."""
        inputs = MAKE[name](80, 24, 32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            ours(name, inputs)
            assert not kept
            ours(name, [x.requires_grad_() for x in inputs])
        own = {x.data_ptr() for x in inputs}
        more = [x.shape for x in kept if x.data_ptr() not in own]
        assert more == ([] if name == "linear" else [(80, 32), (80, 32)])

    @pytest.mark.parametrize("trained", [0, 1])
    def test_one_input_alone_is_trained(self, trained):
        torch.manual_seed(0)
        inputs = projections(80, 24, 32)
        inputs[trained].requires_grad_()
        ours("linear", inputs).sum().backward()
        exact = [x.detach().double().requires_grad_() for x in inputs]
        reference("linear", exact).sum().backward()
        torch.testing.assert_close(
            inputs[trained].grad.double(), exact[trained].grad, rtol=1e-4, atol=1e-4
        )
        assert inputs[1 - trained].grad is None

    def test_autocast_is_pytorchs(self):
        x, weight = projections(80, 24, 32)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.linear(x, weight).dtype == torch.bfloat16

    def test_what_does_not_fit_is_pytorchs_business(self):
        x, weight = projections(80, 24, 32)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ops.linear(x, weight[:, :5])
        with pytest.raises(RuntimeError, match="same dtype"):
            ops.linear(x.double(), weight)
        for few in (x[0, 0], x[0, :0], x.double()):
            same = weight.to(few.dtype)
            assert torch.equal(ops.linear(few, same), linear(few, same))
        gate, up, down = layers(80, 24, 32)[1:]
        with pytest.raises(ValueError, match="not equal"):
            ops.feed_forward(x, gate, up[:9], down)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ops.feed_forward(x, gate, up, down[:, :9])

    @pytest.mark.parametrize("rows", [8, 130, 1100])
    def test_feed_forward_in_any_number_of_threads(self, rows, monkeypatch):
        torch.manual_seed(0)
        inputs = layers(rows, 37, 51)
        upstream = torch.randn(2, rows // 2, 37)
        found = []
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(gradients(lambda x: ours("feed_forward", x), inputs, upstream))
        for others in found[1:]:
            assert all(map(torch.equal, found[0], others))

    @pytest.mark.parametrize("isa", SETS)
    @pytest.mark.parametrize("width, inner", [(1, 1), (24, 0), (16, 48), (530, 9), (40, 1060)])
    def test_feed_forward_of_every_instruction_set(self, isa, width, inner, monkeypatch):
        if isa not in extension().instruction_sets():
            pytest.skip(f"this machine has no {isa}")
        torch.manual_seed(0)
        monkeypatch.setattr(native_feed_forward, "best_instructions", lambda: isa)
        check("feed_forward", layers(70, width, inner))

    @pytest.mark.parametrize("which", range(4))
    def test_feed_forward_of_matrices_with_gaps(self, which):
        torch.manual_seed(0)
        inputs = list(layers(80, 24, 32))
        inputs[which] = torch.randn(*inputs[which].shape[:-1], 99)[
            ..., 3 : 3 + inputs[which].shape[-1]
        ]
        check("feed_forward", inputs)
