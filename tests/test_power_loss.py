"""A power failure after every single step of a write, replayed: the old version or the new one.

What is recorded: every fsync, rename and removal. What is lost at a failure, in two ways between
which real file systems lie:
- strict: names that were changed since their folder's last fsync, and all that was not fsynced;
- torn: no name, but the contents of every file that was not fsynced (it is there, and empty).
Not modelled: a disk that acknowledges an fsync and does not keep it.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from puna.core.checkpoint.atomic import atomic_file, atomic_folder, recover, write_text
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.train.loop import TrainConfig
from puna.trainers.train.run import Trained, open_run

Tree = dict[str, "bytes | Tree"]


class Disk:
    """Follows what is durable below `root`, and takes a picture before and after each step."""

    def __init__(self, root: Path):
        self.root = root
        self.data: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.pictures: list[tuple[str, Tree]] = []
        for path in [root, *root.rglob("*")]:
            self.synced(path)

    def synced(self, path: Path) -> None:
        if path.is_dir():
            self.names[number(path)] = {each.name: number(each) for each in path.iterdir()}
        else:
            self.data[number(path)] = path.read_bytes()

    def look(self) -> None:
        self.pictures.append(("strict", self.strict(number(self.root))))
        self.pictures.append(("torn", self.torn(self.root)))

    def strict(self, inode: int) -> Tree:
        return {
            name: self.strict(each) if each in self.names else self.data.get(each, b"")
            for name, each in self.names.get(inode, {}).items()
        }

    def torn(self, path: Path) -> Tree:
        return {
            each.name: self.torn(each) if each.is_dir() else self.data.get(number(each), b"")
            for each in path.iterdir()
        }


def number(path: Path) -> int:
    return path.stat().st_ino


def build(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, inside in tree.items():
        if isinstance(inside, bytes):
            (folder / name).write_bytes(inside)
        else:
            build(inside, folder / name)


def failures(root: Path, work: Callable[[], None]) -> list[tuple[str, Tree]]:
    """What may be on disk if the power fails at any moment of `work`."""
    disk = Disk(root)
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner, name: str) -> None:
            real = getattr(owner, name)

            def step(*arguments, **options):
                disk.look()
                result = real(*arguments, **options)
                if name == "fsync":
                    disk.synced(Path(os.readlink(f"/proc/self/fd/{arguments[0]}")))
                disk.look()
                return result

            patch.setattr(owner, name, step)

        for owner, name in (
            (os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"),
            (shutil, "rmtree"), (os, "unlink"), (os, "rmdir"),
        ):  # fmt: skip
            watch(owner, name)
        work()
    disk.look()
    return disk.pictures


def write_model(folder: Path, text: str) -> None:
    with atomic_folder(folder) as partial:
        for name in ("config.json", "model.safetensors"):
            (partial / name).write_text(text)
        (partial / "training").mkdir()
        (partial / "training" / "state.json").write_text(text)


def contents(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", ["old", None])
def test_a_folder_is_the_old_or_the_new_one_after_a_power_failure(tmp_path, before):
    root = tmp_path / "disk"
    root.mkdir()
    if before:
        write_model(root / "model", before)
    found = failures(root, lambda: write_model(root / "model", "new"))
    assert len(found) > 20
    after = set()
    for count, (_, tree) in enumerate(found):
        copy = tmp_path / str(count)
        build(tree, copy)
        recover(copy / "model")
        if before is None and not (copy / "model").exists():
            after.add(None)
            continue
        assert len(list((copy / "model").rglob("*.*"))) == 3
        (said,) = contents(copy / "model")
        after.add(said)
    assert after == {before, "new"}
    assert tree_text(found[-2][1]["model"]) == {"new"}  # strict, at the end: it is durable


def tree_text(tree) -> set[str]:
    return set().union(
        *({each.decode()} if isinstance(each, bytes) else tree_text(each) for each in tree.values())
    )


@pytest.mark.parametrize("before", ["old", None])
def test_a_file_is_the_old_or_the_new_one_after_a_power_failure(tmp_path, before):
    root = tmp_path / "disk"
    root.mkdir()
    if before:
        write_text(root / "state.json", before)
    found = failures(root, lambda: write_text(root / "state.json", "new"))
    after = {tree.get("state.json") for _, tree in found}
    assert after == {before.encode() if before else None, b"new"}
    assert found[-2][1]["state.json"] == b"new"


def test_the_replay_finds_what_was_not_synced(tmp_path):
    """The same without any fsync: the replay must see the loss, or it would prove nothing."""
    root = tmp_path / "disk"
    root.mkdir()
    (root / "state.json").write_text("old")

    def careless() -> None:
        (root / "partial").write_text("new")
        (root / "partial").rename(root / "state.json")

    assert b"" in {tree["state.json"] for _, tree in failures(root, careless)}


def test_a_checkpoints_history_is_durable_before_it_is(tmp_path):
    root = tmp_path / "disk"
    network = small_network()
    with open_run(TrainConfig(out=root), tokenizer=None) as run:

        def save() -> None:
            run.log(1, loss=1.0)
            run.save(1, {"model": network}, keep=1)

        found = failures(root, save)
    whole = [tree for _, tree in found if "step-000001" in tree["checkpoints"]]
    assert whole and all(tree["metrics.jsonl"] == b'{"step": 1, "loss": 1.0}\n' for tree in whole)


def small_network() -> Trained:
    model = Transformer(ModelConfig(8, 1, 2, 1, 12, vocab_size=20, context=16))
    model.init_weights(0)
    return Trained(model, torch.optim.AdamW(model.parameters(), fused=True))


def test_an_unfinished_file_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
