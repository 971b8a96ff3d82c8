"""Run: python -m pytest tests/test_viewers.py -q"""

import json
import re
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path
from unittest.mock import Mock

import pytest

from puna.core.errors import UserError
from puna.trainers import sft
from puna.trainers.train.viewers import VIEWERS, viewer


def trained(tiny: Path, out: Path, log: str) -> list[dict[str, float]]:
    """The rows of a short run."""
    config = sft.SFTConfig(
        model=tiny / "lm", data=[tiny / "dialogues.jsonl"], out=out, batch=4, eval_every=2,
        device="cpu", log=log,
    )  # fmt: skip
    sft.run(config)
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path) -> set[tuple[int, str, float]]:
    """(step, name, value) of all event files in a folder, after purging."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {(e.step, name, e.value) for name in names for e in events.Scalars(name)}


def test_tensorboard_has_the_same_names_numbers_and_steps(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    rows = trained(tiny, tmp_path / "run", "tensorboard")
    shown = scalars(tmp_path / "run" / "tensorboard")
    written = {(row["step"], k, v) for row in rows for k, v in row.items() if k != "step"}
    assert {(s, k) for s, k, _ in shown} == {(s, k) for s, k, _ in written}
    by_name = {(s, k): v for s, k, v in shown}
    assert all(by_name[s, k] == pytest.approx(v, rel=1e-6) for s, k, v in written)


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    first = viewer("tensorboard", tmp_path)
    for step in range(5):
        first(step, {"loss": 1.0})
    viewer("tensorboard", tmp_path)(3, {"loss": 2.0})
    found = scalars(tmp_path / "tensorboard")
    assert found == {(0, "loss", 1.0), (1, "loss", 1.0), (2, "loss", 1.0), (3, "loss", 2.0)}


def faked(monkeypatch, name: str) -> tuple[list, list]:
    """A package with the calls that both document, `init(...)` and `run.log(values, step=)`; what
    it is told, and with what it is begun."""
    told, begun = [], []
    fake = types.ModuleType(name)
    fake.__spec__ = types.SimpleNamespace(name=name)
    run = types.SimpleNamespace(log=lambda values, step: told.append({"step": step, **values}))
    fake.Run = types.SimpleNamespace
    fake.init = lambda **options: begun.append(options) or run
    monkeypatch.setitem(sys.modules, name, fake)
    return told, begun


def test_trackio_is_told_the_same(tiny, tmp_path, monkeypatch):
    told, begun = faked(monkeypatch, "trackio")
    assert trained(tiny, tmp_path / "project" / "run", "trackio") == told
    assert begun[0].pop("name").startswith("run-")
    assert begun == [{"project": "project", "resume": "allow"}]


def test_wandb_is_told_the_same_and_knows_a_run_that_goes_on(tiny, tmp_path, monkeypatch):
    told, begun = faked(monkeypatch, "wandb")
    out = tmp_path / "project" / "run"
    assert trained(tiny, out, "wandb") == told
    assert begun[0].pop("id") == (out / ".wandb-id").read_text().splitlines()[0]
    assert begun == [
        {"project": "project", "name": "run", "dir": str(out), "resume": "allow",
         "reinit": "create_new"}
    ]  # fmt: skip
    viewer("wandb", out)(99, {"loss": 1.0})
    assert begun[1]["id"] == (out / ".wandb-id").read_text().splitlines()[0]
    other = tmp_path / "project" / "other"
    other.mkdir()
    viewer("wandb", other)(0, {"loss": 1.0})
    assert begun[2]["id"] != begun[1]["id"]
    assert told[-2:] == [{"step": 99, "loss": 1.0}, {"step": 0, "loss": 1.0}]


@pytest.mark.parametrize(("name", "called"), [("wandb", "id"), ("trackio", "name")])
def test_a_moved_run_is_the_same_and_a_copied_one_another(tmp_path, monkeypatch, name, called):
    _, begun = faked(monkeypatch, name)
    first = tmp_path / "a" / "run"
    first.mkdir(parents=True)

    def shown(folder) -> str:
        viewer(name, folder)(0, {"loss": 1.0})
        return begun[-1][called].rpartition("-")[2]

    own = shown(first)
    copied = shutil.copytree(first, tmp_path / "b" / "run")
    other = shown(copied)
    assert other != own and shown(copied) == other and shown(first) == own
    first.rename(tmp_path / "moved")
    assert shown(tmp_path / "moved") == own and shown(tmp_path / "moved") == own
    again = tmp_path / "a" / "run"  # another project's run of the same name
    again.mkdir()
    assert shown(again) not in (own, other)


@pytest.mark.parametrize("name", ["none", *VIEWERS])
def test_no_package_is_imported_unless_it_is_asked_for(tiny, tmp_path, name):
    """In a process of its own: the others stay out."""
    program = (
        "import sys; from puna.trainers.train import viewers; from pathlib import Path\n"
        f"try: viewers.viewer({name!r}, Path({str(tmp_path)!r}))\n"
        "except ValueError: pass\n"
        "print(*[each for each in viewers.VIEWERS if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert set(done.stdout.split()) <= {name} and done.returncode == 0, done.stderr


def test_a_package_that_fails_is_one_sentence(tiny, tmp_path, monkeypatch):
    faked(monkeypatch, "wandb")
    monkeypatch.setattr(sys.modules["wandb"], "init", Mock(side_effect=RuntimeError("no key\nx")))
    with pytest.raises(UserError, match=r"^wandb could not show step 0 \(no key\); .* continues$"):
        trained(tiny, tmp_path / "run", "wandb")
    assert trained(tiny, tmp_path / "run", "none")[-1]["step"] > 1


def test_every_viewer_is_an_option_and_an_extra():
    names = typing.get_args(typing.get_type_hints(sft.SFTConfig)["log"])
    assert set(names) == {"none", *VIEWERS}
    project = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert all(re.search(rf'^{name} = \["{name}', project, re.MULTILINE) for name in VIEWERS)


@pytest.mark.parametrize("name", VIEWERS)
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=rf"log is {name}, .*; pip install 'puna\[{name}\]'"):
        viewer(name, tmp_path)
    assert viewer("none", tmp_path)(1, {"loss": 1.0}) is None
