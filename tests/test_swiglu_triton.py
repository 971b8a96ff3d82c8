"""SwiGLU's Triton kernels: interpreted on the CPU, or on a GPU.

Run: python -m pytest tests/test_swiglu_triton.py -q
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from puna.kernels import swiglu

source = importlib.import_module("puna.kernels.swiglu")
pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_device")


def by_pytorch(gate, up):
    return silu(gate) * up


def run(function, gate, up, upstream):
    """(y, dgate, dup)"""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = function(gate, up)
    return (y.detach(), *torch.autograd.grad(y, (gate, up), upstream.to(y.dtype)))


def drawn(*shape, device, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_error_against_pytorch(triton_device, no_worse_than_torch, dtype, scale):
    torch.manual_seed(0)
    inputs = [drawn(7, 131, device=triton_device, dtype=dtype, scale=s) for s in (scale, 1, 1)]
    exact = run(by_pytorch, *(t.double() for t in inputs))
    found, peer = run(swiglu, *inputs), run(by_pytorch, *inputs)
    assert [t.dtype for t in found] == [dtype] * 3
    no_worse_than_torch(found, peer, exact)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
@settings(max_examples=30)
@given(
    leading=st.lists(st.integers(0, 4), max_size=2),
    width=st.sampled_from([1, 2, 3, 16, 31, 100]),
    packed=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 50.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_shapes(triton_device, leading, width, packed, scale, seed):
    """Separate projections, or the halves of one. At 1000 exp overflows fp32; nothing else may."""
    torch.manual_seed(seed)
    both = drawn(*leading, 2 * width, device=triton_device, scale=scale)
    gate, up = both.chunk(2, -1)
    if not packed:
        gate, up = gate.contiguous(), up.contiguous()
    upstream = drawn(*leading, width, device=triton_device)
    exact = run(by_pytorch, *(t.double() for t in (gate, up, upstream)))
    for mine, truth in zip(run(swiglu, gate, up, upstream), exact, strict=True):
        assert mine.shape == truth.shape
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("width", [1024, 2048, 2049, 5000])
def test_rows_of_several_tiles(triton_device, width):
    torch.manual_seed(0)
    gate, up = drawn(3, 2 * width, device=triton_device).chunk(2, -1)
    upstream = drawn(3, width, device=triton_device)
    found, expected = (run(f, gate, up, upstream) for f in (swiglu, by_pytorch))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes(triton_device, no_worse_than_torch):
    gate = drawn(4, 33, device=triton_device, dtype=torch.bfloat16)
    up, upstream = (drawn(4, 33, device=triton_device) for _ in range(2))
    found = run(swiglu, gate, up, upstream)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    low = [t.bfloat16() for t in (gate, up, upstream)]
    exact = run(by_pytorch, *(t.double() for t in (gate, up, low[2])))
    no_worse_than_torch(found[:2], run(by_pytorch, *low)[:2], exact[:2])
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-5, atol=1e-5)


def test_a_packed_projection_is_read_where_it_is(triton_device, monkeypatch):
    packed = drawn(2, 5, 14, device=triton_device)
    gate, up = packed.chunk(2, -1)
    upstream = drawn(2, 5, 7, device=triton_device)
    expected = run(swiglu, gate.contiguous(), up.contiguous(), upstream)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("copied"))
        y = swiglu(gate, up)
        d_gate, d_up = source.swiglu_backward(gate, up, upstream)
    for mine, theirs in zip((y, d_gate, d_up), expected, strict=True):
        assert mine.is_contiguous() and torch.equal(mine, theirs)


def test_gradient_of_a_packed_projection(triton_device):
    packed = drawn(3, 10, device=triton_device).requires_grad_()
    upstream = drawn(3, 5, device=triton_device)
    found, expected = (
        torch.autograd.grad(f(*packed.chunk(2, -1)), packed, upstream)[0]
        for f in (swiglu, by_pytorch)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_strided_and_expanded_inputs_and_gradients(triton_device):
    torch.manual_seed(0)
    wide = drawn(6, 20, device=triton_device)
    views = {
        "every other column": (wide[:, :12:2], wide[:, 1:13:2]),
        "transposed": (wide[:, :6].T, wide[:, 6:12].T),
        "one row for all": (wide[:1, :6].expand(6, 6), wide[:, 6:12]),
        "one number for all": (wide[:, :6], wide[0, 0].expand(6, 6)),
        "three dimensions": tuple(
            drawn(4, 2, 3, 6, device=triton_device).transpose(0, 2)[:, i] for i in (0, 1)
        ),
    }
    for name, (gate, up) in views.items():
        full = torch.randn(gate.shape, device=triton_device)
        one = torch.tensor(0.7, device=triton_device)
        for upstream in (full, one.expand(full.shape), full[..., :1].expand(full.shape), full[:1]):
            upstream = upstream.expand(full.shape)
            found = run(swiglu, gate, up, upstream)
            expected = run(swiglu, *(t.contiguous() for t in (gate, up, upstream)))
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), name


def test_sum_backward(triton_device):
    gate, up = (drawn(3, 10, device=triton_device).requires_grad_() for _ in range(2))
    swiglu(gate, up).sum().backward()
    truth = torch.autograd.grad(by_pytorch(gate, up).sum(), (gate, up))
    torch.testing.assert_close((gate.grad, up.grad), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4), (3, 0)])
def test_nothing_is_launched_for_an_empty_batch(triton_device, shape):
    x = drawn(*shape, device=triton_device)
    for part in run(swiglu, x, x, x):
        assert part.shape == shape


def test_a_row_does_not_depend_on_the_batch(triton_device):
    gate, up, upstream = (drawn(5, 70, device=triton_device).bfloat16() for _ in range(3))
    together = run(swiglu, gate, up, upstream)
    for rows in (slice(0, 1), slice(3, 4), slice(2, 5)):
        alone = run(swiglu, gate[rows], up[rows], upstream[rows])
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


def test_nan_in_one_place_stays_there(triton_device):
    gate, up = (drawn(4, 9, device=triton_device) for _ in range(2))
    clean = run(swiglu, gate, up, torch.ones_like(up))
    gate[1, 4] = torch.nan
    keep = torch.ones_like(up, dtype=torch.bool)
    keep[1, 4] = False
    for a, b in zip(run(swiglu, gate, up, torch.ones_like(up)), clean, strict=True):
        assert torch.equal(a[keep], b[keep]) and a[1, 4].isnan()


def test_saved_activations_and_upstream_gradients_are_not_written(triton_device):
    """Backward runs twice over the same graph, and other users of its inputs see them whole."""
    tensors = [drawn(3, 8, device=triton_device) for _ in range(3)]
    kept = [t.clone() for t in tensors]
    gate, up, upstream = tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2]
    y = swiglu(gate, up)
    first = torch.autograd.grad(y, (gate, up), upstream, retain_graph=True)
    second = torch.autograd.grad(y, (gate, up), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    memory = {t.data_ptr() for t in (*tensors, y)}
    assert not memory & {t.data_ptr() for t in (*first, *second)}


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_input_alone(triton_device, which):
    tensors = [drawn(3, 5, device=triton_device) for _ in range(2)]
    both = run(swiglu, *tensors, torch.ones_like(tensors[0]))
    tensors[which].requires_grad_()
    swiglu(*tensors).sum().backward()
    assert torch.equal(tensors[which].grad, both[1 + which])


def test_offsets_past_2_to_the_31(triton_device, tmp_path):
    """Rows 2^30 elements apart, in a file with holes where there is no GPU."""
    stride, size = 2**30 + 16, 2**31 + 64
    if triton_device.type == "cpu":
        with open(tmp_path / "holes", "wb") as file:
            file.truncate(2 * size)
        memory = torch.from_file(
            str(tmp_path / "holes"), shared=True, size=size, dtype=torch.float16
        )
    else:
        memory = torch.zeros(size, dtype=torch.float16, device=triton_device)
    gate, up = (memory.as_strided((3, 8), (stride, 1), start) for start in (0, 8))
    gate.copy_(torch.randn(3, 8)), up.copy_(torch.randn(3, 8))
    found = run(swiglu, gate, up, gate)
    expected = run(swiglu, gate.contiguous(), up.contiguous(), gate.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_operators_are_registered_right(triton_device, packed):
    gate, up = drawn(2, 3, 12, device=triton_device).bfloat16().chunk(2, -1)
    if not packed:
        gate, up = gate.contiguous(), up.contiguous()
    gate.requires_grad_(), up.requires_grad_()
    torch.library.opcheck(source.swiglu_forward.operator, (gate, up))
    inputs = (gate.detach(), up.detach(), torch.ones_like(up))
    torch.library.opcheck(source.swiglu_backward.operator, inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(triton_device, dynamic):
    """The same tensor twice, and one operation on another's result, at sizes that change."""
    torch._dynamo.reset()

    def layer(gate, up):
        return swiglu(swiglu(up, up) * 2, gate)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        inputs = [drawn(rows, 2, 6, device=triton_device) for _ in range(3)]
        found, expected = (run(f, *inputs) for f in (compiled, layer))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Launches:
    """Stands for a kernel: keeps what it would be launched with."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda *args, **settings: self.seen.append((grid, args, settings))


def test_launchers_run_on_meta_tensors(monkeypatch):
    """How kernels are compiled ahead of time. Contiguous tensors are one row, whatever T is."""
    forward, backward = Launches(), Launches()
    monkeypatch.setattr(source, "swiglu_forward_kernel", forward)
    monkeypatch.setattr(source, "swiglu_backward_kernel", backward)
    gate = torch.empty(8192, 11008, dtype=torch.bfloat16, device="meta")
    source.swiglu_forward.__wrapped__(gate, gate)
    ((grid, args, _),) = forward.seen
    assert grid == (8192 * 11008 // 2048,) and args[3:5] == (1, 8192 * 11008)
    half = torch.empty(8192, 2 * 11008, dtype=torch.bfloat16, device="meta")[:, :11008]
    source.swiglu_backward.__wrapped__(half, half, gate)
    ((grid, args, _),) = backward.seen
    assert grid == (8192 * 6,) and args[5:10] == (8192, 11008, 2 * 11008, 2 * 11008, 11008)


def test_bad_input(triton_device):
    x = drawn(2, 3, device=triton_device)
    with pytest.raises(ValueError, match="not equal"):
        swiglu(x, x[0])
    with pytest.raises(ValueError, match="no dimensions"):
        swiglu(x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match="up .* on meta"):
        swiglu(x, x.to("meta"))
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        swiglu(x, x.double())
