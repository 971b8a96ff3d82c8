"""Run: python -m pytest tests/test_gae.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import gae

pytestmark = pytest.mark.usefixtures("poisoned_empty")
factors = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def by_hand(rewards, values, gamma, lam):
    """Schulman's sum, term by term: A[t] = sum over l of (gamma lam)^l delta[t + l]."""
    steps = len(rewards)
    following = [*values[1:], 0.0] if steps else []
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(steps)]
    return [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, steps))
        for t in range(steps)
    ]


def make(lengths, steps, seed):
    """Random rewards and values; NaN past each length."""
    torch.manual_seed(seed)
    rewards, values = torch.randn(len(lengths), steps).double(), torch.randn(len(lengths), steps)
    values = values.double()
    for row, length in enumerate(lengths):
        rewards[row, length:] = values[row, length:] = torch.nan
    return rewards, values, torch.tensor(lengths, dtype=torch.int64)


cases = st.lists(st.integers(0, 7), min_size=0, max_size=5)


@settings(max_examples=25)
@given(lengths=cases, more=st.integers(0, 3), gamma=factors, lam=factors, seed=st.integers(0, 99))
def test_against_the_sum(lengths, more, gamma, lam, seed):
    steps = max(lengths, default=0) + more
    rewards, values, lengths = make(lengths, steps, seed)
    advantages, returns = gae(rewards, values, lengths, gamma=gamma, lam=lam)
    assert advantages.shape == returns.shape == rewards.shape
    for row, length in enumerate(lengths.tolist()):
        real = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = torch.tensor(by_hand(*real, gamma, lam), dtype=torch.float64)
        torch.testing.assert_close(advantages[row, :length], expected)
        torch.testing.assert_close(returns[row, :length], expected + values[row, :length])
        assert (advantages[row, length:] == 0).all() and (returns[row, length:] == 0).all()


@settings(max_examples=25)
@given(lengths=cases, seed=st.integers(0, 99))
def test_telescopes_when_nothing_is_discounted(lengths, seed):
    """gamma = lam = 1: the return of a token is the sum of the rewards from it on."""
    rewards, values, lengths = make(lengths, 7, seed)
    _, returns = gae(rewards, values, lengths, gamma=1.0, lam=1.0)
    real = rewards.nan_to_num(0.0)
    expected = real.flip(1).cumsum(1).flip(1) * ~rewards.isnan()
    torch.testing.assert_close(returns, expected)


def test_lam_zero_is_the_one_step_error():
    rewards, values, lengths = make([4], 4, 0)
    advantages, _ = gae(rewards, values, lengths, gamma=0.9, lam=0.0)
    following = torch.cat((values[0, 1:], torch.zeros(1).double()))
    torch.testing.assert_close(advantages[0], rewards[0] + 0.9 * following - values[0])


def test_only_the_last_reward_reaches_back():
    """One reward at the end of a five-token answer, values zero: it decays by gamma * lam."""
    rewards = torch.zeros(1, 8)
    rewards[0, 4] = 2.0
    advantages, returns = gae(rewards, torch.zeros(1, 8), torch.tensor([5]), gamma=0.9, lam=0.5)
    expected = torch.tensor([2.0 * 0.45 ** (4 - t) for t in range(5)] + [0.0] * 3)
    torch.testing.assert_close(advantages[0], expected)
    torch.testing.assert_close(returns[0], expected)


def test_a_row_does_not_depend_on_its_batch_and_inputs_stay():
    rewards, values, lengths = make([3, 7, 1], 7, 0)
    kept = rewards.clone(), values.clone()
    together = gae(rewards, values, lengths)
    for row in range(3):
        alone = gae(rewards[row : row + 1], values[row : row + 1], lengths[row : row + 1])
        assert all(torch.equal(w[row : row + 1], a) for w, a in zip(together, alone, strict=True))
    for now, before in zip((rewards, values), kept, strict=True):
        assert torch.equal(now.nan_to_num(9.0), before.nan_to_num(9.0))


def test_bad_input():
    rewards, values, lengths = make([3, 2], 3, 0)
    with pytest.raises(ValueError, match="do not fit"):
        gae(rewards, values[:, :2], lengths)
    with pytest.raises(ValueError, match="do not fit"):
        gae(rewards, values, lengths[:1])
    for wrong in ([4, 2], [3, -1]):
        with pytest.raises(ValueError, match="3 steps are given"):
            gae(rewards, values, torch.tensor(wrong))
