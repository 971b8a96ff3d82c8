"""The run folder: what was asked, on what machine, what happened, and where to go on from.

config.toml        the resolved configuration, itself a recipe
environment.json   versions, machine, commit
rows.sha256        of the rows, where they came from Python and not from a file
metrics.jsonl      one row a step, one history: a resumed run cuts it to its checkpoint
checkpoints/step-000123/   a model folder with `training/` beside the weights
samples/           text, where a stage writes some
model/             the finished model; its presence means that the run is done
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from puna.core import parallel
from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.folder import atomic_folder, open_model, write_tensors
from puna.core.checkpoint.source import Source
from puna.core.model import Transformer
from puna.trainers.train.config import to_toml
from puna.trainers.train.viewers import viewer

ROWS_DIGEST = "rows.sha256"


class Trained(NamedTuple):
    """A network with the optimizer that trains it."""

    model: Transformer
    optimizer: torch.optim.Optimizer


class Run:
    """A run folder, opened for writing: a new one, or one to continue."""

    def __init__(self, path: Path, config: Any, *, tokenizer: Path | None):
        """Create or reopen `path`. Raises ValueError where it holds a run of another
        configuration, naming the keys that differ."""
        self.path = path
        self.tokenizer = tokenizer
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self._show = viewer(getattr(config, "log", "none"), path)
        if parallel.is_main():
            claim(path, config)
            self.checkpoints.mkdir(exist_ok=True)
        parallel.barrier()

    def claim_rows(self, rows: Iterable[Any]) -> None:
        """Make this the run of these rows of JSON, which come from Python and not from a file.

        Raises ValueError where it has gone some way with others.
        """
        if parallel.is_main():
            digest = hashlib.sha256("".join(map(json.dumps, rows)).encode()).hexdigest()
            recorded = self.path / ROWS_DIGEST
            same = recorded.exists() and recorded.read_text() == digest
            if not (same or is_untouched(self.path)):
                raise ValueError(
                    f"{self.path} holds a run on other rows than these; hand over the same ones in "
                    "the same order, give another out, or remove the folder"
                )
            write_text(recorded, digest)
        parallel.barrier()

    @property
    def final(self) -> Path:
        """The folder of the finished model."""
        return self.path / "model"

    @property
    def done(self) -> bool:
        return (self.final / "config.json").exists()

    def latest(self) -> Path | None:
        """The newest checkpoint; None in a fresh run."""
        found = [p for p in self._saved() if (p / "training").is_dir()]
        return found[-1] if found else None

    def _saved(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))

    def log(self, step: int, **values: float | int | str) -> None:
        """Append one row to metrics.jsonl, and show it where the configuration asks for that."""
        if parallel.is_main():
            with self.metrics.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self._show(step, {k: v for k, v in values.items() if not isinstance(v, str)})

    def save(self, step: int, networks: dict[str, Trained], *, keep: int) -> None:
        """Write checkpoints/step-N and drop all but the newest `keep`.

        The first network is the folder's own model; each further one, and every optimizer, lies
        under `training/`. Raises OSError with one sentence where the disk is full: earlier
        checkpoints stay as they are.
        """
        folder = self.checkpoints / f"step-{step:06d}"
        if parallel.is_main():
            with atomic_folder(folder) as partial:
                self._write(partial, step, networks)
            self._prune(keep)
        else:
            for network in networks.values():
                _gather(network)
        parallel.barrier()

    def _write(self, partial: Path, step: int, networks: dict[str, Trained]) -> None:
        training = partial / "training"
        for index, (name, network) in enumerate(networks.items()):
            target = partial if index == 0 else training / name
            target.mkdir(parents=True, exist_ok=True)
            write_model(target, network.model, self.tokenizer)
            training.mkdir(exist_ok=True)
            state = parallel.optimizer_state(network.model, network.optimizer)
            save_file(state, training / f"{name}-optimizer.safetensors")
        (training / "state.json").write_text(json.dumps({"step": step, "networks": list(networks)}))

    def _prune(self, keep: int) -> None:
        for old in self._saved()[:-keep]:
            shutil.rmtree(old)

    def resume_step(self) -> int:
        """The step to go on from, with metrics.jsonl cut to it (emptied where it is 0)."""
        checkpoint = self.latest()
        step = 0
        if checkpoint is not None:
            step = int(json.loads((checkpoint / "training" / "state.json").read_text())["step"])
        if parallel.is_main():
            self._truncate_metrics(step)
        parallel.barrier()
        return step

    def _truncate_metrics(self, step: int) -> None:
        if not self.metrics.exists():
            return
        rows = self.metrics.read_text().splitlines()
        kept = [row for row in rows if _step_of(row) <= step] if step else []
        write_text(self.metrics, "".join(row + "\n" for row in kept))

    def restore_optimizers(self, networks: dict[str, Trained]) -> None:
        """Load the newest checkpoint's optimizer states into networks already on its weights."""
        checkpoint = self.latest()
        if checkpoint is None:
            return
        for name, network in networks.items():
            state = load_file(checkpoint / "training" / f"{name}-optimizer.safetensors")
            parallel.load_optimizer_state(network.model, network.optimizer, state)

    def weights(self, start: Path, name: str | None = None) -> Path:
        """Where to load a network's weights from: the newest checkpoint, else `start`. `name` is
        that of a further network; None is the folder's own model."""
        checkpoint = self.latest()
        if checkpoint is None:
            return start
        return checkpoint if name is None else checkpoint / "training" / name

    def finish(self, model: Transformer) -> Path:
        """Write the finished model and return its folder."""
        if parallel.is_main():
            with atomic_folder(self.final) as partial:
                write_model(partial, model, self.tokenizer)
        else:
            _drain(model)
        parallel.barrier()
        return self.final


def claim(path: Path, config: Any) -> None:
    """Make `path` the folder of this configuration: config.toml and environment.json in it.

    Raises ValueError where something of another one was done in it, naming the keys that differ.
    """
    recorded, toml = path / "config.toml", to_toml(config)
    if recorded.exists():
        before, now = recorded.read_text(encoding="utf-8").splitlines(), toml.splitlines()
        changed = sorted({line.split(" =")[0] for line in set(before) ^ set(now)})
        if not changed:
            return
        if not is_untouched(path):
            raise ValueError(
                f"{path} holds a run with another configuration (differs in "
                f"{', '.join(changed)}); give another --out, or remove the folder"
            )
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / "environment.json", json.dumps(environment(), indent=2) + "\n")
    write_text(recorded, toml)


def is_untouched(path: Path) -> bool:
    """Whether a run's folder holds nothing but what `claim` and `Run` put there: a run that ended
    over a mistake in its options can be started again with the right ones."""
    ours = {"config.toml", "environment.json", ROWS_DIGEST}
    return all(p.name in ours or (p.is_dir() and not any(p.iterdir())) for p in path.iterdir())


def write_model(folder: Path, model: Transformer, tokenizer: Path | None) -> None:
    """The model's files, gathered from all ranks where it is sharded (all ranks take part)."""
    write_tensors(
        folder,
        model.config,
        model.head,
        parallel.full_parameters(model),
        tokenizer,
        dtype=torch.float32,
    )


def _gather(network: Trained) -> None:
    _drain(network.model)
    parallel.optimizer_state(network.model, network.optimizer)


def _drain(model: Transformer) -> None:
    for _ in parallel.full_parameters(model):
        pass


def _step_of(row: str) -> float:
    """A row's step; a row cut short by a kill counts as after everything."""
    try:
        return float(json.loads(row)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def environment() -> dict[str, Any]:
    """Versions and machine: what is needed to judge or to repeat a run's numbers."""
    packages = ("torch", "triton", "numpy", "sentencepiece", "safetensors")
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": found,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": parallel.world_size(),
        "commit": _commit(),
        "arguments": sys.argv[1:],
    }


def _commit() -> str | None:
    """The commit of the source tree that this file belongs to; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


def open_start(run: Run, start: Path, **options: Any) -> Source:
    """The weights to go on from: the newest checkpoint's, else those of `start`."""
    checkpoint = run.latest()
    if checkpoint is not None:
        options.pop("fresh_head", None)
    return open_model(run.weights(start), **options)
