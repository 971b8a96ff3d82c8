"""Run: python -m pytest tests/test_accuracy.py -q"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.trainers.data.packing import Pair
from puna.trainers.rl.accuracy import (
    accuracies,
    baselines,
    calibration,
    calibration_error,
    clustered,
    sentences,
    shares,
    wilson,
)


@given(st.integers(1, 2000), st.data())
def test_the_ends_of_the_interval_are_just_not_rejected(count, data):
    """Wilson's ends p solve |share - p| = 1.96 sqrt(p (1 - p) / count)."""
    hits = data.draw(st.integers(0, 2 * count)) / 2
    found = wilson(hits, count)
    assert 0 <= found.low <= found.share <= found.high <= 1 and found.pairs == count
    for end in (found.low, found.high):
        if 0 < end < 1:
            distance = abs(found.share - end)
            assert distance == pytest.approx(
                1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-9
            )


def test_known_intervals():
    assert wilson(0, 10)[:3] == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert wilson(81, 263)[:3] == pytest.approx((0.3080, 0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 0).low == 0 and wilson(0, 0).high == 1


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.integers(1, 4))
def test_trials_that_stand_or_fall_together_count_once(outcomes, copies):
    hits = torch.tensor(outcomes, dtype=torch.float64)
    alone = clustered(hits, range(len(hits)))
    assert alone == pytest.approx(wilson(float(hits.sum()), len(hits)))
    repeated = clustered(hits.repeat(copies), list(range(len(hits))) * copies)
    once = wilson(float(hits.sum()), len(hits))
    assert repeated[:3] == pytest.approx(once[:3]) and repeated.pairs == copies * len(hits)


def test_the_interval_of_clusters_covers_the_truth():
    """200 prompts of 5 pairs, each prompt of its own difficulty; the plain interval misses one
    time in four."""
    draw = torch.Generator().manual_seed(0)
    covered = plain = 0
    for _ in range(400):
        chances = (torch.rand(200, generator=draw, dtype=torch.float64) < 0.6).double() * 0.9 + 0.05
        hits = (torch.rand(200, 5, generator=draw, dtype=torch.float64) < chances[:, None]).double()
        found = clustered(hits.flatten(), [i for i in range(200) for _ in range(5)])
        naive = wilson(float(hits.sum()), 1000)
        covered += found.low <= 0.59 <= found.high
        plain += naive.low <= 0.59 <= naive.high
    assert 0.92 <= covered / 400 <= 0.98 and plain / 400 < 0.8


def test_what_a_coin_and_the_longer_answer_get_stands_beside():
    pairs = [
        Pair([1, 2, 3], [1, 2], prompt="a"), Pair([1, 2], [1, 2, 3], prompt="a"),
        Pair([1, 2], [1, 3], prompt="b"), Pair([1, 2, 3, 4], [1, 2], prompt="c"),
    ]  # fmt: skip
    found = baselines(pairs)["the longer answer"]
    assert found.share == pytest.approx((1 + 0 + 0.5 + 1) / 4) and found.pairs == 4
    lines = sentences({"all": found, **baselines(pairs)}, "held-out accuracy").splitlines()
    assert lines[1].startswith("  the longer answer  0.625")
    assert lines[2].split() == ["chance", "0.500"]


def test_accuracy_by_rating_counts_ties_half():
    differences = torch.tensor([1.0, -1.0, 0.0, 2.0, 3.0])
    ratings = torch.tensor([0, 0, 2, 2, -1])
    expected = {"all": 0.7, "significantly_better": 0.5, "slightly_better": 0.75}
    assert accuracies(differences, ratings) == pytest.approx(expected)
    assert {k: s.pairs for k, s in shares(differences, ratings).items()} == {
        "all": 5, "significantly_better": 2, "slightly_better": 2,
    }  # fmt: skip
    lines = sentences(shares(differences, ratings), "held-out accuracy").splitlines()
    assert lines[0].startswith("held-out accuracy       0.700 (95% interval 0.299")
    assert lines[1].startswith("  significantly better  0.500") and lines[1].endswith(", 2 pairs")


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated():
    draw = torch.Generator().manual_seed(0)
    sure = torch.randn(20_000, generator=draw) * 2
    flipped = torch.rand(20_000, generator=draw) > torch.sigmoid(sure.abs())
    differences = torch.where(flipped, -sure.abs(), sure.abs())
    bins = calibration(differences)
    assert sum(each.right.pairs for each in bins) == 20_000 and len(bins) == 5
    assert all(each.right.low - 0.01 < each.confidence < each.right.high + 0.01 for each in bins)
    assert calibration_error(bins) < 0.01
    assert calibration_error(calibration(3 * differences)) > 0.05  # too sure of itself


def test_certain_and_undecided_models_have_a_bin():
    (sure,) = calibration(torch.tensor([100.0, -100.0]))
    assert sure.confidence == 1.0 and sure.right.share == 0.5
    (undecided,) = calibration(torch.zeros(3))
    assert undecided.confidence == 0.5 and undecided.right.share == 0.5
