"""A run of the suite as parts: one that fails, takes too long or is stopped loses only itself.

Run: python -m pytest tests/test_bench_parts.py -q
"""

import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from puna.benchmarks import budget, machine, output, suite, timing
from puna.benchmarks.models import busy, decode, generate, rlhf, shapes
from puna.benchmarks.models.shapes import Shape, open_models
from puna.benchmarks.parts import Part, measure
from puna.cli.main import main
from puna.core.checkpoint.folder import save_model
from puna.core.config import ModelConfig, parameter_count
from puna.core.model import Transformer

CPU = torch.device("cpu")
TINY = ModelConfig(32, 3, 4, 2, 48, 64, context=64)


def raising(error):
    def rows():
        yield [f"before {type(error).__name__}"]
        raise error

    return rows


def test_what_was_measured_before_a_failure_is_kept():
    said = []
    parts = [
        Part("a", raising(ValueError("no such thing"))),
        Part("b", raising(torch.OutOfMemoryError("CUDA out of memory"))),
        Part("c", lambda: [["c"]]),
        Part("d", raising(KeyboardInterrupt())),
        Part("e", lambda: [["never"]]),
    ]
    found = measure(parts, said.append)
    kept = ["before ValueError", "before OutOfMemoryError", "c", "before KeyboardInterrupt"]
    assert found.rows == kept and found.stopped
    assert isinstance(found.error, ValueError)
    assert [line.split(":")[0] for line in found.left_out] == ["a", "b, or a part of it", "d, e"]
    assert all(f"left out: {line}" in said for line in found.left_out)


def test_a_part_that_does_not_end_is_ended_by_the_clock():
    def endless():
        yield ["one"]
        while True:
            time.sleep(0.01)

    found = measure([Part("slow", endless), Part("next", lambda: [["two"]])], str, 4.0)
    assert found.rows[0] == "one" and len(found.left_out) == 1 + ("two" not in found.rows)


def test_no_part_begins_when_the_time_is_over():
    found = measure([Part("late", lambda: [["never"]])], str, 1.0)
    assert found.rows == [] and found.left_out == ["late: the 1 seconds are over"]


def test_fewer_rounds_where_time_is_short():
    calls = []
    with budget.at_most(soft=0, hard=60):
        found = timing.interleaved({"a": lambda: calls.append(1)}, rounds=50, device=CPU)
    assert len(calls) == 2 and found["a"].median > 0
    assert not budget.is_spent() and budget.seconds_left() is None


def test_a_round_that_the_clock_ends_does_not_take_the_others_with_it():
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 4:
            raise budget.OutOfTime

    assert timing.interleaved({"a": call}, rounds=9, device=CPU)["a"].median > 0
    assert len(calls) == 4
    with pytest.raises(budget.OutOfTime):
        timing.interleaved({"a": call, "b": raising_call}, rounds=9, device=CPU)


def raising_call():
    raise budget.OutOfTime


def test_the_age_of_a_process():
    code = "import time; from puna.benchmarks import budget; a = budget.process_age(); "
    code += "time.sleep(0.3); print(a, budget.process_age())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    young, old = map(float, printed.stdout.split())
    assert 0.25 < old - young < 30 and 0 <= young < 300


@pytest.fixture
def folder(tmp_path):
    """A model's folder, trained by nobody."""
    model = Transformer(TINY)
    model.init_weights(seed=5)
    save_model(tmp_path / "mine", model)
    return tmp_path / "mine"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    for name, value in (("PROMPT", 4), ("NEW", 6)):
        monkeypatch.setattr(generate, name, value)
    monkeypatch.setattr(suite, "BATCHES", (2,))


def test_a_folder_is_a_shape_and_its_weights_are_used(folder, tmp_path):
    shape = Shape(str(folder), 2)
    assert str(shape) == "mine cut to 2 of 3" and shape.config.n_layers == 2
    models = open_models(shape, tmp_path / "opened", CPU, peers=False)
    whole = Transformer(TINY)
    whole.init_weights(seed=5)
    wanted = dict(whole.named_parameters())
    for name, parameter in models.puna.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_nothing_is_saved_that_nobody_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    open_models(Shape("mini"), tmp_path / "alone", CPU, peers=False, engines=True)
    monkeypatch.setattr(shapes, "installed", lambda package: None)
    monkeypatch.setattr(shapes, "has", lambda name: False)
    open_models(Shape("mini"), tmp_path / "no peer", CPU, engines=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shapes, "has", lambda name: name == "vllm")
    open_models(Shape("mini"), tmp_path / "vllm", CPU, engines=True)
    assert [path.name for path in tmp_path.iterdir()] == ["vllm"]


def test_what_ppo_samples_with_on_a_gpu_fits_beside_what_will_be_there(monkeypatch):
    """80 GB hold 7 of 7B's blocks as they are measured: 256 answers are continued at once."""
    config, answer = Shape("7b", 7).config, 2 * 256
    count, memory = parameter_count(config), 80 * 2**30
    opened = memory - (2 * 4 + 3 * 2) * count
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (opened, memory))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: defaultdict(int))
    found = rlhf.sampling_room(config, torch.device("cuda"), torch.bfloat16, 256)
    assert 256 * 2 * 7 * 4096 * 2 * answer < found < memory - (rlhf.BYTES - 8) * count
    ppo = SimpleNamespace(generation_batch=256, limits=lambda: {"cache_bytes": found})
    assert rlhf.side_by_side(ppo, config, rlhf.GPU, torch.bfloat16) == 256
    few = SimpleNamespace(generation_batch=256, limits=lambda: {"cache_bytes": found // 16})
    assert rlhf.side_by_side(few, config, rlhf.GPU, torch.bfloat16) < 64


def test_bf16_weights_on_the_cpu(short, folder, capsys):
    pytest.importorskip("transformers")
    flags = ["--shape", str(folder), "--dtype", "bf16", "--rounds", "1", "--device", "cpu"]
    assert main(["bench", "generate", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["shape"], row["dtype"], row["provider"]) for row in found["rows"]]
    assert rows == [("mine", "bf16", "puna"), ("mine", "bf16", "transformers")]
    command = "puna bench generate --rounds 1 --device cpu --shape mine --dtype bf16"
    assert found["command"] == command


def test_ctrl_c_keeps_what_was_measured(short, folder, capsys, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(suite.BENCHES, "decode", stopped)
    flags = ["--shape", str(folder), "--rounds", "1", "--device", "cpu", "--no-peers", "--save"]
    assert main(["bench", *flags]) == 130
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert [row["bench"] for row in found["rows"]] == ["generate"]
    assert "stopped by ctrl-C" in found["left_out"][-1]
    assert captured.err == "puna bench: interrupted\n"
    (written,) = (tmp_path / "results").rglob("*.json")
    assert written.name == "all-stopped.json" and json.loads(written.read_text()) == found


def test_an_iteration_of_ppo_in_its_parts(folder, monkeypatch):
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    monkeypatch.setattr(rlhf, "CPU", rlhf.DRY)
    rows = rlhf.bench_rlhf(Shape(str(folder)), CPU, "fp32", rounds=2, gpu=False)
    whole, *parts = rows
    assert [row["operation"] for row in rows] == ["iteration", *rlhf.PARTS]
    assert math.isclose(sum(row["share"] for row in parts), 1)
    tokens = rlhf.DRY.batch * rlhf.DRY.new
    for row in rows:
        assert row["value"] == pytest.approx(tokens / row["seconds"])
        assert row["error"] < 1e-5
    assert 1 / whole["limit"] == pytest.approx(sum(1 / row["limit"] for row in parts))


def test_a_sampler_that_disagrees_with_the_trainer_is_not_timed(folder, monkeypatch):
    real = rlhf.collect

    def wrong(*args, **options):
        found = real(*args, **options)
        return found._replace(logprobs=found.logprobs - 0.5)

    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    monkeypatch.setattr(rlhf, "CPU", rlhf.DRY)
    monkeypatch.setattr(rlhf, "collect", wrong)
    with pytest.raises(RuntimeError, match="nothing was timed: sampling and training are 5.0e-01"):
        rlhf.bench_rlhf(Shape(str(folder)), CPU, "fp32", rounds=1, gpu=False)


def test_the_card_of_a_gpu(tmp_path, monkeypatch):
    asked = tmp_path / "nvidia-smi"
    asked.write_text("#!/bin/sh\necho '570.1, 81559 MiB, 1980 MHz, 2619 MHz, 700.00 W'\n")
    asked.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = machine._gpu(0)
    assert (found["driver"], found["power_limit"]) == ("570.1", "700.00 W")
    asked.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert machine._gpu(0) == {}
    asked.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._gpu(0) == {}


def test_memory_that_is_full_everywhere_is_an_error():
    def full():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    found = measure([Part("train 70b", full)], str)
    said = "nothing was measured: train 70b, or a part of it: it does not fit the memory"
    assert isinstance(found.error, RuntimeError) and str(found.error) == said


def test_a_peer_that_breaks_when_it_is_opened(folder, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise AttributeError("module 'torch' has no attribute 'x'")

    monkeypatch.setattr(shapes, "installed", lambda package: "5.0")
    monkeypatch.setattr(shapes, "open_transformers", broken)
    models = open_models(Shape(str(folder)), tmp_path / "opened", CPU)
    assert models.transformers is None
    assert "transformers is installed and does not work here" in capsys.readouterr().out


def test_torchrun_is_for_several_ranks_only(folder, monkeypatch):
    monkeypatch.setattr(suite.parallel, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="several processes are measured by `puna bench fsdp`"):
        suite.run_suite("train", suite.Setting(CPU, shapes=[str(folder)]), command="")


def test_quick_has_a_part_of_everything(folder):
    setting = suite.Setting(CPU, quick=True, shapes=[str(folder)])
    names = [each.name for each in suite.parts("all", setting, setting.opened_shapes(), str)]
    models = ("generate", "decode", "rollout", "rlhf", "fsdp", "train")
    assert names == ["kernels", *(f"{name} mine" for name in models), "growth"]
    full = suite.parts("all", setting._replace(quick=False), setting.opened_shapes(), str)
    assert [each.name.split()[0] for each in full] == [
        "generate",
        "decode",
        "rlhf",
        "fsdp",
        "train",
    ]


def test_answers_end_with_the_context_and_no_more_is_counted(folder, tmp_path):
    """TINY's context is 64, and 240 and more tokens are written where there is room."""
    pytest.importorskip("transformers")
    models = open_models(Shape(str(folder)), tmp_path / "opened", CPU, engines=False)
    prompts = torch.randint(TINY.vocab_size, (2, generate.PROMPT))
    for answer in (generate.puna_answer, generate.transformers_answer):
        assert {len(ids) for ids in answer(models, prompts)()} == {64 - generate.PROMPT}
    assert generate.new_tokens(TINY) == 64 - generate.PROMPT
    assert decode.new_tokens(models, 1) == decode.new_tokens(models, 32) == 63


def test_the_fair_share_beside_busy_neighbours(short, folder, capsys, monkeypatch):
    monkeypatch.setattr(busy, "taken", lambda call, rounds: ([0.5, 0.25, 1.0], [1.0, 0.5, 2.0]))
    assert main(["bench", "busy", "--shape", str(folder), "--no-peers"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["bench"], row["operation"]) for row in rows] == [
        ("busy", "decoding"),
        ("busy", "training"),
    ]
    assert all(row["value"] == pytest.approx(row["limit"]) for row in rows)  # twice the time


def test_alone_and_beside_in_turn(monkeypatch):
    happened: list[str] = []

    @contextmanager
    def noted(count: int):
        happened.append(f"{count} come")
        yield
        happened.append("they go")

    monkeypatch.setattr(busy, "SECONDS", 0.0)
    monkeypatch.setattr(busy, "neighbours", noted)
    alone, beside = busy.taken(lambda: happened.append("call"), 2)
    assert len(alone) == len(beside) == 2
    assert happened == ["call", f"{torch.get_num_threads()} come", "call", "they go"] * 3


def test_neighbours_compute_and_end():
    before = children()  # other tests' that are not collected yet
    with busy.neighbours(2):
        running = children() - before
        assert len(running) == 2
    assert not children() & running


def children() -> set[int]:
    """The processes that were started from here and are there still."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True)
    return {int(pid) for pid in found.stdout.split()[:-1]}  # the last is ps itself
