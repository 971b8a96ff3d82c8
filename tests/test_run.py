"""Run: python -m pytest tests/test_run.py -q"""

import json
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.core import parallel
from puna.core.checkpoint.folder import load_model
from puna.core.checkpoint.hashes import digest, write_hashes
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.data.formats import Columns
from puna.trainers.train.config import load_recipe
from puna.trainers.train.environment import environment
from puna.trainers.train.kinds import FIXED, FREE
from puna.trainers.train.run import Run, Trained, open_run, saved
from puna.trainers.train.starting import open_start
from puna.trainers.train.state import PROOF


@dataclass(kw_only=True)
class Config:
    out: Path
    data: list[Path] = field(default_factory=list)
    lr: float = 1.0
    seed: int = 0
    save_every: Annotated[int, FREE] = 5
    size: Annotated[str, FIXED] = "mini"
    columns: Columns = field(default_factory=Columns)
    amend: Annotated[bool, FREE] = False
    resume: Annotated[Literal["newest", "previous"], FREE] = "newest"


SHAPE = ModelConfig(8, 1, 2, 1, 12, vocab_size=20, context=16)


def network(seed: int, head: str = "lm") -> Trained:
    model = Transformer(SHAPE, head)
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    (model(torch.arange(6)[None]) @ model.head_weight.T).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return Trained(model, optimizer)


Opened = Callable[..., Run]


@pytest.fixture
def opened():
    """Opens a run as a process of its own would: the one opened before has ended."""
    before = ExitStack()

    def open_one(path: Path, given=None, **options) -> Run:
        before.close()
        config = Config(out=path, **options)
        return before.enter_context(open_run(config, tokenizer=None, given=given))

    with before:
        yield open_one


def test_a_new_folder_says_what_was_asked_and_on_what_machine(tmp_path, opened: Opened):
    run = opened(tmp_path / "a" / "run", lr=0.5)
    assert load_recipe(Config, run.path / "config.toml")["lr"] == 0.5
    found = json.loads((run.path / "environment.json").read_text())
    assert found == {"stage": "", **environment()}
    assert found["packages"]["torch"] == torch.__version__
    assert run.checkpoint is None and not run.done and run.resume_step() == 0


def test_only_what_decides_the_numbers_must_stay(tmp_path, opened: Opened, capsys):
    opened(tmp_path)
    opened(tmp_path, lr=0.5)  # nothing was done in it: it may still become another run
    assert load_recipe(Config, tmp_path / "config.toml")["lr"] == 0.5
    opened(tmp_path, lr=0.5).log(1, loss=1.0)
    opened(tmp_path, lr=0.5)
    with pytest.raises(
        ValueError, match=r"other terms \(lr 1.0 where it was 0.5\); go on .*--amend"
    ):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"lr 1.0 .*; seed 1 where it was 0"):
        opened(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"columns.text body where it was text"):
        opened(tmp_path, lr=0.5, columns=Columns(text="body"))
    assert capsys.readouterr().out == ""
    opened(tmp_path, lr=0.5, save_every=9)
    assert "goes on with save_every 9 where it was 5" in capsys.readouterr().out
    opened(tmp_path, lr=0.5, save_every=9)
    assert capsys.readouterr().out == ""


def test_a_checkpoint_is_read_by_whoever_reads_its_neighbours(tmp_path, opened: Opened):
    run = opened(tmp_path)
    run.save(1, {"model": network(0)}, keep=2)
    modes = {
        file.name: stat.filemode(file.stat().st_mode)
        for file in run.checkpoints.rglob("*")
        if file.is_file()
    }
    assert "model-optimizer.safetensors" in modes
    assert set(modes.values()) == {modes["config.json"]}


def test_an_amendment_is_recorded_with_its_step(tmp_path, opened: Opened):
    opened(tmp_path).save(7, {"model": network(0)}, keep=2)
    opened(tmp_path, lr=0.5, amend=True)
    opened(tmp_path, lr=0.5, amend=True)  # the same command again
    opened(tmp_path, lr=0.5)
    (row,) = [json.loads(row) for row in (tmp_path / "amendments.jsonl").read_text().splitlines()]
    assert row["after_step"] == 7 and row["changed"] == ["lr 0.5 where it was 1.0"]
    assert "\namend" not in (tmp_path / "config.toml").read_text()
    with pytest.raises(ValueError, match="size large where it was mini, which cannot change"):
        opened(tmp_path, lr=0.5, size="large", amend=True)


def test_a_finished_run_says_so_and_goes_on_only_when_amended(tmp_path, opened: Opened, capsys):
    run = opened(tmp_path)
    run.save(3, {"model": network(0)}, keep=2)
    run.finish(network(0).model)
    assert opened(tmp_path).done
    assert f"{tmp_path} is finished; its model is {tmp_path / 'model'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--amend"):
        opened(tmp_path, lr=0.5)
    again = opened(tmp_path, lr=0.5, amend=True)
    assert not again.done and again.step == 3
    assert not opened(tmp_path, lr=0.5, amend=True).done
    again.finish(network(0).model)
    assert opened(tmp_path, lr=0.5, amend=True).done


def test_a_finished_run_without_a_checkpoint_or_a_model_is_refused(tmp_path, opened: Opened):
    opened(tmp_path).finish(network(0).model)
    with pytest.raises(ValueError, match="kept no checkpoint to go on from; start another run"):
        opened(tmp_path, lr=0.5, amend=True)
    assert opened(tmp_path).done  # what is refused changes nothing
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="finished, but its model is not in"):
        opened(tmp_path)


@pytest.mark.parametrize("there", ["model", "notes.txt"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, opened: Opened, there):
    (tmp_path / there).mkdir()
    (tmp_path / there / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"not empty and holds no run \({there}\); give another"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    with pytest.raises(ValueError, match="is a file; give another --out"):
        opened(tmp_path / there / "config.json")


def test_a_folder_whose_creation_was_killed_is_taken(tmp_path, opened: Opened):
    (tmp_path / ".config.toml.partial").write_text("lr =")
    (tmp_path / ".lock").write_text("{")
    assert opened(tmp_path).checkpoint is None


def test_what_is_read_is_pinned(tmp_path, opened: Opened, capsys):
    out, data = tmp_path / "run", tmp_path / "rows.jsonl"
    data.write_text("1\n2\n3\n")
    opened(out, data=[data]).log(1, loss=1.0)
    data = data.rename(tmp_path / "moved.jsonl")
    opened(out, data=[data])
    data.write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"data: moved.jsonl is 2 rows .*where it was 3 rows"):
        opened(out, data=[data])
    with pytest.raises(ValueError, match="data is 0 files where it was 1"):
        opened(out)
    opened(out, data=[data], amend=True)
    opened(out, data=[data])
    data.write_text("2\n1\n")  # shuffled
    with pytest.raises(ValueError, match=r"is 2 rows \(sha256 \w+\) where it was 2 rows"):
        opened(out, data=[data])


def test_a_start_models_files_are_pinned_and_its_readme_is_not(tmp_path, opened: Opened):
    out, model = tmp_path / "run", tmp_path / "lm"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.model").write_bytes(b"one")
    (model / "model.safetensors").write_bytes(b"weights")
    opened(out, data=[model]).log(1, loss=1.0)
    (model / "README.md").write_text("new")
    opened(out, data=[model])
    (model / "tokenizer.model").write_bytes(b"two")
    with pytest.raises(ValueError, match="data: tokenizer.model is 3 bytes"):
        opened(out, data=[model])


def test_rows_from_python_are_pinned(tmp_path, opened: Opened):
    opened(tmp_path, given={"dialogues": [1, 2]}).log(1, loss=1.0)
    opened(tmp_path, given={"dialogues": [1, 2]})
    with pytest.raises(ValueError, match="dialogues: what was handed over is 3 rows"):
        opened(tmp_path, given={"dialogues": [1, 2, 3]})


def test_metrics_are_one_history(tmp_path, opened: Opened):
    run = opened(tmp_path)
    for step in range(6):
        run.log(step, loss=float(step))
    run.save(3, {"model": network(0)}, keep=2)
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "lo')  # cut short by a kill
    assert opened(tmp_path).resume_step() == 3
    rows = [json.loads(row) for row in run.metrics.read_text().splitlines()]
    assert rows == [{"step": step, "loss": float(step)} for step in range(4)]


def test_a_run_without_a_checkpoint_starts_its_history_anew(tmp_path, opened: Opened):
    run = opened(tmp_path)
    run.log(0, eval_loss=1.0)
    run.log(1, loss=1.0)
    assert opened(tmp_path).resume_step() == 0
    assert run.metrics.read_text() == ""


def restored(run: Run) -> dict[str, Trained]:
    loaded = {
        "model": parallel.load(open_start(run, Path("nowhere"), fresh_head=True), "cpu"),
        "critic": load_model(run.weights(Path("nowhere"), "critic")),
    }
    trained = {
        name: Trained(model, torch.optim.AdamW(model.parameters(), fused=True))
        for name, model in loaded.items()
    }
    run.restore_optimizers(trained)
    return trained


def test_a_checkpoint_holds_every_network_and_its_optimizer(tmp_path, opened: Opened):
    saved_networks = {"model": network(0), "critic": network(1, "score")}
    run = opened(tmp_path)
    run.save(7, saved_networks, keep=1)
    assert run.checkpoint == tmp_path / "checkpoints" / "step-000007"
    for name, (model, optimizer) in restored(opened(tmp_path)).items():
        before = saved_networks[name]
        for ours, theirs in zip(model.parameters(), before.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            for key, value in before.optimizer.state[theirs].items():
                assert torch.equal(optimizer.state[ours][key], value), key


def test_moments_never_begin_anew(tmp_path, opened: Opened):
    opened(tmp_path).save(7, {"model": network(0), "critic": network(1, "score")}, keep=1)
    folder = tmp_path / "checkpoints" / "step-000007"
    file = folder / "training" / "critic-optimizer.safetensors"
    entries = load_file(file)
    entries.pop("model.norm.weight.step")
    save_file(entries, file)
    (folder / PROOF).unlink()
    write_hashes(folder, PROOF)  # as if it had been written so
    with pytest.raises(ValueError, match="critic-optimizer.safetensors has 35 entries where 36"):
        restored(opened(tmp_path))
    model, optimizer = network(1, "score")
    with pytest.raises(ValueError, match=r"no model\.norm\.weight\.step; moments"):
        parallel.load_optimizer_state(model, optimizer, entries)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_any_damage_to_any_file_of_a_checkpoint_is_found(tmp_path, opened: Opened, capsys):
    run = opened(tmp_path)
    for step in (4, 6):
        run.save(step, {"model": network(step), "critic": network(1, "score")}, keep=2)
    newest = tmp_path / "checkpoints" / "step-000006"
    assert len(files_of(newest)) >= 8
    for file in files_of(newest):
        good = file.read_bytes()
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        for bad in (flipped, good[:middle], b"", None):
            file.unlink() if bad is None else file.write_bytes(bad)
            with pytest.raises(ValueError, match=r"step-000006 is damaged \(.*\); add --resume"):
                opened(tmp_path)
        file.write_bytes(good)
    assert opened(tmp_path).step == 6
    (newest / "model.safetensors").write_bytes(b"")
    assert opened(tmp_path, resume="previous").step == 4
    assert "set aside as damaged-step-000006" in capsys.readouterr().out
    assert opened(tmp_path, resume="previous").step == 4  # the same command again
    (tmp_path / "checkpoints" / "step-000004" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="there is no other checkpoint; give another --out"):
        opened(tmp_path, resume="previous")


@pytest.mark.parametrize("text", ["[]", "{}", "", '{"step": "x", "optimizer_entries": {}}'])
def test_a_state_that_is_none_is_named(tmp_path, opened: Opened, text):
    opened(tmp_path).save(4, {"model": network(0)}, keep=2)
    folder = tmp_path / "checkpoints" / "step-000004"
    (folder / "training" / "state.json").write_text(text)
    (folder / PROOF).unlink()
    write_hashes(folder, PROOF)
    with pytest.raises(ValueError, match=r"state.json is damaged; --resume previous"):
        opened(tmp_path)


def test_strangers_among_the_checkpoints_do_no_harm(tmp_path, opened: Opened):
    run = opened(tmp_path)
    for step in (4, 6):
        run.save(step, {"model": network(0)}, keep=2)
    for name in ("step-000004-copy", "step-9", "step-abcdef", "notes", ".step-000007.partial"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step-000009").write_text("a file")
    assert opened(tmp_path).step == 6
    run.save(8, {"model": network(0)}, keep=1)
    assert [path.name for path in saved(run.checkpoints)] == ["step-000008"]
    assert (run.checkpoints / "step-000004-copy").exists()


def test_without_a_checkpoint_weights_come_from_the_start(tmp_path, opened: Opened):
    run = opened(tmp_path)
    assert run.weights(Path("start")) == run.weights(Path("start"), "critic") == Path("start")


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(tmp_path, opened: Opened):
    run = opened(tmp_path)
    for step in (999_999, 1_000_000, 2_000_000):
        run.save(step, {"model": network(0)}, keep=2)
    assert [p.name for p in saved(run.checkpoints)] == ["step-1000000", "step-2000000"]
    assert opened(tmp_path).resume_step() == 2_000_000


def test_a_finished_model_marks_the_run_as_done(tmp_path, opened: Opened):
    run = opened(tmp_path)
    trained = network(0)
    assert run.finish(trained.model) == run.final and run.done
    ours = load_model(run.final).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in trained.model.state_dict().items())


def test_a_digest_is_that_of_a_known_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert digest(tmp_path / "abc") == (known, 3, 0)


def test_an_amendment_that_ends_over_a_mistake_is_taken_back(tmp_path, capsys):
    """A typo in a file's name once left the run with options that refused the former command."""
    plain = Config(out=tmp_path)
    with open_run(plain, tokenizer=None) as run:
        run.save(3, {"model": network(0)}, keep=2)
        run.finish(network(0).model)
    names = ("config.toml", "inputs.json", "finished.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    with (
        pytest.raises(ValueError, match="no such file"),
        open_run(
            Config(out=tmp_path, lr=0.5, data=[tmp_path / "none.jsonl"], amend=True), tokenizer=None
        ),
    ):
        raise ValueError("none.jsonl: no such file")
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert not (tmp_path / "amendments.jsonl").exists()
    assert "nothing was done under the amendment; it is taken back" in capsys.readouterr().out
    with open_run(plain, tokenizer=None) as run:
        assert run.done  # the former command
    with (
        pytest.raises(ValueError, match="later"),
        open_run(Config(out=tmp_path, lr=0.5, amend=True), tokenizer=None) as amended,
    ):
        amended.log(4, loss=1.0)  # something was done: it stays
        raise ValueError("later")
    assert (tmp_path / "amendments.jsonl").exists()


def test_a_renamed_checkpoint_is_refused(tmp_path, opened: Opened):
    run = opened(tmp_path)
    run.save(3, {"model": network(0)}, keep=2)
    (run.checkpoints / "step-000003").rename(run.checkpoints / "step-000990")
    with pytest.raises(ValueError, match="step-000990 holds step 3: it was renamed"):
        opened(tmp_path)
