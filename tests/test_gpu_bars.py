"""The bars of a GPU, on both sides of each. Run: python -m pytest tests/test_gpu_bars.py -q"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from puna.benchmarks.gpu import bars as judge


def kernel(operation, shape, direction, value, limit=100.0, ms=1.0, provider="puna", **further):
    row = {
        "bench": "kernel", "operation": operation, "direction": direction, "shape": shape,
        "dtype": "bf16", "provider": provider, "value": value, "p20": value, "p80": value,
        "limit": limit, "ms": ms, "peak_mb": 0.0, "failed": None,
    }  # fmt: skip
    return row | further


def two(operation, shape, forward, backward, parts, **further):
    """Rows of forward and of both, of which the backward alone reaches a share of 100: it is
    `parts` times the forward's work."""
    work = 1.0  # of the forward, in its unit times milliseconds
    ms = work / forward + parts * work / backward
    rate = (1 + parts) * work / ms
    return [
        kernel(operation, shape, "forward", forward, ms=work / forward, **further),
        kernel(operation, shape, "forward+backward", rate, ms=ms, **further),
    ]


def model(bench, value, limit=100.0, shape="7b", provider="puna", **further):
    row = {"bench": bench, "shape": shape, "batch": 2, "dtype": "bf16", "provider": provider}
    return row | {"value": value, "p20": value, "p80": value, "limit": limit} | further


def good():
    """Rows of a GPU that meets every bar; gpu and rows made up."""
    rows = []
    for operation in judge.MEMORY:
        for width in judge.WIDTHS:
            shape = f"8192x{width}"
            rows += two(operation, shape, 91.0, 81.0, 1.5)
            rows += two(operation, shape, 80.0, 70.0, 1.5, provider="torch-compiled")
    for shape in judge.ATTENTION:
        rows += two("attention", shape, 61.0, 46.0, 2.5)
        rows += two("attention", shape, 58.0, 40.0, 2.5, provider="flash-attn")
    for operation in judge.LOSSES:
        for vocabulary in judge.VOCABULARIES:
            shape = f"8192x4096x{vocabulary}"
            held = 2 * 4096 * (8192 + vocabulary) / 1e6 + 299
            rows.append(kernel(operation, shape, "forward", 81.0))
            rows.append(kernel(operation, shape, "forward+backward", 81.0, peak_mb=held))
    rows += [
        model("train", 56.0),
        model("train", 12_600.0, provider="puna-recompute"),
        model("generate", 86.0, batch=1),
        model("generate", 61.0, batch=64),
        model("rollout", 5000.0),
        *(model("rlhf", 90.0, operation=part) for part in ("iteration", "sampling", "scoring")),
        *(model("rlhf", 90.0, operation=part, share=0.2) for part in ("reference", "update")),
        {"bench": "first call", "operation": "swiglu", "seconds": 2.9, "further": []},
        {"bench": "first call", "operation": "gae", "seconds": 0.5, "further": []},
    ]
    return rows


def bars(rows, gpu="Made-up H200"):
    return judge.bars([{"machine": {"gpu": gpu}, "rows": rows}])


def test_a_good_gpu_meets_every_bar():
    found = bars(good())
    assert [bar for bar in found if bar.met is False] == []
    judged = [bar for bar in found if bar.wanted != "a figure"]
    assert all(bar.met for bar in judged) and len(judged) == 58
    assert all(bar.measured != "not measured" for bar in found)


def test_what_was_not_measured_is_said_of_every_bar():
    found = bars([])
    assert len(found) == len(bars(good()))
    assert {(bar.measured, bar.met) for bar in found} == {("not measured", None)}


def changed(rows, match, **values):
    return [row | values if match.items() <= row.items() else row for row in rows]


@pytest.mark.parametrize(
    ("bar", "match", "values", "met"),
    [
        (
            "rope 8192x4096 forward",
            {"operation": "rope", "direction": "forward"},
            {"value": 89.9},
            False,
        ),
        (
            "attention 2x4096 32/32x128 forward",
            {"operation": "attention", "direction": "forward"},
            {"value": 59.9},
            False,
        ),
        (
            "linear_logprobs 8192x4096x32000 forward",
            {"operation": "linear_logprobs"},
            {"value": 80.0},
            True,
        ),
        (
            "linear_logprobs 8192x4096x32000 forward",
            {"operation": "linear_logprobs"},
            {"value": 79.9},
            False,
        ),
        (
            "linear_cross_entropy 8192x4096x32000 memory",
            {"operation": "linear_cross_entropy"},
            {"peak_mb": 640.0},
            False,
        ),
        ("train 7b, 4,096 tokens a row", {"bench": "train"}, {"value": 54.9}, False),
        (
            "train 7b, full recomputation",
            {"provider": "puna-recompute"},
            {"value": 12_499.0},
            False,
        ),
        (
            "train 7b, full recomputation",
            {"provider": "puna-recompute"},
            {"shape": "7b cut to 9 of 32"},
            None,
        ),
        ("generate 7b, 1 at once", {"bench": "generate"}, {"value": 84.9}, False),
        ("generate 7b, 64 at once", {"bench": "generate"}, {"value": 60.0}, True),
        ("first call to any kernel", {"operation": "gae"}, {"seconds": 3.1}, False),
        ("calls of other lengths", {"operation": "gae"}, {"further": ["gae_scan_kernel"]}, False),
    ],
)
def test_each_bar_on_its_other_side(bar, match, values, met):
    (found,) = [each for each in bars(changed(good(), match, **values)) if each.name == bar]
    assert found.met is met, found


@pytest.mark.parametrize(("share", "met"), [(80.1, True), (79.9, False)])
def test_the_backward_is_what_the_forward_leaves(share, met):
    rows = two("swiglu", "8192x4096", 99.0, share, 1.7)
    (found,) = [each for each in bars(rows) if each.name == "swiglu 8192x4096 backward"]
    assert found.measured == f"{share}%" and found.met is met


@pytest.mark.parametrize(
    ("ours", "met"), [({"value": 58.0, "p80": 58.0}, False), ({"value": 79.0, "p80": 80.5}, True)]
)
def test_slower_than_a_peer_beyond_the_noise(ours, met):
    rows = changed(good(), {"operation": "rms_norm", "provider": "puna"}, **ours)
    (found,) = [b for b in bars(rows) if b.name.startswith("rms_norm 8192x4096 beside")]
    assert found.met is met and "torch-compiled" in found.measured
    assert found.operation == "rms_norm"


def test_an_h100_is_not_held_to_what_an_h200_should_do():
    (found,) = [b for b in bars(good(), "Made-up H100") if "recomputation" in b.name]
    assert found.met is None and found.measured == "12,600 tok/s (7b, Made-up H100)"


def test_a_row_that_was_wrong_or_of_tiny_models_is_none():
    rows = changed(good(), {"bench": "kernel"}, value=None)
    rows = changed(rows, {"shape": "7b"}, shape="7b (dry run)")
    rows = changed(rows, {"bench": "first call"}, bench="first call (dry run)")
    assert {bar.measured for bar in bars(rows)} == {"not measured"}


def test_the_later_row_counts_and_logs_are_read(tmp_path):
    documents = [{"machine": {"gpu": "x"}, "rows": [model("train", v)]} for v in (50.0, 60.0)]
    (tmp_path / "a.log").write_text("words\n" + json.dumps(documents[0]) + "\nand an error\n")
    (tmp_path / "b.json").write_text(json.dumps(documents[1]))
    (tmp_path / "summary.json").write_text("{}")
    torn = json.dumps(documents[1])[:40]  # by a kill
    (tmp_path / "c.log").write_text(torn)
    (tmp_path / "a.log").write_text((tmp_path / "a.log").read_text() + torn)
    for number, name in enumerate(("a.log", "b.json")):
        os.utime(tmp_path / name, (number, number))
    assert judge.documents(tmp_path) == documents
    command = [sys.executable, "-m", "puna.benchmarks.gpu.bars", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "60.0%" in done.stdout and "50.0%" not in done.stdout
    with pytest.raises(ValueError, match="is no folder"):
        judge.documents(tmp_path / "none")
