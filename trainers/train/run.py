"""The run folder: what was asked, on what machine, what happened, and where to go on from.

metrics.jsonl      one row a step, one history: a resumed run cuts it to its checkpoint
checkpoints/step-000123/   a model folder with `training/` beside the weights
samples/           text, where a stage writes some
model/             the finished model

Whose it is stands beside these (`claim`).
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from puna.core import parallel
from puna.core.checkpoint.atomic import flush, naming_full_disk, write_text
from puna.core.checkpoint.folder import atomic_folder, write_tensors
from puna.core.checkpoint.hashes import damage
from puna.core.checkpoint.pieces import open_pieces
from puna.core.checkpoint.shards import save_tensors
from puna.core.checkpoint.source import DTYPES
from puna.core.documents import listed
from puna.core.model import Transformer
from puna.trainers.train import saving, written
from puna.trainers.train.advice import advice
from puna.trainers.train.claim import (
    FINISHED,
    WAIT,
    amended_since_finished,
    amendments,
    is_finished,
    owned,
)
from puna.trainers.train.inputs import Given
from puna.trainers.train.notice import notice
from puna.trainers.train.saving import Trained as Trained
from puna.trainers.train.state import (
    PROOF,
    STATE,
    State,
    Visited,
    check_tokenizer,
    finish_checkpoint,
    previous,
    read_state,
)
from puna.trainers.train.viewers import viewer

STATE_FILE = "-optimizer.safetensors"  # of one process, after the network's name
STATE_FOLDER = "-optimizer"  # of several: a file of each


@contextmanager
def open_run(config: Any, *, tokenizer: Path | None, given: Given | None = None) -> Iterator["Run"]:
    """The run in `config.out`, a new one or one to continue, held until the block ends.

    `given`, rows and functions from Python, are of the run like its files. Collective. Raises
    ValueError as `claim.owned` does, and where the newest checkpoint is damaged.
    """
    with owned(config, given=given, step=step_to_amend) as amended:
        run = Run(config, tokenizer, amended)
        if run.done:
            notice(f"{run.path} is finished; its model is {run.final}")
        try:
            yield run
        except BaseException:
            with suppress(Exception):  # there is something to say already
                run.settle()
            raise
        run.settle()


class Run:
    """A run folder that is held: its newest checkpoint is looked up once, when it is opened."""

    def __init__(self, config: Any, tokenizer: Path | None, amended: frozenset[str] = frozenset()):
        self.path: Path = config.out
        self.amended = amended
        self.tokenizer = tokenizer
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.dtype = DTYPES[getattr(config, "model_dtype", "fp32")]
        self._show = viewer(getattr(config, "log", "none"), self.path)
        fall_back = getattr(config, "resume", "newest") == "previous"
        parallel.on_main(self._open)
        self.checkpoint = newest(self.checkpoints, fall_back=fall_back)
        # Made now: torchrun, through which ranks meet, may be gone when there is something to save.
        self._group = parallel.background(getattr(config, "timeout", WAIT))
        self._writing: Future[None] | None = None
        self.step = 0
        self.visited: Visited | None = None  # where the checkpoint says it
        self.visited_after: Callable[[int], Visited | None] = lambda step: None
        self._entries: dict[str, int] = {}  # of each network's optimizer
        if self.checkpoint is not None:
            self.step, self._entries, self.visited = read_state(self.checkpoint)
            if self.checkpoint.name != named(self.step):
                raise ValueError(
                    f"{self.checkpoint} holds step {self.step}: it was renamed or is of another "
                    "run; remove it, or name it as it was"
                )
            if tokenizer is not None:
                check_tokenizer(self.checkpoint, tokenizer)

    def _open(self) -> None:
        """Look at a run that is finished (rank 0)."""
        self.checkpoints.mkdir(exist_ok=True)
        if self.done:
            if amended_since_finished(self.path):
                (self.path / FINISHED).unlink()  # there is more to do
            else:
                written.check(self.path, *model_files(self.path))

    @property
    def final(self) -> Path:
        """The folder of the finished model."""
        return self.path / "model"

    @property
    def done(self) -> bool:
        """Whether the run said so itself; ValueError where its model is no longer there."""
        if not (self.path / FINISHED).exists():
            return False
        if not (self.final / "config.json").exists():
            raise ValueError(
                f"{self.path} is finished, but its model is not in {self.final}: put it back, or "
                "give another --out"
            )
        return True

    def say_idle(self, names: Iterable[str], why: str) -> None:
        """One line where options of these names were amended and change nothing any more."""
        if idle := sorted(self.amended.intersection(names)):
            notice(f"{self.path}: {listed(idle)} changed nothing: {why}")

    def log(self, step: int, **values: float | int | str) -> None:
        """Append one row to metrics.jsonl, and show it where the configuration asks for that."""
        if parallel.is_main():
            with naming_full_disk(self.metrics), self.metrics.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self._show(step, {k: v for k, v in values.items() if not isinstance(v, str)})

    def save(self, step: int, networks: dict[str, Trained], *, keep: int) -> None:
        """Write checkpoints/step-N and drop all but the newest `keep`.

        The first network is the folder's own model; each further one, and every optimizer, lies
        under `training/`. Several ranks write behind what follows (`settle` waits for it). Raises
        OSError or ValueError with one sentence where this or the write before it fails, as on a
        full disk: earlier checkpoints stay as they are.
        """
        self.settle()
        if parallel.is_main() and self.metrics.exists():
            flush(self.metrics)  # the history of a checkpoint is on disk before it is
            flush(self.path)
        if parallel.world_size() == 1:
            with atomic_folder(self.checkpoints / named(step)) as partial:
                self._write(partial, step, networks)
            self._written(step, keep)
            return
        copied, entries = self._copy(networks)
        state = State(step, entries, self.visited_after(step))

        def work() -> None:
            folder = self.checkpoints / named(step)
            saving.write(
                folder,
                copied,
                lambda partial, hashes: finish_checkpoint(partial, state, hashes),
                self._group,
            )
            self._written(step, keep)

        self._writing = saving.behind(work)

    def settle(self) -> None:
        """Wait until the checkpoint that is being written stands; ValueError, in one sentence, on
        every rank, where it could not be written."""
        if (writing := self._writing) is not None:
            wait([writing])  # where Ctrl-C interrupts this, it is still to be waited for
            self._writing = None
            writing.result()

    def _written(self, step: int, keep: int) -> None:
        self.checkpoint = self.checkpoints / named(step)
        for old in saved(self.checkpoints)[:-keep] if parallel.is_main() else ():
            shutil.rmtree(old)

    def _write(self, partial: Path, step: int, networks: dict[str, Trained]) -> None:
        training = partial / "training"
        entries = {}
        for index, (name, network) in enumerate(networks.items()):
            target = partial if index == 0 else training / name
            target.mkdir(parents=True, exist_ok=True)
            write_model(target, network.model, self.tokenizer)
            training.mkdir(exist_ok=True)
            state = parallel.optimizer_state(network.model, network.optimizer)
            entries[name] = len(state)
            save_tensors(
                {key: piece.tensor for key, piece in state.items()},
                training / f"{name}{STATE_FILE}",
                like=target / "config.json",
            )
        finish_checkpoint(partial, State(step, entries, self.visited_after(step)))

    def _copy(self, networks: dict[str, Trained]) -> tuple[saving.Copied, dict[str, int]]:
        """This rank's part of a checkpoint, and the entries of each optimizer (collective)."""
        copies: list[saving.Copied] = []
        entries: dict[str, int] = {}
        for index, (name, network) in enumerate(networks.items()):
            place = "." if index == 0 else f"training/{name}"
            copies.append(saving.copy_model(network.model, self.tokenizer, place))
            state, entries[name] = saving.copy_state(network, f"training/{name}{STATE_FOLDER}")
            copies.append(state)
        return saving.together(copies), entries

    def resume_step(self) -> int:
        """The step to go on from, with metrics.jsonl cut to it (emptied where it is 0)."""
        if parallel.is_main() and self.metrics.exists():
            rows = self.metrics.read_text().split("\n")
            kept = [row for row in rows if _step_of(row) <= self.step] if self.step else []
            write_text(self.metrics, "".join(row + "\n" for row in kept))
        parallel.barrier()
        return self.step

    def restore_optimizers(self, networks: dict[str, Trained]) -> None:
        """Load the checkpoint's optimizer states into networks already on its weights.

        Raises ValueError where entries are missing: moments that begin anew are another run.
        """
        if self.checkpoint is None:
            return
        for name, network in networks.items():
            file = self.checkpoint / "training" / f"{name}{STATE_FOLDER}"
            if not file.is_dir():  # one process wrote it
                file = file.with_name(f"{name}{STATE_FILE}")
            try:
                state = open_pieces(file)
            except ValueError as error:
                raise ValueError(f"{error}; {previous()}") from error
            if len(state) != self._entries.get(name):
                raise ValueError(
                    f"{file} has {len(state)} entries where {self._entries.get(name)} were "
                    f"written; {previous()}"
                )
            parallel.load_optimizer_state(network.model, network.optimizer, state)

    def weights(self, start: Path, name: str | None = None) -> Path:
        """Where to load a network's weights from: the newest checkpoint, else `start`. `name` is
        that of a further network; None is the folder's own model."""
        if self.checkpoint is None:
            return start
        return self.checkpoint if name is None else self.checkpoint / "training" / name

    def finish(self, model: Transformer) -> Path:
        """Write the finished model and return its folder."""
        self.settle()
        save_model(self.final, model, self.tokenizer, self.dtype)
        return self.finished()

    def finished(self) -> Path:
        """Note that all is done and `model/` stands; returns its folder."""
        self.settle()
        if parallel.is_main():
            written.note(self.path, *model_files(self.path))
            document = {"model": self.final.name, "amendments": amendments(self.path)}
            write_text(self.path / FINISHED, json.dumps(document) + "\n")
        parallel.barrier()
        return self.final


def model_files(path: Path) -> list[str]:
    """The names, from the run's folder, of its finished model's files."""
    return sorted(f"model/{file.name}" for file in (path / "model").iterdir() if file.is_file())


def named(step: int) -> str:
    """What the checkpoint after so many steps is called."""
    return f"step-{step:06d}"


def saved(checkpoints: Path) -> list[Path]:
    """All checkpoints, oldest first; whatever else lies there is none of ours."""
    found = [
        (int(match[1]), path)
        for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d{6,12})", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def newest(checkpoints: Path, *, fall_back: bool) -> Path | None:
    """The newest checkpoint, every file of it as it was written; None where there is none
    (collective: each rank reads a part of the files).

    Raises ValueError where a rank sees another one and, naming it, where it is damaged. With
    `fall_back` it is set aside instead and the one before it is taken.
    """
    while found := parallel.on_main(lambda: [path.name for path in saved(checkpoints)]):
        path = checkpoints / found.pop()
        parallel.same({"checkpoint": {"newest": path.name if (path / STATE).is_file() else "none"}})
        share = parallel.rank(), parallel.world_size()
        why = next(filter(None, parallel.gather(damage(path, PROOF, share))), None)
        if why is None:
            return path
        if not found:
            raise ValueError(
                f"{path} is damaged ({why}) and there is no other checkpoint; give another --out, "
                "or remove it to begin anew"
            )
        if not fall_back:
            way = advice("resume", "add --resume previous to set it aside and", "remove it to")
            raise ValueError(f"{path} is damaged ({why}); {way} go on from {found[-1]}")
        parallel.on_main(functools.partial(set_aside, path, why))
    return None


def set_aside(path: Path, why: str) -> None:
    """Put a damaged checkpoint out of the way (rank 0)."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    notice(f"{path} is damaged ({why}): set aside as {aside.name}")


def step_to_amend(path: Path) -> int:
    """The step after which a run would be amended: its newest checkpoint's, by name, or 0.

    Raises ValueError for a finished run that kept none, before anything is written.
    """
    found = saved(path / "checkpoints")
    if not found and is_finished(path):
        raise ValueError(
            f"{path} is finished and kept no checkpoint to go on from; start another run from "
            f"{path / 'model'}"
        )
    return int(found[-1].name[5:]) if found else 0


def save_model(
    folder: Path, model: Transformer, tokenizer: Path | None, dtype: torch.dtype = torch.float32
) -> None:
    """The model as a folder of its own, its weights in `dtype`, in place of an earlier one (all
    ranks take part). Raises ValueError where a number does not fit."""
    if parallel.world_size() == 1:
        with atomic_folder(folder) as partial:
            write_model(partial, model, tokenizer, dtype)
    else:
        saving.write(folder, saving.copy_model(model, tokenizer, dtype=dtype))


def write_model(
    folder: Path, model: Transformer, tokenizer: Path | None, dtype: torch.dtype = torch.float32
) -> None:
    """One process's model, one file in memory at a time."""
    tensors = parallel.full_parameters(model)
    write_tensors(folder, model.config, model.head, tensors, tokenizer, dtype=dtype)


def _step_of(row: str) -> float:
    """A row's step; a row cut short by a kill counts as after everything."""
    try:
        return float(json.loads(row)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
