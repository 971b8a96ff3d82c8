"""Folders and files that appear whole or not at all.

What is written stands under a hidden name until it is on disk, then it is renamed: a reader
never sees half of it, and a kill at any moment leaves the old or the new.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, else disappears.

    An earlier model at `path` stays until all is on disk. Raises ValueError where `path` holds
    something else than a model or another process is writing it, OSError with one sentence where
    the disk is full.
    """
    path = Path(path).resolve()
    recover(path)
    if path.exists() and not (path / "config.json").exists() and any(_entries(path)):
        raise ValueError(f"{path} exists and holds no model; choose another folder")
    partial, previous = _beside(path)
    made = make_folder(path.parent)
    with _alone(partial, path):
        try:
            with naming_full_disk(path):
                yield partial
                _flush_tree(partial)
            if path.exists():
                path.rename(previous)
            partial.rename(path)
            flush(path.parent)
        except BaseException:
            recover(path)
            shutil.rmtree(partial, ignore_errors=True)
            remove_empty(made)
            raise
        shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _alone(partial: Path, path: Path) -> Iterator[None]:
    """Make the folder `partial`, and hold it. Raises ValueError where a process that lives has it;
    what a killed one left goes."""
    with suppress(FileNotFoundError):
        left = _held(partial, path)
        shutil.rmtree(partial, ignore_errors=True)
        os.close(left)
    with naming_full_disk(path):
        partial.mkdir(exist_ok=True)
    held = _held(partial, path)
    try:
        yield
    finally:
        os.close(held)


def _held(partial: Path, path: Path) -> int:
    """The folder's lock, which ends with the process; a file system without locks has none."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise ValueError(
                f"{path} is being written by another process; wait for it, or give another name"
            ) from None
    return descriptor


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well.

    Raises OSError with one sentence where the disk is full, ValueError where `path` is a folder, a
    device or a pipe: as root the rename would take a device's place.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that could be replaced; give another name")
    partial, _ = _beside(path)
    made = make_folder(path.parent)
    try:
        with naming_full_disk(path):
            yield partial
            flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        remove_empty(made)  # where nothing was written


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it that are missing; returns what was made, innermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    with naming_full_disk(path):
        path.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, up to the first that holds something."""
    with suppress(OSError):
        for each in folders:
            each.rmdir()


def check_absent(path: Path, option: str = "--out") -> None:
    """ValueError where something stands at `path`, which a command would replace unasked: another
    file's name is soon typed by mistake, and a tokenizer made anew is not the one of its models."""
    if path.exists():
        raise ValueError(f"{path} is there already; give another {option}, or remove it")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`text` as the whole of `path`, in UTF-8: what stood there stays until all is on disk.

    Raises OSError with one sentence where the disk is full.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Where writing fails inside for want of room, an OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_disk_full(error):
            raise
        raise OSError(
            f"the disk is full: {path} was not written and what stood there is untouched; "
            "free some space and run again"
        ) from error


def _beside(path: Path) -> tuple[Path, Path]:
    """Hidden names for a folder that is being written and for the one it replaces."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.previous")


def recover(path: Path) -> None:
    """Finish what a kill between the two renames of `atomic_folder` left undone."""
    path = path.resolve()
    previous = _beside(path)[1]
    if not previous.exists():
        return
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        return
    try:
        previous.rename(path)
    except FileNotFoundError:
        pass  # another process was faster


def _entries(path: Path) -> Iterator[Path]:
    return path.iterdir() if path.is_dir() else iter([path])


def _flush_tree(folder: Path) -> None:
    """Force every file and folder below `folder` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush(Path(root) / name)
        flush(Path(root))


def flush(path: Path) -> None:
    """Force a file's or a folder's contents to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for want of room, in the words of Python, safetensors or torch."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    if isinstance(error, SafetensorError):
        return any(f"(os error {code})" in str(error) for code in full)
    # torch.save names no reason; a short write is all it reports.
    return isinstance(error, RuntimeError) and bool(
        re.search(r"PytorchStreamWriter failed|unexpected pos", str(error))
    )
