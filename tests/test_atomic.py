"""Model folders are written whole or not at all: full disks, kills and errors lose nothing."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puna.core.checkpoint.atomic import atomic_file, atomic_folder
from puna.core.checkpoint.folder import load_model, save_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer

CONFIG = ModelConfig(64, 2, 4, 4, 96, 320, context=128)

ROOT = Path(__file__).resolve().parents[1]


def random_model(seed: int = 0) -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(seed)
    return model


def assert_same(one: Transformer, other: Transformer) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_full_disk_keeps_the_earlier_model(tmp_path: Path) -> None:
    model = random_model()
    save_model(tmp_path / "model", model)
    script = """if True:
        import resource, sys, torch
        from puna.core.checkpoint.folder import load_model, save_model, atomic_folder
        model = load_model(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        def torch_save(folder):
            with atomic_folder(folder) as partial:
                torch.save(model.state_dict(), partial / "state.pt")
        def text(folder):
            with atomic_folder(folder) as partial:
                (partial / "metrics.jsonl").write_text("x" * 60_000)
        for write in (lambda folder: save_model(folder, model), torch_save, text):
            try:
                write(sys.argv[1])
            except OSError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("the disk is full: ") and line.endswith("run again")
    assert os.listdir(tmp_path) == ["model"]
    assert_same(model, load_model(tmp_path / "model"))


def test_killed_while_writing(tmp_path: Path) -> None:
    model = random_model()
    save_model(tmp_path / "model", model)
    script = """if True:
        import os, signal, sys
        from puna.core.checkpoint.folder import atomic_folder
        with atomic_folder(sys.argv[1]) as partial:
            (partial / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")])
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["model"]
    assert_same(model, load_model(tmp_path / "model"))
    newer = random_model(seed=1)
    save_model(tmp_path / "model", newer)
    assert os.listdir(tmp_path) == ["model"]
    assert_same(newer, load_model(tmp_path / "model"))


@pytest.mark.parametrize("moment", [1, 2])
def test_killed_between_the_renames(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first rename the old model comes back, after the second the new one stays."""
    old, new = random_model(), random_model(seed=1)
    save_model(tmp_path / "model", old)
    save_model(tmp_path / "newer", new)
    hidden = tmp_path / ".model.previous"
    (tmp_path / "model").rename(hidden)
    if moment == 2:
        (tmp_path / "newer").rename(tmp_path / "model")
    assert_same(old if moment == 1 else new, load_model(tmp_path / "model"))
    save_model(tmp_path / "model", new)
    assert not hidden.exists()
    assert_same(new, load_model(tmp_path / "model"))


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "deep" / "model") as partial:
        (partial / "config.json").write_text("{}")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match="exists and holds no model; choose another folder"):
        save_model(tmp_path / "notes", random_model())
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    there = tmp_path / "there"
    os.mkfifo(there) if kind == "pipe" else there.mkdir()
    with pytest.raises(ValueError, match="no file that could be replaced"), atomic_file(there):
        raise AssertionError("not reached")
    assert there.exists() and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_replaced_only_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_text("old")
    with pytest.raises(KeyError), atomic_file(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["model.bin"]
    with atomic_file(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["model.bin"]


# Where a file is written other than by core.checkpoint.atomic, and why that is whole or not at all.
WRITERS = {
    "core/checkpoint/atomic.py": "it is the writer",
    "core/checkpoint/shards.py": "into a folder that atomic_folder made",
    "core/checkpoint/hashes.py": "the same",
    "core/checkpoint/llama2c.py": "to a name that atomic_file made",
    "core/text/tokenizer.py": "the same",
    "trainers/data/encoding.py": "the same",
    "core/documents.py": "the same, or rows at the end, fsynced, cut to whole ones by their reader",
    "core/checkpoint/kept.py": "into a folder that atomic_folder made",
    "trainers/rl/comparisons.py": "to a name that atomic_file made",
    "trainers/rl/chunks.py": "the same",
    "trainers/annotations/store.py": "an empty file, for SQLite, which writes ahead",
    "trainers/rl/exchanges.py": "a row at the end, cut where it is torn",
    "trainers/train/run.py": "the same: metrics.jsonl, cut to its checkpoint",
    "benchmarks/models/decode_peers.py": "a peer's input, in a temporary folder",
    "benchmarks/gpu/run.py": "what a part prints, as it comes",
    "benchmarks/timing.py": "/proc/self/clear_refs",
    "core/terminal.py": "/dev/null, where a stream is closed",
    "demo/smollm2.py": "to a name that atomic_file made",
    "trainers/rl/engine.py": "a request over HTTP, no file",
}


def writes(path: Path) -> bool:
    """Whether a file calls something that writes: .write_text(...), .open("w"), open(..., "ab")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("write_text", "write_bytes") and isinstance(node.func, ast.Attribute):
            return True
        if called == "open" and any(
            not isinstance(mode, ast.Constant)
            or (
                isinstance(mode.value, str)
                and set(mode.value) <= set("rwabx+t")
                and set(mode.value) & set("wax+")
            )
            for mode in node.args[: 2 if isinstance(node.func, ast.Name) else 1]
            if isinstance(mode, (ast.Constant, ast.Name))
        ):
            return True
    return False


def test_files_are_written_whole_or_not_at_all():
    found = {
        str(path.relative_to(ROOT))
        for room in ("core", "trainers", "demo", "annotate", "cli", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        if writes(path)
    }
    assert found == set(WRITERS)


def test_two_who_write_one_folder(tmp_path):
    """The second is told, and takes nothing from the first, whose end lets it in."""
    with atomic_folder(tmp_path / "model") as first:
        (first / "config.json").write_text("1")
        with (
            pytest.raises(ValueError, match="is being written by another process"),
            atomic_folder(tmp_path / "model"),
        ):
            pass
        (first / "weights").write_text("1")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "weights"}
    with atomic_folder(tmp_path / "model") as second:
        (second / "config.json").write_text("2")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
