"""Run: python -m pytest tests/test_loop.py -q"""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from puna.core.checkpoint.folder import load_model, open_model
from puna.core.checkpoint.source import fresh
from puna.core.config import ModelConfig
from puna.core.errors import UserError
from puna.core.model import Transformer
from puna.trainers.data.packing import LMBatch
from puna.trainers.train import loop
from puna.trainers.train.loop import HeldOutConfig
from puna.trainers.train.next_token import OBJECTIVE, prepared
from puna.trainers.train.run import open_run

SHAPE = ModelConfig(16, 2, 2, 1, 24, vocab_size=40, context=32)
STEPS = 8


def batch_of(seed: int, rows: int = 2, length: int = 12) -> LMBatch:
    """Random tokens, each row one segment; about a third of the targets count, unequally."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (rows, length), generator=draw)
    targets = torch.randint(40, (rows, length), generator=draw)
    weights = (torch.rand(rows, length, generator=draw) * 3 - 2).clamp(min=0)
    positions = torch.arange(length).expand(rows, length).contiguous()
    return LMBatch(
        tokens, targets, weights, positions, torch.arange(rows + 1, dtype=torch.int32) * length
    )


def batches(step: int) -> list[LMBatch]:
    return [batch_of(2 * step, rows=1), batch_of(2 * step + 1, rows=3)]


def configured(out: Path, **options) -> HeldOutConfig:
    values = {"lr": 1e-2, "warmup_steps": 2, "save_every": 2, "device": "cpu", **options}
    return HeldOutConfig(out=out, **values)


def train(config: HeldOutConfig, batch_at=batches, objective=OBJECTIVE, evaluate=None) -> Path:
    with open_run(config, tokenizer=None) as run:
        source = fresh(SHAPE, 1) if run.checkpoint is None else open_model(run.checkpoint)
        network = prepared(source, config)
        return loop.fit(
            "test", run, network, batch_at, STEPS, objective, config, evaluate, config.eval_every
        )


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    train(configured(out))
    return out


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = load_model(one).state_dict(), load_model(other).state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_losses_are_those_of_a_plain_pytorch_loop(whole):
    model = Transformer(SHAPE)
    model.init_weights(1)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-5,
        foreach=False,
        fused=False,
    )
    for step, row in enumerate(metrics(whole)):
        rate = 1e-2 * (step + 1) / 2
        if step >= 2:
            rate = 1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 3))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, count = torch.zeros(()), 0.0
        for batch in batches(step):
            for tokens, targets, weights in zip(*batch[:3], strict=True):
                logits = model(tokens[None])[0] @ model.lm_head.weight.T
                total = total + (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
                count += float(weights.sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-6), step
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert row["lr"] == pytest.approx(rate) and row["tokens"] == 48
    assert len(metrics(whole)) == STEPS
    finished = dict(load_model(whole / "model").named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(finished[name], parameter, atol=1e-5, rtol=1e-5)


def test_accumulated_micro_batches_of_unequal_weight_are_one_large_batch(whole, tmp_path):
    def large(step):
        parts = batches(step)
        columns = [torch.cat(columns) for columns in list(zip(*parts, strict=True))[:4]]
        return [LMBatch(*columns, cu_seqlens=torch.arange(5, dtype=torch.int32) * 12)]

    train(configured(tmp_path), large)
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("lr", "end"), [(3e-4, 3e-5), (1.5e-4, 1.5e-5)]
)  # paper: 7b and 13b, 34b and 70b
def test_the_schedule_is_the_papers(lr, end):
    config = HeldOutConfig(out=Path(), lr=lr, warmup_steps=2000)
    rates = [loop.learning_rate(step, 500_000, config) for step in range(500_000)]
    assert rates[0] == pytest.approx(lr / 2000) and rates[1999] == rates[2000] == max(rates) == lr
    assert rates[-1] == pytest.approx(end)
    assert rates[2000 + 249_000 - 1] == pytest.approx((lr + end) / 2, rel=1e-4)
    constant = replace(config, schedule="constant", warmup_steps=0)
    assert {loop.learning_rate(step, 9, constant) for step in range(9)} == {lr}


@given(st.integers(1, 60), st.integers(0, 80), st.sampled_from(["cosine", "constant"]))
def test_the_rate_is_never_zero_and_never_above_the_peak(steps, warmup, schedule):
    config = HeldOutConfig(out=Path(), lr=1.0, warmup_steps=warmup, schedule=schedule)
    rates = [loop.learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    after = rates[warmup:]
    assert after == sorted(after, reverse=True) and rates[:warmup] == sorted(rates[:warmup])
    assert all(rate >= 0.1 for rate in after)


def test_weight_decay_leaves_one_dimensional_parameters_alone(tmp_path):
    def nothing(model, batch):
        return 0.0 * sum(p.sum() for p in model.parameters()), {}

    config = configured(tmp_path, lr=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0)
    before = Transformer(SHAPE)
    before.init_weights(1)
    after = load_model(train(config, objective=OBJECTIVE._replace(loss=nothing)))
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        scale = 0.95**STEPS if old.ndim > 1 else 1.0
        torch.testing.assert_close(new, old * scale, msg=name)
    assert sum(p.ndim == 1 for p in before.parameters()) == 5


def test_held_out_numbers_stand_at_the_start_now_and_then_and_at_the_end(tmp_path):
    config = configured(tmp_path, eval_every=3)
    train(config, evaluate=lambda model: {"loss": 1.5, "accuracy": 0.5})
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6, 8]
    assert rows[0] == {"step": 0, "eval_loss": 1.5, "eval_accuracy": 0.5}


def test_only_the_newest_checkpoints_are_kept(whole, tmp_path):
    train(configured(tmp_path, keep=3, save_every=1))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-000005", "step-000006", "step-000007",
    ]  # fmt: skip
    assert len(list((whole / "checkpoints").iterdir())) == 2
    assert same_weights(tmp_path / "model", whole / "model")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 3])
def test_a_stop_saves_and_the_same_command_continues_exactly(whole, tmp_path, number, at):
    def stopped(step):
        if step == at:
            os.kill(os.getpid(), number)
        return batches(step)

    config = configured(tmp_path, save_every=100)
    with pytest.raises(SystemExit, match=f"stopped at step {at + 1}; the same command continues"):
        train(config, stopped)
    assert signal.getsignal(number) is not None and len(metrics(tmp_path)) == at + 1
    final = train(config)
    assert metrics(tmp_path) == metrics(whole)
    assert same_weights(final, whole / "model")


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    def stopped(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        train(configured(tmp_path), stopped)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nan_stops_names_the_step_and_keeps_the_last_good_checkpoint(whole, tmp_path, bad):
    steps = []

    def watched(step):
        steps.append(step)
        return batches(step)

    def broken(model, batch):
        loss, extras = OBJECTIVE.loss(model, batch)
        if steps[-1] == 4:
            root = (model.lm_head.weight - model.lm_head.weight).sum().sqrt()  # 0, gradient inf
            loss = loss * math.nan if bad == "loss" else loss + root
        return loss, extras

    config = configured(tmp_path)
    with pytest.raises(RuntimeError, match=f"the {bad} is (nan|inf) at step 5.*step-000004; look"):
        train(config, watched, OBJECTIVE._replace(loss=broken))
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    kept = load_model(tmp_path / "checkpoints" / "step-000004")
    assert all(p.isfinite().all() for p in kept.parameters())
    train(config)
    assert metrics(tmp_path) == metrics(whole)


def test_the_advice_after_nan_works(tmp_path):
    """A lower learning rate from the last good checkpoint on, and the step is on record."""

    config = configured(tmp_path)
    with pytest.raises(UserError, match="--amend and a lower lr"):
        train(config, objective=OBJECTIVE._replace(loss=nan_at_step_5(tmp_path)))
    final = train(replace(config, lr=5e-3, amend=True))
    rates = [row["lr"] for row in metrics(tmp_path)]
    assert len(rates) == STEPS and max(rates[4:]) < 5e-3 < max(rates[:4]) and final.is_dir()
    assert json.loads((tmp_path / "amendments.jsonl").read_text())["after_step"] == 4


def nan_at_step_5(out: Path):
    def loss(model, batch):
        summed, extras = OBJECTIVE.loss(model, batch)
        logged = out / "metrics.jsonl"
        done = len(metrics(out)) if logged.exists() else 0
        return summed * (math.nan if done == 4 else 1.0), extras

    return loss


def test_nan_before_any_checkpoint_says_so(tmp_path):
    def broken(model, batch):
        return OBJECTIVE.loss(model, batch)[0] * math.nan, {}

    with pytest.raises(RuntimeError, match="loss is nan at step 1; no checkpoint was due yet"):
        train(configured(tmp_path), objective=OBJECTIVE._replace(loss=broken))


FULL = """
import importlib.util, resource, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_loop", sys.argv[1])
test_loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_loop)

def batch_at(step):
    if step == 4:  # the checkpoint of step 4 is whole, that of step 6 finds no room
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    return test_loop.batches(step)

try:
    test_loop.train(test_loop.configured(Path(sys.argv[2])), batch_at)
except OSError as error:
    sys.exit(f"OSError: {error}")
"""


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_afterwards(whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", FULL, __file__, str(out)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 1
    assert "OSError: the disk is full:" in result.stderr and "step-000006" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    final = train(configured(out))
    assert metrics(out) == metrics(whole) and same_weights(final, whole / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 0}, "save_every is 0; it must be at least 1"),
        ({"keep": 0}, "keep is 0; it must be at least 1"),
        ({"eval_every": -1}, "eval_every is -1; it must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1; it cannot be negative"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": math.nan}, "lr is nan; it must be a finite number"),
        ({"clip": -1.0}, "clip is -1.0; it must be above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        configured(tmp_path, **options)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loop.device_of_name("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device cuda:1 was asked for, but no GPU is visible"):
        loop.device_of_name("cuda:1")
