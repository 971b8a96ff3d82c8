"""The norms' Triton kernels: interpreted on the CPU, or on a GPU.

Run: python -m pytest tests/test_rms_norm_triton.py -q
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import add_rms_norm, rms_norm, use_backend

source = importlib.import_module("puna.kernels.rms_norm")
pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_device")
EPS = 1e-3  # large enough to be seen
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def by_pytorch(x, weight, cast):
    """Llama's own norm: what PyTorch's operations make of it in these dtypes, or in fp64."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight
    return y.to(x.dtype) if cast == "llama" else y


def run(function, inputs, upstreams):
    """(outputs, gradients of every input)."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    pairs = [(y, d.to(y.dtype)) for y, d in zip(out, upstreams, strict=True) if d is not None]
    wanted = [x for x in inputs if x is not None]
    used, given = zip(*pairs, strict=True)
    grads = torch.autograd.grad(used, wanted, given)
    return (*(y.detach() for y in out), *grads)


def ours(x, weight, cast="llama"):
    return rms_norm(x, weight, eps=EPS, cast=cast)


def drawn(*shape, dtype=F32, device="cpu"):
    return torch.randn(shape).to(dtype).to(device)


@pytest.mark.parametrize("cast", ["llama", "hf"])
@pytest.mark.parametrize(
    ("dtype", "other"), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 30.0])
def test_error_against_pytorch(triton_device, no_worse_than_torch, dtype, other, cast, scale):
    torch.manual_seed(0)
    x = drawn(7, 131, device=triton_device).mul(scale).to(dtype)
    weight = drawn(131, dtype=other, device=triton_device)
    upstream = drawn(7, 131, dtype=dtype, device=triton_device)
    found = run(lambda *a: ours(*a, cast), (x, weight), (upstream,))
    peer = run(lambda *a: by_pytorch(*a, cast), (x, weight), (upstream,))
    assert [t.dtype for t in found] == [t.dtype for t in peer]
    wide = [t.double() for t in (x, weight, upstream)]
    exact = run(lambda *a: by_pytorch(*a, cast), wide[:2], wide[2:])
    no_worse_than_torch(found, peer, exact)


@pytest.mark.parametrize("cast", ["llama", "hf"])
@pytest.mark.parametrize(
    "dtypes",
    [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, BF16), (BF16, F32, F32),
     (F32, BF16, BF16), (BF16, BF16, F32)],
    ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes),
)  # fmt: skip
def test_add_variant_against_pytorch(triton_device, no_worse_than_torch, dtypes, cast):
    """x, residual and weight each in a dtype of their own; both outputs have gradients."""
    torch.manual_seed(1)
    inputs = [
        drawn(*shape, dtype=d, device=triton_device)
        for shape, d in zip(((3, 2, 37), (3, 2, 37), (37,)), dtypes, strict=True)
    ]
    upstreams = [drawn(3, 2, 37, dtype=BF16, device=triton_device) for _ in range(2)]

    def peer(x, residual, weight):
        summed = residual + x
        return by_pytorch(summed, weight, cast), summed

    found = run(lambda *a: add_rms_norm(*a, eps=EPS, cast=cast), inputs, upstreams)
    theirs = run(peer, inputs, upstreams)
    assert [t.dtype for t in found] == [t.dtype for t in theirs]
    assert torch.equal(found[1], theirs[1])
    exact = run(peer, [t.double() for t in inputs], [t.double() for t in upstreams])
    no_worse_than_torch(found, theirs, exact)


@settings(max_examples=25)
@given(
    leading=st.lists(st.integers(0, 4), max_size=2),
    width=st.sampled_from([1, 2, 3, 7, 16, 33, 64, 100]),
    added=st.booleans(),
    seed=st.integers(0, 99),
)
def test_shapes(triton_device, leading, width, added, seed):
    torch.manual_seed(seed)
    x, residual, d_y, d_sum = (drawn(*leading, width, device=triton_device) for _ in range(4))
    weight = drawn(width, device=triton_device)

    def peer(x, residual, weight):
        summed = residual + x
        return by_pytorch(summed, weight, "hf"), summed

    if added:
        function, inputs, upstreams = add_rms_norm, (x, residual, weight), (d_y, d_sum)
    else:
        function, inputs, upstreams = rms_norm, (x, weight), (d_y,)
        peer = lambda x, weight: by_pytorch(x, weight, "hf")  # noqa: E731
    found = run(lambda *a: function(*a, eps=EPS), inputs, upstreams)
    exact = run(peer, [t.double() for t in inputs], [t.double() for t in upstreams])
    for mine, truth in zip(found, exact, strict=True):
        assert mine.shape == truth.shape
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4), (3, 0)])
def test_nothing_is_launched_for_an_empty_batch(triton_device, shape):
    x, weight = drawn(*shape, device=triton_device), drawn(shape[-1], device=triton_device)
    y, d_x, d_weight = run(ours, (x, weight), (x,))
    assert y.shape == d_x.shape == shape
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_statistics_do_not_overflow_in_fp16(triton_device):
    """300^2 exceeds fp16's largest number."""
    one = torch.ones(4, dtype=torch.float16, device=triton_device)
    y = rms_norm(torch.full((2, 4), 300.0).half().to(triton_device), one)
    assert torch.equal(y, torch.ones_like(y))


def test_a_row_of_zeros_has_finite_gradients(triton_device):
    x = torch.zeros(2, 6, device=triton_device)
    for part in run(rms_norm, (x, torch.ones_like(x[0])), (torch.ones_like(x),)):
        assert part.isfinite().all()


def test_weight_gradient_is_summed_in_fp32_over_many_rows(triton_device, monkeypatch):
    """4000 ones: a sum in bf16 stands still at 256. Three programs, so that each sums tiles too."""
    monkeypatch.setattr(source, "processors", lambda x: 1)
    torch.manual_seed(0)
    x = (drawn(4000, 16) * 1e-2 + 1).bfloat16().to(triton_device)
    upstream = torch.ones_like(x)
    exact = run(
        lambda *a: by_pytorch(*a, "hf"),
        (x.double(), torch.ones(16, device=triton_device).double()),
        (upstream.double(),),
    )[2]
    for dtype in (F32, BF16):
        weight = torch.ones(16, device=triton_device, dtype=dtype)
        found = run(ours, (x, weight), (upstream,))[2]
        error = (found.double() - exact).abs() / exact.abs()
        assert found.dtype == dtype and error.max() <= max(torch.finfo(dtype).eps, 1e-5)


def test_gradients_are_the_same_bits_every_time(triton_device):
    torch.manual_seed(0)
    x, weight, upstream = (drawn(*s, device=triton_device) for s in ((600, 96), (96,), (600, 96)))
    first, *others = (run(ours, (x, weight), (upstream,)) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("width", [40, 512, 3000])
def test_a_row_does_not_depend_on_the_batch(triton_device, width):
    torch.manual_seed(0)
    x, residual, upstream = (drawn(9, width, device=triton_device).bfloat16() for _ in range(3))
    weight = drawn(width, device=triton_device)

    def step(rows):
        inputs = x[rows], residual[rows], weight
        out = run(lambda *a: add_rms_norm(*a, eps=EPS), inputs, (upstream[rows],) * 2)
        return out[0], out[1], out[2]

    together = step(slice(None))
    for rows in (slice(0, 1), slice(4, 5), slice(3, 9)):
        alone = step(rows)
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


def test_what_one_row_holds_stays_there(triton_device):
    x, weight = drawn(5, 24, device=triton_device), drawn(24, device=triton_device)
    clean = run(ours, (x, weight), (x,))
    x[2] = torch.nan
    upstream = x.nan_to_num(1.0)
    y, d_x, _ = run(ours, (x, weight), (upstream,))
    others = torch.tensor([0, 1, 3, 4], device=triton_device)
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(d_x[others], clean[1][others])
    assert y[2].isnan().all()


def test_strided_and_expanded_inputs_and_gradients(triton_device):
    torch.manual_seed(0)
    wide = drawn(6, 20, device=triton_device)
    weight = drawn(18, device=triton_device)[::3]
    views = {
        "columns of a wider row": wide[:, 3:9],
        "every other column": wide[:, 4:16:2],
        "transposed": drawn(6, 5, device=triton_device).T,
        "one row for all": wide[0, :6].expand(4, 6),
        "three dimensions": drawn(4, 2, 3, 6, device=triton_device).transpose(0, 2)[:, :, 1:],
    }
    for name, x in views.items():
        full = torch.randn(x.shape, device=triton_device)
        for upstream in (
            full,
            torch.tensor(0.7, device=triton_device).expand(x.shape),
            full[..., :1].expand(x.shape),
            full[:1].expand(x.shape),
        ):
            found = run(ours, (x, weight), (upstream,))
            contiguous = [t.contiguous() for t in (x, weight, upstream)]
            expected = run(ours, contiguous[:2], contiguous[2:])
            # A stride of 0 lets Triton lay a row out otherwise, and its sum has another order.
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def test_sum_backward(triton_device):
    x = drawn(3, 10, device=triton_device).requires_grad_()
    weight = drawn(10, device=triton_device).requires_grad_()
    rms_norm(x, weight, eps=EPS).sum().backward()
    truth = torch.autograd.grad(by_pytorch(x, weight, "hf").sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), truth)


def test_backward_twice_and_inputs_untouched(triton_device):
    tensors = [drawn(*shape, device=triton_device) for shape in ((3, 5), (3, 5), (5,), (3, 5))]
    kept = [t.clone() for t in tensors]
    inputs, upstream = [t.requires_grad_() for t in tensors[:3]], tensors[3]
    out = add_rms_norm(*inputs, eps=EPS)
    first = torch.autograd.grad(out, inputs, (upstream, upstream), retain_graph=True)
    second = torch.autograd.grad(out, inputs, (upstream, upstream))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(triton_device, used):
    inputs = [drawn(*s, device=triton_device).requires_grad_() for s in ((3, 8), (3, 8), (8,))]
    found = torch.autograd.grad(
        add_rms_norm(*inputs, eps=EPS)[used].sin().sum(), inputs, materialize_grads=True
    )
    summed = inputs[1] + inputs[0]
    truth = (by_pytorch(summed, inputs[2], "hf"), summed)[used].sin().sum()
    for mine, theirs in zip(
        found, torch.autograd.grad(truth, inputs, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_input_alone(triton_device, which):
    tensors = [drawn(3, 5, device=triton_device), drawn(5, device=triton_device)]
    both = run(ours, tensors, (torch.ones_like(tensors[0]),))
    tensors[which].requires_grad_()
    ours(*tensors).sum().backward()
    assert torch.equal(tensors[which].grad, both[1 + which])


def test_without_gradients_the_values_are_the_same(triton_device):
    x, weight = drawn(3, 12, device=triton_device), drawn(12, device=triton_device)
    with_graph = ours(x.requires_grad_(), weight).detach()
    with torch.no_grad():
        assert torch.equal(ours(x, weight), with_graph)
        y, summed = add_rms_norm(x, x, weight, eps=EPS)
        assert torch.equal(summed, x + x) and torch.equal(y, ours(summed, weight))


def test_offsets_past_2_to_the_31(triton_device, tmp_path):
    """Rows 2^30 elements apart, in a file with holes where there is no GPU."""
    stride, size = 2**30 + 16, 2**31 + 64
    if triton_device.type == "cpu":
        with open(tmp_path / "holes", "wb") as file:
            file.truncate(2 * size)
        memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=F16)
    else:
        memory = torch.zeros(size, dtype=F16, device=triton_device)
    x = memory.as_strided((3, 8), (stride, 1))
    x.copy_(drawn(3, 8))
    weight = drawn(8, dtype=F16, device=triton_device)
    found = run(ours, (x, weight), (x,))
    expected = run(ours, (x.contiguous(), weight), (x.contiguous(),))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("residual", [None, F32, BF16])
@pytest.mark.parametrize("to_input", [True, False])
def test_operators_are_registered_right(triton_device, residual, to_input):
    x, weight = drawn(2, 3, 6, device=triton_device).bfloat16(), drawn(6, device=triton_device)
    other = None if residual is None else drawn(2, 3, 6, dtype=residual, device=triton_device)
    forward, backward = source.rms_norm_forward, source.rms_norm_backward
    torch.library.opcheck(forward.operator, (x, other, weight, EPS, to_input))
    y, summed, scale = forward(x, other, weight, EPS, to_input)
    d_sum = None if other is None else torch.ones_like(summed)
    saved = x if other is None else summed
    torch.library.opcheck(backward.operator, (saved, weight, scale, y, d_sum))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(triton_device, dynamic):
    torch._dynamo.reset()

    def layer(x, residual, weight):
        y, summed = add_rms_norm(x, residual, weight, eps=EPS)
        return rms_norm(y * 2, weight, eps=EPS, cast="hf"), summed

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        inputs = [drawn(*s, device=triton_device) for s in ((rows, 2, 12), (rows, 2, 12), (12,))]
        upstreams = [drawn(rows, 2, 12, device=triton_device) for _ in range(2)]
        found, expected = (run(f, inputs, upstreams) for f in (compiled, layer))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Launches:
    """Stands for a kernel: keeps what it would be launched with."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda *args, **settings: self.seen.append((grid, args, settings))


def test_launchers_run_on_meta_tensors(monkeypatch):
    """How kernels are compiled ahead of time: nothing asks for a value."""
    forward, backward = Launches(), Launches()
    monkeypatch.setattr(source, "rms_norm_forward_kernel", forward)
    monkeypatch.setattr(source, "rms_norm_backward_kernel", backward)
    x, weight = (torch.empty(s, dtype=BF16, device="meta") for s in ((2, 4096, 4096), (4096,)))
    y, summed, scale = source.rms_norm_forward.__wrapped__(x, x, weight, EPS, True)
    source.rms_norm_backward.__wrapped__(summed, weight, scale, y, summed)
    ((grid, _, settings),) = forward.seen
    assert grid == (8192,) and settings["BLOCK"] == 4096 and settings["num_warps"] == 8
    ((grid, args, _),) = backward.seen
    assert grid[0] * args[9] >= 8192 and grid[0] <= 3 * 132


@pytest.mark.parametrize("width", [1, 7, 256, 4096, 5120, 8192, source.WIDEST])
def test_a_tile_holds_whole_rows(width):
    rows, block, warps = source.tile(width)
    assert block >= width and rows * block >= 2048
    assert warps in (4, 8, 16) and rows & (rows - 1) == 0 and block & (block - 1) == 0


def test_bad_input(triton_device):
    x = drawn(2, 4, device=triton_device)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        rms_norm(x, x[0, :3])
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match="not equal"):
        add_rms_norm(x, x[:1], x[0])
    with pytest.raises(ValueError, match="residual .* on meta"):
        add_rms_norm(x, x.to("meta"), x[0])
    with pytest.raises(ValueError, match="weight is on meta"):
        rms_norm(x, x[0].to("meta"))
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        rms_norm(x, x[0].double())
    wide = torch.zeros(1, source.WIDEST + 1, device=triton_device)
    with pytest.raises(ValueError, match=f"rows are {source.WIDEST + 1} wide"):
        rms_norm(wide, wide[0])
    with use_backend("auto"):
        assert rms_norm(wide, wide[0]).shape == wide.shape
