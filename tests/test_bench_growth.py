"""Fitted exponents against numpy's, and where memory ends against a line by hand.

Run: python -m pytest tests/test_bench_growth.py -q
"""

import math

import numpy as np
import pytest

from puna.benchmarks.models import growth
from puna.benchmarks.timing import Timing


def test_an_exact_power_has_no_doubt():
    fit = growth.fitted([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert fit == pytest.approx((1.5, 1.5, 1.5))


def test_the_interval_is_students():
    xs, ys = [1, 2, 4, 8, 16], [1.1, 1.8, 4.3, 7.6, 17.0]
    fit = growth.fitted(xs, ys)
    (slope, _), covariance = np.polyfit(np.log(xs), np.log(ys), 1, cov=True)
    reach = 3.182 * math.sqrt(covariance[0, 0])  # 3 degrees of freedom
    assert fit == pytest.approx((slope, slope - reach, slope + reach), rel=1e-3)


def test_two_points_say_nothing():
    assert growth.fitted([1, 2], [1, 2]) is None


@pytest.mark.parametrize("along", [name for name in growth.CPU.axes if name != "K"])
@pytest.mark.parametrize("plan", [growth.CPU, growth.GPU, growth.DRY])
def test_one_thing_grows_and_the_rest_stays(plan, along):
    configs = [growth.at(plan, along, x) for x in plan.axes[along]]
    for name, of in (("vocabulary", "vocab_size"), ("depth", "n_layers"), ("width", "dim")):
        expected = plan.axes[along] if along == name else [getattr(plan.base, of)] * len(configs)
        assert [getattr(config, of) for config in configs] == list(expected)
    if along == "context":
        assert all(c.context >= x for c, x in zip(configs, plan.axes[along], strict=True))


def points(along, needs, seconds=lambda x: float(x)):
    found = []
    for x, need in needs.items():
        work = growth.Work("growth", f"{along} {x}", 1, 1, 1.0, "fp32", f"train by {along}")
        row = growth.row(work, "puna", Timing(*[seconds(x)] * 3), None, need)
        found.append(row | {"along": along, "x": x, "needs_mb": need})
    return found


def test_where_memory_ends(monkeypatch):
    monkeypatch.setattr(growth, "memory_mb", lambda: 1000.0)
    rows = points("batch", {1: 110.0, 2: 120.0, 4: 140.0})
    rows += points("width", {10: 100.0 + 1, 20: 100.0 + 4, 40: 100.0 + 16}, lambda x: x * x)
    batch, width = growth.exponents(rows)
    assert (batch["what"], batch["about"]) == ("train by batch", 90)
    assert batch["exponent"] == pytest.approx(1) and width["exponent"] == pytest.approx(2)
    assert width["about"] == 300  # 100 + x^2 / 100
    rows[2]["ends"] = 8
    seen = growth.exponents(rows)[0]
    assert growth.said(seen) == (
        "train by batch: grows with exponent 1.00 (1.00 to 1.00); memory ends between 4 and 8"
    )


def test_a_point_that_does_not_fit_ends_its_axis(monkeypatch):
    import torch

    def measured(plan, along, x, *_):
        if x == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"along": along, "x": x}

    monkeypatch.setattr(growth, "measured", measured)
    monkeypatch.setattr(growth, "matmul_rate", lambda *_, **__: 1.0)
    axes = list(growth.bench_growth(growth.DRY, torch.device("cpu"), "fp32", 1))
    assert axes[0] == [{"along": "batch", "x": 1, "ends": 2}]
    assert len(axes[1]) == 2
