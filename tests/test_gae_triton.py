"""The advantages' kernel, interpreted on the CPU or on a GPU.

Run: python -m pytest tests/test_gae_triton.py -q
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import gae, use_backend

source = importlib.import_module("puna.kernels.gae")
pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_device", "short_blocks")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def short_blocks(triton_device):
    """Blocks of 8 steps: rows of several blocks, and no long scan in the interpreter, which takes
    a millisecond a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK", 8)
        yield


def by_hand(rewards, values, lengths, gamma, lam):
    """Schulman's sum in fp64, as a product with the matrix of (gamma lam)^(s - t)."""
    rewards, values = rewards.double().cpu(), values.double().cpu()
    steps = rewards.shape[1]
    real = torch.arange(steps) < lengths.cpu()[:, None]
    rewards, values = rewards.where(real, 0.0), values.where(real, 0.0)
    following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    apart = torch.arange(steps)[None, :] - torch.arange(steps)[:, None]
    decay = torch.where(apart >= 0, (gamma * lam) ** apart.clamp(min=0), 0.0).double()
    advantages = (rewards + gamma * following - values) @ decay.T
    return advantages.where(real, 0.0), (advantages + values).where(real, 0.0)


def by_pytorch(rewards, values, lengths, gamma, lam):
    """Step by step in the tensors' own dtype."""
    real = torch.arange(rewards.shape[1], device=rewards.device) < lengths[:, None]
    rewards, values = rewards.where(real, 0.0), values.where(real, 0.0)
    following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    running, advantages = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        running = advantages[:, t] = delta + gamma * lam * running
    return advantages, (advantages + values).where(real, 0.0)


def make(lengths, steps, dtype=F32, device="cpu", seed=0):
    """Random rewards and values; NaN past each length."""
    torch.manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), steps).to(dtype)
    for row, length in enumerate(lengths):
        rewards[row, length:] = values[row, length:] = torch.nan
    given = torch.tensor(lengths, dtype=torch.int64)
    return rewards.to(device), values.to(device), given.to(device)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0), (0.0, 0.5), (1, 1)]
)
def test_error_against_pytorch(triton_device, no_worse_than_torch, dtype, gamma, lam):
    inputs = make([19, 0, 8, 9], 19, dtype, triton_device)
    found = gae(*inputs, gamma=gamma, lam=lam)
    assert all(x.dtype == dtype for x in found)
    peer, exact = by_pytorch(*inputs, gamma, lam), by_hand(*inputs, gamma, lam)
    found, peer = ([x.cpu() for x in each] for each in (found, peer))
    no_worse_than_torch(found, peer, exact)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=2),
    more=st.integers(0, 9),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_any_shape(triton_device, lengths, more, gamma, lam):
    rewards, values, lengths = make(lengths, max(lengths) + more, F32, triton_device)
    found = gae(rewards, values, lengths, gamma=gamma, lam=lam)
    expected = by_hand(rewards, values, lengths, gamma, lam)
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=1e-5, atol=1e-5)
        past = torch.arange(mine.shape[1], device=mine.device) >= lengths[:, None]
        assert (mine[past] == 0).all()


def test_the_default_block(triton_device, monkeypatch):
    """A row longer than the block that a GPU scans at once."""
    monkeypatch.setattr(source, "BLOCK", 1024)
    inputs = make([1030], 1031, F32, triton_device)
    for mine, truth in zip(gae(*inputs), by_hand(*inputs, 1.0, 0.95), strict=True):
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes(triton_device):
    rewards, values, lengths = make([20, 9], 20, F32, triton_device)
    found = gae(rewards.bfloat16(), values, lengths.int())
    expected = gae(rewards.bfloat16().float(), values, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with use_backend("reference"):
        wide = gae(rewards.bfloat16(), values.bfloat16(), lengths)
        close = gae(rewards.bfloat16().double(), values.bfloat16().double(), lengths)
    for mine, truth in zip(wide, close, strict=True):  # summed in fp32, rounded once
        assert mine.dtype == BF16
        torch.testing.assert_close(mine.double(), truth, rtol=2**-8, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch_and_inputs_stay(triton_device):
    rewards, values, lengths = make([17, 3, 10], 20, F32, triton_device)
    kept = rewards.clone(), values.clone()
    together = gae(rewards, values, lengths)
    for row in range(3):
        alone = gae(rewards[row : row + 1], values[row : row + 1], lengths[row : row + 1])
        assert all(torch.equal(w[row : row + 1], a) for w, a in zip(together, alone, strict=True))
    for now, before in zip((rewards, values), kept, strict=True):
        assert torch.equal(now.nan_to_num(9.0), before.nan_to_num(9.0))


def test_strided_expanded_and_empty(triton_device):
    rewards, values, lengths = make([12, 9, 4], 12, F32, triton_device)
    expected = gae(rewards, values, lengths)
    wide = torch.full((3, 50), torch.nan, device=triton_device)
    wide[:, 11:23] = rewards
    twice = lengths.repeat_interleave(2)[::2]
    for same in (wide[:, 11:23], rewards.t().contiguous().t()):
        found = gae(same, values, twice)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = rewards[:1].expand(3, 12), values[:1].expand(3, 12), lengths[:1].expand(3)
    for mine in gae(*one):
        assert torch.equal(mine[0], mine[2])
    for shape in ((0, 5), (3, 0), (0, 0)):
        nothing = torch.zeros(shape, device=triton_device)
        found = gae(nothing, nothing, torch.zeros_like(nothing[:, :1].sum(1)).long())
        assert [x.shape for x in found] == [shape, shape]


def test_rows_far_apart(triton_device):
    """Two rows 2^31 elements apart: 4 GB of addresses, a page or two of memory."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=triton_device)
    far = torch.empty(0, dtype=BF16, device=triton_device)
    far.set_(storage, 0, (2, 20), (2**31, 1))
    rewards, values, lengths = make([20, 15], 20, BF16, triton_device)
    far.copy_(rewards)
    found, expected = gae(far, values, lengths), gae(rewards, values, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_lengths_that_do_not_fit_stay_in_bounds(triton_device):
    """The launcher alone, which does not wait for the lengths, takes them as T and 0."""
    rewards, values, _ = make([20, 20], 20, F32, triton_device)
    wrong, meant = torch.tensor([[99, -3], [20, 0]], device=triton_device)
    found = source.gae_scan(rewards, values, wrong, 1.0, 0.95)
    expected = source.gae_scan(rewards, values, meant, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_operator_and_one_graph(triton_device):
    torch._dynamo.reset()
    rewards, values, lengths = make([9, 4], 9, F32, triton_device)
    values.requires_grad_()  # a critic's; what comes out has no gradient
    inputs = (rewards, values.detach(), lengths, 0.9, 0.8)
    torch.library.opcheck(source.gae_scan.operator, inputs)

    def scaled(rewards, values, lengths):
        advantages, returns = gae(rewards * 2, values, lengths, gamma=0.9)
        return advantages / 2, returns

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for rows in (2, 1):
        some = rewards[:rows], values[:rows], lengths[:rows]
        found, expected = compiled(*some), scaled(*some)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not any(x.requires_grad for x in found)


def test_bad_input(triton_device, monkeypatch):
    monkeypatch.setenv("PUNA_DEBUG", "1")
    rewards, values, lengths = make([3, 2], 3, F32, triton_device)
    with pytest.raises(ValueError, match="3 steps are given"):
        gae(rewards, values, lengths + 1)
    with pytest.raises(ValueError, match="3 steps are given"):
        gae(rewards, values, lengths - 3)
    with pytest.raises(ValueError, match="int32 or int64"):
        gae(rewards, values, lengths.float())
    with pytest.raises(ValueError, match="same device"):
        gae(rewards, values, lengths.to("meta"))
    with pytest.raises(ValueError, match="floats"):
        gae(rewards.long(), values, lengths)
    with pytest.raises(ValueError, match="dtype"):
        gae(rewards, values.double(), lengths)
