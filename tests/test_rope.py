"""Run: python -m pytest tests/test_rope.py -q"""

import cmath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import rope, rope_tables

pytestmark = pytest.mark.usefixtures("poisoned_empty")
THETA = 10000.0


def by_hand(x, positions, interleaved, theta=THETA):
    """Each pair as a complex number, turned by e^(i * position * theta^(-2p/D)), in fp64."""
    size = x.shape[-1]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for pair in range(size // 2):
                turn = cmath.exp(1j * int(positions[b, t]) * theta ** (-2 * pair / size))
                first = 2 * pair if interleaved else pair
                second = first + (1 if interleaved else size // 2)
                for h in range(x.shape[2]):
                    z = complex(x[b, t, h, first], x[b, t, h, second]) * turn
                    out[b, t, h, first], out[b, t, h, second] = z.real, z.imag
    return out


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_tables_are_right_to_the_last_bit_of_fp32(theta):
    cos, sin = rope_tables(4096, 128, theta=theta)
    assert cos.shape == sin.shape == (4096, 64) and cos.dtype == sin.dtype == torch.float32
    for position in (0, 1, 77, 4095):
        for pair in (0, 1, 31, 63):
            turn = cmath.exp(1j * position * theta ** (-2 * pair / 128))
            assert cos[position, pair].item() == pytest.approx(turn.real, abs=6e-8)
            assert sin[position, pair].item() == pytest.approx(turn.imag, abs=6e-8)


@settings(max_examples=30)
@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 4),
    given_positions=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_complex_numbers(
    batch, tokens, kv_heads, group, half, given_positions, interleaved, seed
):
    torch.manual_seed(seed)
    q = torch.randn(batch, tokens, kv_heads * group, 2 * half)
    k = torch.randn(batch, tokens, kv_heads, 2 * half)
    cos, sin = rope_tables(50, 2 * half)
    positions = torch.arange(tokens).expand(batch, tokens)
    if given_positions:
        positions = torch.randint(50, (batch, tokens))
    turned = rope(
        q, k, cos, sin, positions=positions if given_positions else None, interleaved=interleaved
    )
    for found, x in zip(turned, (q, k), strict=True):
        assert found.shape == x.shape and found.dtype == x.dtype
        expected = by_hand(x, positions, interleaved).float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_numerically(interleaved):
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_tables(9, 6)
    positions = torch.tensor([[0, 1, 0], [8, 3, 3]])

    def turn(q, k):
        return rope(q, k, cos.double(), sin.double(), positions=positions, interleaved=interleaved)

    assert torch.autograd.gradcheck(turn, (q, k))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_is_the_turn_back(interleaved):
    """A rotation's transpose is its inverse: the backward undoes the forward."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    cos, sin = rope_tables(4, 8)
    turned, _ = rope(x, x, cos, sin, interleaved=interleaved)
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    torch.testing.assert_close(back, x.detach())
    (back,) = torch.autograd.grad(
        rope(x, x, cos, sin, interleaved=interleaved)[0].sum(),
        x,  # an expanded gradient
    )
    torch.testing.assert_close(
        back, rope(torch.ones_like(x), x, cos, -sin, interleaved=interleaved)[0]
    )


@given(shift=st.integers(0, 40), a=st.integers(0, 9), b=st.integers(0, 9))
def test_only_the_distance_counts(shift, a, b):
    """q at position m times k at position n is a function of m - n: why RoPE exists."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()
    cos, sin = (table.double() for table in rope_tables(50, 8))

    def score(m, n):
        turned_q, _ = rope(q, k, cos, sin, positions=torch.tensor([[m]]))
        _, turned_k = rope(q, k, cos, sin, positions=torch.tensor([[n]]))
        return (turned_q * turned_k).sum().item()

    assert score(a, b) == pytest.approx(score(a + shift, b + shift), abs=1e-5)


def test_half_split_is_interleaved_with_the_elements_reordered():
    x = torch.randn(2, 5, 3, 8)
    cos, sin = rope_tables(5, 8)
    reorder = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    half, _ = rope(x[..., reorder], x, cos, sin)
    pairs, _ = rope(x, x, cos, sin, interleaved=True)
    assert torch.equal(half, pairs[..., reorder])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_against_pytorch(dtype, no_worse_than_torch):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 16).to(dtype)
    cos, sin = rope_tables(9, 16)
    positions = torch.arange(9).expand(2, 9)
    low_cos, low_sin = (torch.cat((t, t), -1).to(dtype).unsqueeze(1) for t in (cos, sin))
    swapped = torch.cat((-x[..., 8:], x[..., :8]), -1)
    peer = x * low_cos + swapped * low_sin
    found = rope(x, x[:, :, :1], cos, sin)
    exact = by_hand(x, positions, False)
    no_worse_than_torch(found, (peer, peer[:, :, :1]), (exact, exact[:, :, :1]))


def test_strided_inputs():
    """q and k are often slices of one projection, or transposed."""
    both = torch.randn(2, 3, 5, 8).transpose(1, 2)
    cos, sin = rope_tables(5, 8)
    q, k = both[:, :, :2], both[:, :, 2:]
    found = rope(q, k, cos, sin)
    expected = rope(q.contiguous(), k.contiguous(), cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_angles_taken_from_the_tables_beforehand():
    """(B, T, D/2): what a model does once instead of in every layer."""
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 1, 8)
    cos, sin = rope_tables(9, 8)
    positions = torch.tensor([[0, 1, 0, 7], [8, 3, 3, 0]])
    found = rope(q, k, cos[positions], sin[positions])
    expected = rope(q, k, cos, sin, positions=positions)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="angles of each token have shape"):
        rope(q, k, cos[positions], sin[positions], positions=positions)
    with pytest.raises(ValueError, match="angles of each token have shape"):
        rope(q, k, cos[positions[:1]], sin[positions[:1]])


def test_bad_input():
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 8)
    cos, sin = rope_tables(4, 8)
    with pytest.raises(ValueError, match="head size 6, q has 8"):
        rope(q, k, *rope_tables(4, 6))
    with pytest.raises(ValueError, match="4 positions, but the tables hold 3"):
        rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match=r"positions have shape \(4,\), expected \(1, 4\)"):
        rope(q, k, cos, sin, positions=torch.arange(4))
    with pytest.raises(ValueError, match="even"):
        rope_tables(4, 7)
