"""Model folders and checkpoints of several ranks: each writes a part of the files, all at once.

A rank copies its part into its own memory first: some of the model's files (weights are gathered
one at a time, and one rank keeps each) and its own pieces of the optimizers' states. What is copied
is written by a thread of each rank, behind the training where that need not wait for it. The folder
is renamed into place when every rank has written and flushed its files.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.core import parallel
from puna.core.checkpoint.atomic import atomic_folder, flush, naming_full_disk
from puna.core.checkpoint.folder import write_texts
from puna.core.checkpoint.hashes import digest
from puna.core.checkpoint.pieces import metadata
from puna.core.checkpoint.shards import file_names, save_tensors, shared_out, write_index
from puna.core.checkpoint.source import as_type
from puna.core.model import Transformer
from puna.core.parameters import parameter_shapes


class Trained(NamedTuple):
    """A network with the optimizer that trains it."""

    model: Transformer
    optimizer: torch.optim.Optimizer


class File(NamedTuple):
    """What this rank is to write into a .safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Copied(NamedTuple):
    """What is to be written, as it was when it was copied."""

    files: dict[str, File]
    """this rank's, by name from the folder"""
    texts: Callable[[Path], None]
    """writes what rank 0 writes alone, into the folder"""


def copy_model(
    model: Transformer,
    tokenizer: Path | None,
    place: str = ".",
    dtype: torch.dtype = torch.float32,
) -> Copied:
    """This rank's files of a model folder, in `place` of what is written (collective).

    Raises ValueError where a number does not fit `dtype`.
    """
    shapes = parameter_shapes(model.config, model.head)
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards = shared_out(sizes, parallel.world_size())
    own = shards[parallel.rank() :: parallel.world_size()]
    mine = {name for names in own for name in names}
    held = {
        name: as_type(name, tensor, dtype).contiguous()
        for name, tensor in parallel.full_parameters(model, mine.__contains__)
    }
    files = {
        f"{place}/{file}": File({name: held[name] for name in names}, {})
        for file, names in zip(file_names(len(shards)), shards, strict=True)
        if names[0] in held
    }

    def texts(folder: Path) -> None:
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_texts(folder / place, model.config, model.head, tokenizer, dtype=dtype)
        write_index(folder / place, shards, sum(sizes.values()))

    return Copied(files, texts)


def copy_state(network: Trained, place: str) -> tuple[Copied, int]:
    """This rank's pieces of an optimizer's state, one file in the folder `place`, and (on rank 0)
    of how many tensors they are."""
    state = parallel.optimizer_state(*network)
    name = f"{place}/shard-{parallel.rank() + 1:05d}-of-{parallel.world_size():05d}.safetensors"
    file = File({key: piece.tensor for key, piece in state.items()}, metadata(state))

    def texts(folder: Path) -> None:
        (folder / place).mkdir(parents=True, exist_ok=True)

    return Copied({name: file}, texts), len(state)


def together(copies: list[Copied]) -> Copied:
    """All of them, as one."""

    def texts(folder: Path) -> None:
        for each in copies:
            each.texts(folder)

    return Copied({name: file for each in copies for name, file in each.files.items()}, texts)


def write(
    target: Path,
    copied: Copied,
    finish: Callable[[Path, dict[str, str]], None] = lambda folder, hashes: None,
    group: Any = None,
) -> None:
    """The folder `target`, whole or not at all (collective in `group`); `finish` is called on rank
    0, with the hashes of all ranks' files by name, before it is put in its place.

    Raises ValueError on every rank, in one sentence, where one of them could not write.
    """
    with ExitStack() as stack:

        def begin() -> str:
            partial = stack.enter_context(atomic_folder(target))
            with naming_full_disk(target):
                copied.texts(partial)
            return str(partial)

        def end() -> None:
            with naming_full_disk(target):
                finish(partial, {name: each for some in hashes for name, each in some.items()})
            stack.close()

        partial = Path(parallel.on_main(begin, group))
        hashes = parallel.on_all(lambda: write_files(target, partial, copied.files), group)
        parallel.on_main(end, group)


def write_files(target: Path, partial: Path, files: Mapping[str, File]) -> dict[str, str]:
    """This rank's files, on disk; returns their hashes by name."""
    hashes = {}
    with naming_full_disk(target):
        for name, file in files.items():
            path = partial / name
            save_tensors(file.tensors, path, like=partial / "config.json", metadata=file.metadata)
            flush(path)
            hashes[path.relative_to(partial).as_posix()] = digest(path).sha256
    return hashes


def behind(work: Callable[[], Any]) -> Future[Any]:
    """`work`, done by a thread; the process does not end before it."""
    threads = ThreadPoolExecutor(1, "checkpoint")
    future = threads.submit(work)
    threads.shutdown(wait=False)
    return future
