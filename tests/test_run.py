"""Run: python -m pytest tests/test_run.py -q"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from puna.core import parallel
from puna.core.checkpoint.folder import load_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.data.formats import Columns
from puna.trainers.train.config import load_recipe
from puna.trainers.train.run import Run, Trained, environment, open_start


@dataclass(kw_only=True)
class Config:
    out: Path
    lr: float = 1.0
    seed: int = 0
    columns: Columns = field(default_factory=Columns)


SHAPE = ModelConfig(8, 1, 2, 1, 12, vocab_size=20, context=16)


def network(seed: int, head: str = "lm") -> Trained:
    model = Transformer(SHAPE, head)
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    (model(torch.arange(6)[None]) @ model.head_weight.T).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return Trained(model, optimizer)


def opened(path: Path, **options) -> Run:
    return Run(path, Config(out=path, **options), tokenizer=None)


def test_a_new_folder_says_what_was_asked_and_on_what_machine(tmp_path):
    run = opened(tmp_path / "a" / "run", lr=0.5)
    assert load_recipe(Config, run.path / "config.toml")["lr"] == 0.5
    found = json.loads((run.path / "environment.json").read_text())
    assert found == environment() and found["packages"]["torch"] == torch.__version__
    assert run.latest() is None and not run.done and run.resume_step() == 0


def test_a_folder_of_another_configuration_is_refused_naming_the_keys(tmp_path):
    opened(tmp_path)
    opened(tmp_path, lr=0.5)  # nothing was done in it: it may still become another run
    assert load_recipe(Config, tmp_path / "config.toml")["lr"] == 0.5
    opened(tmp_path, lr=0.5).log(1, loss=1.0)
    opened(tmp_path, lr=0.5)
    with pytest.raises(ValueError, match=r"differs in lr\); give another --out, or remove"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"another configuration \(differs in lr, seed\)"):
        opened(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"differs in text\)"):
        opened(tmp_path, lr=0.5, columns=Columns(text="body"))


def test_a_folder_whose_creation_was_killed_is_taken(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / "config.partial").write_text("lr =")
    assert opened(tmp_path).latest() is None


def test_metrics_are_one_history(tmp_path):
    run = opened(tmp_path)
    for step in range(6):
        run.log(step, loss=float(step))
    run.save(3, {"model": network(0)}, keep=2)
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "lo')  # cut short by a kill
    assert opened(tmp_path).resume_step() == 3
    rows = [json.loads(row) for row in run.metrics.read_text().splitlines()]
    assert rows == [{"step": step, "loss": float(step)} for step in range(4)]


def test_a_run_without_a_checkpoint_starts_its_history_anew(tmp_path):
    run = opened(tmp_path)
    run.log(0, eval_loss=1.0)
    run.log(1, loss=1.0)
    assert opened(tmp_path).resume_step() == 0
    assert run.metrics.read_text() == ""


def test_a_checkpoint_holds_every_network_and_its_optimizer(tmp_path):
    run = opened(tmp_path)
    saved = {"model": network(0), "critic": network(1, "score")}
    run.save(7, saved, keep=1)
    assert run.latest() == tmp_path / "checkpoints" / "step-000007"
    start = tmp_path / "nowhere"
    loaded = {
        "model": parallel.load(open_start(run, start, fresh_head=True), "cpu"),
        "critic": load_model(run.weights(start, "critic")),
    }
    trained = {
        name: Trained(model, torch.optim.AdamW(model.parameters(), fused=True))
        for name, model in loaded.items()
    }
    run.restore_optimizers(trained)
    for name, (model, optimizer) in trained.items():
        before = saved[name]
        for ours, theirs in zip(model.parameters(), before.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            for key, value in before.optimizer.state[theirs].items():
                assert torch.equal(optimizer.state[ours][key], value), key


def test_without_a_checkpoint_weights_come_from_the_start(tmp_path):
    run = opened(tmp_path)
    assert run.weights(Path("start")) == run.weights(Path("start"), "critic") == Path("start")


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(tmp_path):
    run = opened(tmp_path)
    for step in (999_999, 1_000_000, 2_000_000):
        run.save(step, {"model": network(0)}, keep=2)
    assert [p.name for p in run._saved()] == ["step-1000000", "step-2000000"]
    assert run.resume_step() == 2_000_000


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    run = opened(tmp_path)
    run.save(1, {"model": network(0)}, keep=2)
    hidden = run.checkpoints / ".step-000002.partial" / "training"
    hidden.mkdir(parents=True)
    assert run.latest() == run.checkpoints / "step-000001"


def test_a_finished_model_marks_the_run_as_done(tmp_path):
    run = opened(tmp_path)
    trained = network(0)
    assert run.finish(trained.model) == run.final and run.done
    ours = load_model(run.final).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in trained.model.state_dict().items())
