"""RoPE's Triton kernel: interpreted on the CPU, or on a GPU.

Run: python -m pytest tests/test_rope_triton.py -q
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import rope, rope_tables, use_backend

source = importlib.import_module("puna.kernels.rope")
pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_device")


def by_complex(x, positions, interleaved):
    """Each pair as a complex number, turned by e^(i * position * theta^(-2p/D)), in fp64."""
    size = x.shape[-1]
    pairs = torch.arange(size // 2, dtype=torch.float64)
    angles = positions.cpu().double()[..., None] * 10000.0 ** (-2 * pairs / size)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    wide = x.detach().cpu().double()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    turned = torch.complex(first.contiguous(), second.contiguous()) * turn
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat((turned.real, turned.imag), -1)


def drawn(*shape, device, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(device)


def tables(positions, size, device):
    return (table.to(device) for table in rope_tables(positions, size))


def run(function, q, k, upstreams):
    """(q, k, dq, dk)"""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k)
    return (*(x.detach() for x in out), *torch.autograd.grad(out, (q, k), upstreams))


@settings(max_examples=40)
@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.sampled_from([1, 2, 3, 4, 5, 8, 20]),
    mode=st.sampled_from(["default", "positions", "int32 positions", "angles"]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_complex_numbers(
    triton_device, batch, tokens, kv_heads, group, half, mode, interleaved, seed
):
    torch.manual_seed(seed)
    heads, size = kv_heads * group, 2 * half
    q, d_q = (drawn(batch, tokens, heads, size, device=triton_device) for _ in range(2))
    k, d_k = (drawn(batch, tokens, kv_heads, size, device=triton_device) for _ in range(2))
    cos, sin = tables(50, size, triton_device)
    positions = torch.randint(50, (batch, tokens), device=triton_device)
    if mode == "default":
        positions = torch.arange(tokens).expand(batch, tokens)
        options = {}
    elif mode == "angles":
        cos, sin, options = cos[positions], sin[positions], {}
    else:
        options = {"positions": positions.int() if mode.startswith("int32") else positions}
    found = run(
        lambda q, k: rope(q, k, cos, sin, interleaved=interleaved, **options), q, k, (d_q, d_k)
    )
    turns = (positions, positions, -positions, -positions)
    for mine, x, turn in zip(found, (q, k, d_q, d_k), turns, strict=True):
        assert mine.shape == x.shape and mine.dtype == x.dtype
        expected = by_complex(x, turn, interleaved).float()
        torch.testing.assert_close(mine.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_against_pytorch(triton_device, no_worse_than_torch, dtype, interleaved):
    torch.manual_seed(0)
    q, d_q = (drawn(2, 9, 3, 16, device=triton_device, dtype=dtype) for _ in range(2))
    k, d_k = q[:, :, :1] + 1, d_q[:, :, :1] * 2
    cos, sin = tables(9, 16, triton_device)
    positions = torch.arange(9).expand(2, 9)

    def theirs(*inputs):
        if interleaved:
            repeat = lambda t: t.repeat_interleave(2, -1)  # noqa: E731
            swap = lambda x: torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)  # noqa: E731
        else:
            repeat = lambda t: torch.cat((t, t), -1)  # noqa: E731
            swap = lambda x: torch.cat((-x[..., 8:], x[..., :8]), -1)  # noqa: E731
        low_cos, low_sin = (repeat(t).to(dtype).unsqueeze(1) for t in (cos, sin))
        return tuple(x * low_cos + swap(x) * low_sin for x in inputs)

    found = run(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), q, k, (d_q, d_k))
    peer = run(theirs, q, k, (d_q, d_k))
    turns = (positions, positions, -positions, -positions)
    exact = [by_complex(x, p, interleaved) for x, p in zip((q, k, d_q, d_k), turns, strict=True)]
    no_worse_than_torch([t.cpu() for t in found], [t.cpu() for t in peer], exact)


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_are_read_where_they_are(triton_device, monkeypatch, interleaved):
    """q and k as parts of one projection, in any order of dimensions: no copy is made."""
    size = 8
    cos, sin = tables(5, size, triton_device)
    packed = drawn(2, 5, 6 + 2 + 2, size, device=triton_device)
    heads_first = drawn(2, 4, 5, size, device=triton_device).transpose(1, 2)
    padded = drawn(2, 9, 4, size + 3, device=triton_device)[:, 2:7, :, 1 : size + 1]
    cases = {
        "packed": (packed[:, :, :6], packed[:, :, 6:8]),
        "heads before tokens": (heads_first[:, :, :3], heads_first[:, :, 3:]),
        "a window of more": (padded[:, :, :2], padded[:, :, 2:]),
        "one head for all": (padded[:, :, :1].expand(-1, -1, 4, -1), padded[:, :, 1:2]),
    }
    expected = {
        name: rope(q.contiguous(), k.contiguous(), cos, sin, interleaved=interleaved)
        for name, (q, k) in cases.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("copied"))
        found = {n: rope(q, k, cos, sin, interleaved=interleaved) for n, (q, k) in cases.items()}
    for name in cases:
        for a, b in zip(found[name], expected[name], strict=True):
            assert a.is_contiguous() and torch.equal(a, b), name


def test_strided_elements_tables_positions_and_gradients(triton_device):
    """What cannot be read in place is copied first."""
    torch.manual_seed(0)
    x = drawn(2, 5, 3, 16, device=triton_device)[..., ::2]
    cos, sin = tables(12, 8, triton_device)
    positions = torch.randint(12, (5, 4), device=triton_device).T[::2]
    upstream = drawn(2, 5, 3, 1, device=triton_device).expand(2, 5, 3, 8)
    one = torch.tensor(0.3, device=triton_device).expand(2, 5, 3, 8)
    dense = [t.contiguous() for t in (x, positions, upstream, one)]
    expected = run(
        lambda q, k: rope(q, k, cos, sin, positions=dense[1]), dense[0], dense[0], dense[2:]
    )
    for odd in (torch.stack((cos, cos), -1)[..., 0], torch.cat((cos, cos), -1)[:, :4]):
        found = run(
            lambda q, k, c=odd: rope(q, k, c, sin, positions=positions), x, x, (upstream, one)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_sum_backward(triton_device):
    x = drawn(1, 4, 2, 8, device=triton_device).requires_grad_()
    cos, sin = tables(4, 8, triton_device)
    q, k = rope(x, x, cos, sin)
    (q.sum() + k.sum()).backward()
    expected = 2 * by_complex(torch.ones_like(x), -torch.arange(4)[None], False).float()
    torch.testing.assert_close(x.grad.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_one_output_alone(triton_device):
    q, k = (drawn(1, 3, 2, 4, device=triton_device).requires_grad_() for _ in range(2))
    cos, sin = tables(3, 4, triton_device)
    upstream = drawn(1, 3, 2, 4, device=triton_device)
    d_q, d_k = torch.autograd.grad(rope(q, k, cos, sin)[0], (q, k), upstream)
    assert torch.equal(d_q, rope(upstream, upstream, cos, -sin)[0].detach())
    assert d_k is None or not d_k.any()


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty(triton_device, shape):
    q = drawn(*shape, device=triton_device)
    cos, sin = tables(4, 8, triton_device)
    for part in run(lambda q, k: rope(q, k, cos, sin), q, q, (q, q)):
        assert part.shape == shape


def test_a_token_does_not_depend_on_the_batch(triton_device):
    q, k = (drawn(3, 4, h, 6, device=triton_device).bfloat16() for h in (4, 2))
    cos, sin = tables(9, 6, triton_device)
    positions = torch.randint(9, (3, 4), device=triton_device)
    together = rope(q, k, cos, sin, positions=positions)
    for b, t in ((0, 0), (2, 3), (1, 2)):
        one = slice(b, b + 1), slice(t, t + 1)
        alone = rope(q[one], k[one], cos, sin, positions=positions[one])
        assert all(torch.equal(a[one], o) for a, o in zip(together, alone, strict=True))


def test_nan_in_one_token_stays_there(triton_device):
    x = drawn(2, 3, 2, 8, device=triton_device)
    cos, sin = tables(3, 8, triton_device)
    clean = rope(x, x, cos, sin)[0]
    x[1, 2] = torch.nan
    found = rope(x, x, cos, sin)[0]
    assert found[1, 2].isnan().all()
    assert torch.equal(found[0], clean[0]) and torch.equal(found[1, :2], clean[1, :2])


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_outside_the_tables_are_never_read(triton_device, interleaved):
    """The launcher itself, as on a device that must not be waited for: such a token is NaN.

    The far ones would read outside this process's memory.
    """
    q, k = (drawn(1, 6, h, 8, device=triton_device) for h in (3, 1))
    cos, sin = tables(4, 8, triton_device)
    positions = torch.tensor([[0, 4, 3, -1, 2**40, -(2**40)]], device=triton_device)
    bad = [1, 3, 4, 5]
    inside = positions.clone()
    inside[0, bad] = 0
    for conjugate in (False, True):
        found = source.rope_turn(q, k, cos, sin, positions, interleaved, conjugate)
        good = source.rope_turn(q, k, cos, sin, inside, interleaved, conjugate)
        for a, b in zip(found, good, strict=True):
            assert a[0, bad].isnan().all()
            assert torch.equal(a[0, [0, 2]], b[0, [0, 2]])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("outside", [-1, 4, 2**40])
def test_positions_outside_the_tables_are_an_error_where_they_are_seen(
    triton_device, monkeypatch, backend, outside
):
    monkeypatch.setenv("PUNA_DEBUG", "1")
    q = drawn(1, 2, 1, 8, device=triton_device)
    cos, sin = tables(4, 8, triton_device)
    positions = torch.tensor([[1, outside]], device=triton_device)
    with use_backend(backend), pytest.raises(ValueError, match="positions run from"):
        rope(q, q, cos, sin, positions=positions)


def test_inputs_untouched(triton_device):
    q, k, upstream = (drawn(1, 3, 2, 8, device=triton_device) for _ in range(3))
    cos, sin = tables(3, 8, triton_device)
    kept = [t.clone() for t in (q, k, cos, sin, upstream)]
    q.requires_grad_(), k.requires_grad_()
    out = rope(q, k, cos, sin)
    first = torch.autograd.grad(out, (q, k), (upstream, upstream), retain_graph=True)
    second = torch.autograd.grad(out, (q, k), (upstream, upstream))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for tensor, before in zip((q, k, cos, sin, upstream), kept, strict=True):
        assert torch.equal(tensor, before)


def test_offsets_past_2_to_the_31(triton_device, tmp_path):
    """Tokens 2^30 elements apart, in a file with holes where there is no GPU."""
    stride, size = 2**30 + 16, 2**31 + 64
    if triton_device.type == "cpu":
        with open(tmp_path / "holes", "wb") as file:
            file.truncate(2 * size)
        memory = torch.from_file(
            str(tmp_path / "holes"), shared=True, size=size, dtype=torch.float16
        )
    else:
        memory = torch.zeros(size, dtype=torch.float16, device=triton_device)
    cos, sin = tables(3, 8, triton_device)
    for shape, strides in (((1, 3, 2, 8), (0, stride, 8, 1)), ((1, 2, 3, 8), (0, 8, stride, 1))):
        x = memory.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        found, _ = rope(x, x[:, :, :1], cos, sin)
        assert torch.equal(found, rope(x.contiguous(), x[:, :, :1].contiguous(), cos, sin)[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("given_positions", [False, True])
def test_operator_is_registered_right(triton_device, interleaved, given_positions):
    q, k = (drawn(2, 3, h, 6, device=triton_device).requires_grad_() for h in (4, 2))
    cos, sin = tables(5, 6, triton_device)
    positions = torch.randint(5, (2, 3), device=triton_device) if given_positions else None
    torch.library.opcheck(
        source.rope_turn.operator, (q, k, cos, sin, positions, interleaved, False)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(triton_device, dynamic):
    torch._dynamo.reset()
    cos, sin = tables(50, 6, triton_device)

    def layer(q, k, positions):
        q, k = rope(q, k, cos, sin)
        return rope(q, q, cos, sin, positions=positions, interleaved=True)[0], k

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (3, 5):
        q, k = (drawn(2, tokens, 4, 6, device=triton_device) for _ in range(2))
        positions = torch.randint(50, (2, tokens), device=triton_device)
        found, expected = (
            run(lambda q, k, f=f, p=positions: f(q, k, p), q, k, (k, q)) for f in (compiled, layer)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Launches:
    """Stands for the kernel: keeps what it would be launched with."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda *args, **settings: self.seen.append((grid, args, settings))


def test_launcher_runs_on_meta_tensors(monkeypatch):
    """How kernels are compiled ahead of time: nothing asks for a value. One launch for both."""
    kernel = Launches()
    monkeypatch.setattr(source, "rope_kernel", kernel)
    q = torch.empty(2, 4096, 32, 128, dtype=torch.bfloat16, device="meta")
    cos, positions = torch.empty(4096, 64, device="meta"), torch.empty(2, 4096, device="meta")
    source.rope_turn.__wrapped__(q, q, cos, cos, positions.long(), False, False)
    ((grid, _, settings),) = kernel.seen
    assert grid == (8192,) and settings["BLOCK_HALF"] == 64 and settings["BLOCK_Q"] == 32


def test_bad_input(triton_device):
    q, k = (drawn(1, 4, h, 8, device=triton_device) for h in (2, 1))
    cos, sin = tables(4, 8, triton_device)
    with pytest.raises(ValueError, match="head size 6, q has 8"):
        rope(q, k, *tables(4, 6, triton_device))
    with pytest.raises(ValueError, match="4 positions, but the tables hold 3"):
        rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match=r"positions have shape \(4,\), expected \(1, 4\)"):
        rope(q, k, cos, sin, positions=torch.arange(4, device=triton_device))
    with pytest.raises(ValueError, match="positions are torch.float32"):
        rope(q, k, cos, sin, positions=q[..., 0, 0])
    with pytest.raises(ValueError, match="positions are torch.int64 on meta"):
        rope(q, k, cos, sin, positions=torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="expected equal shapes"):
        rope(q, k, cos, sin[:3])
    with pytest.raises(ValueError, match="cos is .* on meta"):
        rope(q, k, cos.to("meta"), sin)
    with pytest.raises(ValueError, match=r"expected \(B, T, H, D\)"):
        rope(q[0], k[0], cos, sin)
    with pytest.raises(ValueError, match=r"expected \(B, T, H, D\)"):
        rope(q, k[:, :3], cos, sin)
    with pytest.raises(ValueError, match="k torch.bfloat16"):
        rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match="detach the tables"):
        rope(q, k, cos.requires_grad_(), sin)
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        rope(q, k, cos.detach().double(), sin)
