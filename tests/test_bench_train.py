"""The training bench: its peers, what its matrix products allow, its memory."""

import dataclasses
import functools

import pytest
import torch

from puna.benchmarks.models import ceilings, step_memory, steps, train
from puna.benchmarks.models.shapes import Shape, multiplied_parameters, open_models
from puna.core.config import SIZES, ModelConfig, parameter_count

CPU = torch.device("cpu")
TINY = ModelConfig(64, 2, 4, 2, 96, 128, context=64)


def test_the_compiled_peer_trains_beside_the_others(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    compiled = functools.partial(torch.compile, backend="eager")  # needs no compiler
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(train, "BATCH", {"tiny": 2})
    monkeypatch.setattr(train, "TOKENS", 32)
    monkeypatch.setattr(train, "fresh_peak_mb", lambda *_: None)
    monkeypatch.setattr(steps, "compiles", lambda device: True)
    found = train.bench_train(open_models(Shape("tiny"), tmp_path, CPU), 1, "fp32")
    names = [row["provider"] for row in found]
    assert names == ["puna", "transformers", "transformers-compiled"]
    assert all(row["error"] <= train.TOLERANCE["fp32"] for row in found)


def test_without_a_compiler_this_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(steps, "why_not_compiled", lambda device: "no g++")
    steps.compiles.cache_clear()
    assert not steps.compiles(CPU) and not steps.compiles(CPU)
    steps.compiles.cache_clear()
    said = "torch.compile does not work here, its rows are left out: no g++\n"
    assert capsys.readouterr().out == said


def timed(*seconds):
    return ceilings.Products(*(ceilings.Product(each, print) for each in seconds))


def all_seconds(config, batch, tokens):
    found = ceilings.ceiling(config, batch, tokens, CPU)
    return ceilings.seconds_of(found.products) * (1 + found.attention)


def test_at_one_rate_the_products_are_six_flops_a_parameter(monkeypatch):
    def at_one_gflops(rows, outputs, inputs, device):
        return timed(*[2 * rows * outputs * inputs / 1e9] * 3)

    monkeypatch.setattr(ceilings, "products", at_one_gflops)
    seconds = all_seconds(TINY, 2, 32)
    attention = 6 * TINY.n_layers * 32 * TINY.dim
    assert seconds == pytest.approx(64 * (6 * multiplied_parameters(TINY) + attention) / 1e9)


def test_the_fastest_way_counts(monkeypatch):
    config = dataclasses.replace(TINY, vocab_size=100)

    def products(rows, outputs, inputs, device):
        if outputs == config.vocab_size:  # the head: d input wants chunks, the others do not
            return timed(rows, rows * 0.5 if rows == 256 else rows, rows)
        wanted = outputs == 64 + 2 * 32  # q, k, v joined; all others one by one
        return timed(*[1.0 if wanted or outputs in (64, 96) else 50.0] * 3)

    monkeypatch.setattr(ceilings, "products", products)
    head = ceilings.seconds_of(ceilings.head_products(config, 512, CPU))
    assert head == pytest.approx(512 * 2.5)
    # q, k, v 3 s joined; o 3 s; gate and up 3 s each; down 3 s; two blocks.
    blocks = 2 * (3 + 3 + 6 + 3)
    attention = 6 * config.n_layers * 512 * 256 * 64 / (6 * 512 * 128 * 64 / 3)
    seconds = all_seconds(config, 2, 256)
    assert seconds == pytest.approx(512 * 2.5 + blocks + attention)


def test_products_are_measured():
    found = ceilings.products(8, 16, 4, device=CPU)
    assert all(0 < product.seconds < 1 for product in found)
    x, weight = found.forward.call.args[0], found.d_input.call.args[1]
    assert torch.allclose(found.forward.call(), x @ weight.T, atol=1e-5)


def test_a_ceiling_runs_every_product_as_often_as_the_step():
    calls = []
    product = ceilings.Product(1.0, lambda: calls.append(1))
    ceilings.Ceiling([(3, product), (2, product)], 0.1).run()
    assert len(calls) == 5


def test_memory_of_training_in_a_fresh_process():
    """Weights, gradients and AdamW's two moments are counted, the libraries are not."""
    found = step_memory.fresh_peak_mb("puna", Shape("demo"), batch=1, tokens=8)
    if found is None:
        pytest.skip("this system does not tell a process its memory")
    held = 16 * parameter_count(SIZES["demo"]) / 1e6
    assert held < found < held + 100


def test_the_peer_whose_memory_is_measured_does_the_same_work():
    pytest.importorskip("transformers")
    tokens = torch.randint(TINY.vocab_size, (2, 8))
    losses = {}
    for provider in ("puna", "transformers"):
        torch.manual_seed(0)
        step = step_memory.builder(provider)(TINY, tokens)
        losses[provider] = [step() for _ in range(3)]
        assert losses[provider] == sorted(losses[provider], reverse=True)  # it learns
    assert losses["puna"][0] == pytest.approx(losses["transformers"][0], rel=0.1)  # log V
