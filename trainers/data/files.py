"""What a user names as data, opened in one place: files as they are, compressed or not, folders,
patterns, pipes, data sets by name.

How a file is packed is seen from its first bytes (gzip, Zstandard, Parquet), what is in it from its
ending: `.txt` is one text, `.json` a list of rows or rows one after the other, all else one JSON
object a line. Nothing is unpacked as a whole: a small file may hold terabytes. What can be read
only once, a pipe or a data set's rows, is copied to a temporary file when it is first asked for, so
that it can be looked at as often as a file, and pinned as one (`train.inputs`).
"""

import codecs
import gzip
import importlib
import json
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from glob import glob
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from puna.core import ranks
from puna.core.documents import json_lines, no_object, regular_file
from puna.core.terminal import say
from puna.trainers.data.arrays import json_values
from puna.trainers.data.mistaken import check_beginning, check_name

PACKED = (".gz", ".zst")
ENDINGS = (".jsonl", ".json", ".parquet", ".txt")  # what is read of a folder
GZIP, ZSTANDARD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
NAMED = "hf:"  # before the name of a data set
ZSTD_PACKAGE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
PATTERN = "*?["
PIPE = "-"
CODELESS = 4  # the version of `datasets` from which on it runs no code of a data set
LOOKED_AT = 1 << 12  # bytes of a file's beginning
TOGETHER = 256  # rows of a Parquet file that are in memory at a time

Rows = Iterator[tuple[str, dict[str, Any] | ValueError]]
"""(where it is, the row); for a row that is none the ValueError that says so"""


class Source(NamedTuple):
    """One file, and what it is called."""

    name: str
    file: Path


def sources(path: str | Path) -> list[Source]:
    """The files that a name stands for. Raises ValueError where there are none."""
    path = Path(path)
    name = str(path)
    if name.startswith(NAMED):
        return [Source(name, Path(copied_data_set(name).name))]
    if is_pipe(path):
        return [Source(name, Path(copied_pipe(name).name))]
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if is_data(each.relative_to(path)))
        files = [each for each in found if each.is_file()]
        for each in files:
            check_name(each, path)
        expected = ", ".join(ENDINGS)
        if not files:
            raise ValueError(f"{path} is a folder without data: no file in it ends with {expected}")
        return [readable(Source(str(each), each)) for each in files]
    if not path.exists() and any(sign in name for sign in PATTERN):
        files = sorted(Path(each) for each in glob(name, recursive=True) if Path(each).is_file())
        if not files:
            raise ValueError(f"{path}: no file fits this pattern")
        return [readable(Source(str(each), each)) for each in files]
    check_name(regular_file(path), path)
    return [readable(Source(name, path))]


def readable(source: Source) -> Source:
    """The same; ValueError where a file is seen to be neither rows nor a text."""
    if not is_parquet(source):
        with unpacked(source) as file:
            check_beginning(source.name, file.read(LOOKED_AT), is_text=is_text(source))
    return source


def is_data(path: Path) -> bool:
    """Whether a file in a folder is meant, by its name."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and ending(str(path)) in ENDINGS


def ending(name: str) -> str:
    """ ".jsonl" of "rows.jsonl.gz"."""
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def is_pipe(path: Path) -> bool:
    """Whether a name stands for something that can be read only once."""
    if str(path) == PIPE:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


@cache
def copied_pipe(name: str) -> IO[bytes]:
    """A temporary file with what a pipe gave; it is there until the process ends.

    Raises ValueError where several processes would share the pipe, or nothing is piped in.
    """
    if ranks.world_size() > 1:
        raise ValueError(f"{name} is a pipe, which one process alone can read; write it to a file")
    if name == PIPE and sys.stdin.isatty():
        raise ValueError("- stands for what is piped in, and nothing is; name a file")
    say(f"reading {name} to its end", error=True)
    copy = tempfile.NamedTemporaryFile(prefix="puna-")  # noqa: SIM115
    with os.fdopen(os.dup(0), "rb") if name == PIPE else Path(name).open("rb") as pipe:
        shutil.copyfileobj(pipe, copy)
    copy.flush()
    return copy


@cache
def copied_data_set(name: str) -> IO[bytes]:
    """A temporary file with the rows of "hf:owner/name" or "hf:owner/name:split", by the `datasets`
    package. Raises ValueError where that is not installed or does not find them."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{name} is read by the package datasets, which is not installed (pip install "
            "datasets); or name a file"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < CODELESS:
        raise ValueError(
            f"{name}: datasets {datasets.__version__} may run code that comes with data; install "
            f"version {CODELESS} or newer"
        )
    wanted, _, split = name.removeprefix(NAMED).partition(":")
    try:
        rows = datasets.load_dataset(wanted, split=split or "train")
    except Exception as error:  # the package's own, and those of what it stands on
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{name} cannot be read by the package datasets: {reason}") from error
    copy = tempfile.NamedTemporaryFile(prefix="puna-", suffix=".jsonl")  # noqa: SIM115
    for row in rows:
        copy.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
    copy.flush()
    return copy


def beginning(file: Path) -> bytes:
    """The first bytes of a file."""
    with file.open("rb") as opened:
        return opened.read(4)


@contextmanager
def unpacked(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked as they are read. Raises ValueError, inside, where what is
    packed is damaged."""
    first = beginning(source.file)
    broken: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    with source.file.open("rb") as file, ExitStack() as stack:
        inside: Any = file
        if first.startswith(GZIP):
            inside = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif first == ZSTANDARD:
            zstd = needed(ZSTD_PACKAGE, source.name)
            broken = (EOFError, zstd.ZstdError)
            inside = stack.enter_context(zstd.ZstdFile(file))
        try:
            yield inside
        except broken as error:
            raise ValueError(
                f"{source.name} is cut short or damaged ({error}); fetch it again"
            ) from error


def needed(package: str, name: str) -> Any:
    """A package that comes with the extra `data`; ValueError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        called = package if package == ZSTD_PACKAGE else package.split(".")[0]
        raise ValueError(
            f"{name} is read by the package {called}, which is not installed: "
            "pip install 'puna[data]'"
        ) from error


def is_text(source: Source) -> bool:
    """Whether a file is one text, and no rows: by its ending, or of a pipe by how it begins."""
    if not is_copy(source):
        return ending(source.name) == ".txt"
    return not is_parquet(source) and first_sign(source) not in (b"{", b"[", b"")


def is_copy(source: Source) -> bool:
    """Whether it is what a pipe gave, whose name says nothing."""
    return source.name != str(source.file)


def first_sign(source: Source) -> bytes:
    """The first byte that is no blank."""
    with unpacked(source) as file:
        return file.read(LOOKED_AT).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def is_parquet(source: Source) -> bool:
    return beginning(source.file) == PARQUET


def is_packed(source: Source) -> bool:
    """Whether a file's size is not that of what is in it."""
    first = beginning(source.file)
    return first.startswith(GZIP) or first in (ZSTANDARD, PARQUET)


def each_row(source: Source) -> Rows:
    """All rows of a file, one after the other; ValueError where it ends too early."""
    if is_parquet(source):
        yield from parquet_rows(source)
        return
    begins_as_list = first_sign(source) == b"["
    is_list = ending(source.name) == ".json" or (is_copy(source) and begins_as_list)
    if begins_as_list and not is_list:
        raise ValueError(
            f"{source.name} begins as a JSON list and not with one object a line; give it a name "
            "that ends in .json"
        )
    with unpacked(source) as file:
        if is_list:
            for where, row in json_values(file, source.name):
                is_object = isinstance(row, dict)
                yield where, row if is_object else no_object(row, where, "an object with columns")
        else:
            yield from json_lines(file, source.name)


def parquet_rows(source: Source) -> Rows:
    parquet = needed("pyarrow.parquet", source.name)
    number = 0
    try:
        with parquet.ParquetFile(source.file) as file:
            for batch in file.iter_batches(TOGETHER):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{source.name}: row {number}", row
    except needed("pyarrow", source.name).ArrowException as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{source.name} is no whole Parquet file ({reason}); fetch it again"
        ) from error
