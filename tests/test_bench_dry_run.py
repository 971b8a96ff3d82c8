"""A GPU's rows on a CPU: the first run on a GPU is not the first run of the code.

Run: python -m pytest tests/test_bench_dry_run.py -q
"""

import functools
import gc
import json
import weakref

import pytest
import torch

from puna import kernels
from puna.benchmarks import machine, suite
from puna.benchmarks.kernels import run as kernel_run
from puna.benchmarks.models import fsdp, generate, growth, rollout, steps, train
from puna.benchmarks.models.shapes import Shape, blocks_that_fit, multiplied_parameters
from puna.cli.main import main
from puna.core.config import SIZES, parameter_count


@pytest.fixture
def small(monkeypatch):
    """Short rounds; compiled peers without a compiler."""
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    for name, value in (("PROMPT", 4), ("NEW", 6)):
        monkeypatch.setattr(generate, name, value)
    for name, value in (("PROMPT", 4), ("PROMPTS", 5), ("GPU_SLOTS", 2), ("GPU_MEAN", 4)):
        monkeypatch.setattr(rollout, name, value)
    monkeypatch.setattr(steps, "compiles", lambda device: True)
    monkeypatch.setattr(kernel_run, "why_not_compiled", lambda device: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def document(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_row_of_a_gpu(small, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(suite, "ALL", [name for name in suite.ALL if name != "kernels"])
    monkeypatch.setattr(fsdp, "rank_counts", lambda device: [2])
    assert main(["bench", "--dry-run", "--rounds", "1"]) == 0
    rows = document(capsys)["rows"]
    done = [(row["bench"], row["batch"], row["provider"]) for row in rows]
    both = ("puna", "transformers")
    assert done == [
        *(("generate", batch, name) for batch in generate.GPU_BATCHES for name in both),
        *(("rollout", 2, name) for name in ("puna", "puna-no-refill")),
        *[("rlhf", 4, "puna")] * 5,
        ("fsdp", 8, "puna"),
        ("fsdp", 8, "puna-replicated"),
        ("fsdp", 16, "puna"),
        ("fsdp", 16, "puna-unsharded"),
        *(
            ("train", train.GPU_BATCH, name)
            for name in ("puna", "puna-recompute", "transformers", "transformers-compiled")
        ),
    ]
    assert {row["dtype"] for row in rows} == {"bf16"}
    assert {row["shape"] for row in rows} == {"7b (dry run)"}
    assert all(row["value"] > 0 and row["limit"] > 0 for row in rows)


def test_every_kernel_of_a_gpu(small, capsys):
    assert main(["bench", "kernels", "--dry-run", "--rounds", "1"]) == 0
    rows = document(capsys)["rows"]
    public = {name for name in vars(kernels) if callable(getattr(kernels, name))}
    assert {row["operation"] for row in rows} == public - {"rope_tables", "use_backend"}
    assert "torch-compiled" in {row["provider"] for row in rows}
    assert all(row["failed"] is None for row in rows), [row["failed"] for row in rows]


def test_every_axis_of_growth(small, capsys):
    assert main(["bench", "growth", "--dry-run", "--rounds", "1"]) == 0
    found = document(capsys)
    points = [(row["along"], row["x"]) for row in found["rows"]]
    assert points == [(along, x) for along, xs in growth.DRY.axes.items() for x in xs]
    assert all(row["value"] > 0 and row["needs_mb"] > 0 for row in found["rows"])
    assert "growth" not in found  # two points fit any exponent


@pytest.mark.parametrize("size", sorted(set(SIZES) - {"mini", "micro"}))
def test_a_tiny_model_has_the_groups_of_the_large_one(size):
    whole, tiny = SIZES[size], Shape(size, tiny=True).config
    assert whole.n_heads // whole.n_kv_heads == tiny.n_heads // tiny.n_kv_heads
    assert parameter_count(tiny) < 300_000 and str(Shape(size, tiny=True)) == f"{size} (dry run)"


def test_a_cut_model_says_so_and_is_no_more_than_asked_for():
    shape = Shape("7b", 4)
    assert str(shape) == "7b cut to 4 of 32" and shape.config.n_layers == 4
    assert str(Shape("7b")) == str(Shape("7b", 32)) == "7b"
    with pytest.raises(ValueError, match="layers is 33 and 7b has 32 blocks"):
        assert Shape("7b", 33).config
    with pytest.raises(ValueError, match="unknown model size '8b'"):
        assert Shape("8b").config


@pytest.mark.parametrize("gigabytes", [48, 80, 141, 2000])
@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_as_many_blocks_as_fit(size, gigabytes):
    layers = blocks_that_fit(Shape(size), gigabytes * 10**9, 16)
    held = 16 * parameter_count(Shape(size, layers).config)
    assert held <= 0.8 * gigabytes * 10**9
    if 0 < layers:
        more = Shape(size, layers + 1).config
        assert 16 * parameter_count(more) > 0.8 * gigabytes * 10**9


def test_a_model_that_does_not_fit_is_said():
    with pytest.raises(ValueError, match="not even one block of 70b fits 8 GB"):
        blocks_that_fit(Shape("70b"), 8 * 10**9, 16)


def test_flops_are_palms():
    config = SIZES["7b"]
    assert train.flops(config, 4096) == pytest.approx(
        6 * multiplied_parameters(config) + 12 * 32 * 4096 * 4096
    )
    assert train.flops(config, 4096) == pytest.approx(46.1e9, rel=0.01)  # a token of Llama 2 7B


def test_without_peers(small, capsys):
    assert main(["bench", "train", "--dry-run", "--rounds", "1", "--no-peers"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [row["provider"] for row in rows] == ["puna", "puna-recompute"]
    assert "GFLOPs a token by 6 N + 12 L d S (recomputation not counted)" in printed


def test_a_shape_on_the_cpu(small, capsys, monkeypatch):
    monkeypatch.setattr(train, "fresh_peak_mb", lambda *_: None)
    monkeypatch.setattr(train, "TOKENS", 8)
    flags = ["--shape", "mini", "--layers", "2", "--no-peers", "--rounds", "1"]
    assert main(["bench", "train", *flags]) == 0
    (row,) = document(capsys)["rows"]
    assert (row["shape"], row["dtype"], row["batch"]) == ("mini cut to 2 of 4", "fp32", 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["bench", "--dry-run", "--save"], "leave out --save"),
        (["bench", "kernels", "--dry-run", "--device", "cuda"], "use --device cpu"),
        (["bench", "decode", "--dry-run"], "without --dry-run"),
        (["bench", "train", "--dry-run", "--layers", "2"], "leave out --layers"),
        (
            ["bench", "decode", "--no-peers", "--llama2c", "run"],
            "are peers: leave out --llama2c and",
        ),
        (["bench", "train", "--shape", "8b"], "unknown model size '8b'"),
        (["bench", "train", "--shape", "demo", "--layers", "7"], "layers is 7 and demo has 6"),
    ],
)
def test_what_cannot_be_measured_is_said(flags, said, capsys):
    assert main(flags) == 1
    assert said in capsys.readouterr().err


def test_what_generated_is_gone_before_what_trains_is_opened(small, monkeypatch):
    """A GPU has no room for both."""
    alive, opening = weakref.WeakSet(), suite.open_models

    def watched(*args, **options):
        gc.collect()
        assert not alive
        found = opening(*args, **options)
        alive.add(found.puna)
        return found

    monkeypatch.setattr(suite, "open_models", watched)
    monkeypatch.setattr(suite, "ALL", ("generate", "train"))
    assert main(["bench", "--dry-run", "--rounds", "1", "--no-peers"]) == 0
