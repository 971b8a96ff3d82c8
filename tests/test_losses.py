"""Run: python -m pytest tests/test_losses.py -q"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core import parallel
from puna.trainers.rl.losses import (
    MARGINS,
    k1,
    k3,
    moments,
    policy_loss,
    ranking_loss,
    safety_loss,
    value_loss,
    whiten,
)

numbers = st.floats(-20, 20, allow_nan=False, width=32)


@pytest.mark.parametrize(
    ("margin", "loss", "gradient"),
    [
        (0.0, 0.693, 0.5),
        (1 / 3, 0.874, 0.583),
        (2 / 3, 1.081, 0.661),
        (1.0, 1.313, 0.731),
        (2.0, 2.127, 0.881),
        (3.0, 3.049, 0.953),
    ],
)
def test_ranking_loss_at_equal_scores(margin, loss, gradient):
    chosen = torch.zeros(1, requires_grad=True)
    value = ranking_loss(chosen, torch.zeros(1), torch.tensor([margin]))
    assert value.item() == pytest.approx(loss, abs=5e-4)
    value.sum().backward()
    assert chosen.grad.item() == pytest.approx(-gradient, abs=5e-4)


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 3)), min_size=1, max_size=8))
def test_ranking_loss_is_logistic_regression_on_the_difference(pairs):
    chosen, rejected, margins = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    expected = torch.log1p(torch.exp(-(chosen - rejected - margins)))
    got = ranking_loss(chosen, rejected, margins).double()
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_no_margin_is_equation_one():
    chosen, rejected = torch.randn(5), torch.randn(5)
    plain = ranking_loss(chosen, rejected)
    assert torch.equal(plain, ranking_loss(chosen, rejected, torch.zeros(5)))


def test_margins_are_those_of_table_27():
    assert list(MARGINS) == ["none", "small", "large"]
    assert list(MARGINS["small"].values()) == [1, 2 / 3, 1 / 3, 0]
    assert list(MARGINS["large"].values()) == [3, 2, 1, 0]
    assert set(MARGINS["none"].values()) == {0.0}
    ratings = ["significantly_better", "better", "slightly_better", "negligibly_better"]
    assert all(list(table) == ratings for table in MARGINS.values())


def test_safety_loss_is_cross_entropy_of_the_sigmoid_and_ignores_unasked():
    scores = torch.tensor([2.0, -1.0, 5.0])
    loss = safety_loss(scores, torch.tensor([1.0, 0.0, math.nan]))
    assert loss[0].item() == pytest.approx(-math.log(1 / (1 + math.exp(-2))), rel=1e-5)
    assert loss[1].item() == pytest.approx(-math.log(1 - 1 / (1 + math.exp(1))), rel=1e-5)
    assert loss[2].item() == 0.0


def test_safety_loss_sends_no_gradient_through_an_unknown_label():
    scores = torch.tensor([0.3, -0.2], requires_grad=True)
    safety_loss(scores, torch.tensor([math.nan, 1.0])).sum().backward()
    assert scores.grad[0].item() == 0.0
    assert scores.grad[1].item() < 0.0


def test_policy_loss_gradient_is_the_policy_gradient_at_ratio_one():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.7, -1.3])
    policy_loss(logprobs, logprobs.detach(), advantages, 0.2).sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


def test_far_off_ratios_are_numbers():
    """A log-ratio above 88 is inf in fp32, and inf * 0, of an advantage or a gradient, is NaN."""
    for far in (25.0, 88.0, 89.0, 1e4, -89.0, -1e4):
        for advantage in (1.0, -1.0, 0.0):
            logprobs = torch.tensor([far - 1e5], requires_grad=True)
            loss = policy_loss(logprobs, torch.tensor([-1e5]), torch.tensor([advantage]), 0.2)
            (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
            assert loss.isfinite().all() and gradient.isfinite().all()
            assert k3(torch.tensor([far]), torch.zeros(1)).isfinite().all()
            assert k3(torch.zeros(1), torch.tensor([far])).isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)],
)
def test_policy_loss_stops_only_moves_that_went_too_far(ratio, advantage, moves):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2)
    loss.sum().backward()
    assert bool(logprobs.grad.abs().item() > 0) is moves
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-5)


def test_value_loss_takes_the_worse_of_the_two_errors():
    values, old = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0])
    returns = torch.tensor([1.0, 1.0])
    loss = value_loss(values, old, returns, clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])
    plain = value_loss(values, old, returns, clip=None)
    assert plain.tolist() == pytest.approx([0.0, 0.5 * 0.9**2])


def test_kl_estimators_agree_with_the_exact_kl():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert (policy.exp() * k1(policy, reference)).sum().item() == pytest.approx(exact, rel=1e-4)
    assert (policy.exp() * k3(policy, reference)).sum().item() == pytest.approx(exact, rel=1e-4)


def test_neither_estimator_is_a_loss_by_itself():
    """Trap 10: expectation over the policy's own samples of each estimator's gradient."""
    torch.manual_seed(0)
    reference = torch.randn(20).log_softmax(-1)
    logits = torch.randn(20, requires_grad=True)
    policy = logits.log_softmax(-1)
    exact = torch.autograd.grad(
        (policy.exp() * (policy - reference)).sum(), logits, retain_graph=True
    )[0]
    weights = policy.detach().exp()

    def gradient(estimator):
        return torch.autograd.grad(
            (weights * estimator(policy, reference)).sum(), logits, retain_graph=True
        )[0]

    assert torch.allclose(gradient(k1), torch.zeros(20), atol=1e-6)
    assert not torch.allclose(gradient(k1), exact, atol=1e-3)
    assert not torch.allclose(gradient(k3), exact, atol=1e-3)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_k3_is_never_negative(pairs):
    logprobs, reference = torch.tensor(pairs).unbind(1)
    assert (k3(logprobs, reference) >= 0).all()


@given(st.lists(numbers, min_size=2, max_size=30))
def test_whiten_has_zero_mean_and_unit_variance(values):
    x = torch.tensor(values, dtype=torch.float64)
    white = whiten(x)
    assert abs(white.mean().item()) < 1e-6
    if x.std() > 1e-2:
        assert white.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)


def test_whiten_is_masked():
    x = torch.tensor([1.0, 3.0, 1e6])
    mask = torch.tensor([True, True, False])
    assert whiten(x, mask).tolist() == pytest.approx([-1.0, 1.0, 0.0], abs=1e-5)


def test_whiten_is_global_over_ranks(monkeypatch):
    """Two ranks that add their sums get what one process with all the values gets."""
    x = torch.tensor([1.0, 2.0, 10.0, -4.0, 3.0])
    parts = [x[:2], x[2:]]
    totals = []
    count = torch.tensor([5.0, x.sum()], dtype=torch.float64)
    spread = (x.double() - x.double().mean()).square().sum()[None]

    def all_sum(local):
        totals.append(local)
        return count if local.numel() == 2 else spread

    alone = whiten(x)
    monkeypatch.setattr(parallel, "all_sum", all_sum)
    got = torch.cat([whiten(part) for part in parts])
    assert torch.allclose(got, alone, atol=1e-6)
    assert torch.allclose(totals[0] + totals[2], count)
    assert torch.allclose(totals[1] + totals[3], spread)


@pytest.mark.parametrize("values", [[], [5.0], [2.0, 2.0, 2.0]])
def test_whiten_survives_fewer_than_two_values_and_no_spread(values):
    white = whiten(torch.tensor(values))
    assert torch.isfinite(white).all() and (white == 0).all()


def test_moments_with_nothing_kept():
    count, mean, variance = moments(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert (count.item(), mean.item(), variance.item()) == (0.0, 0.0, 0.0)
