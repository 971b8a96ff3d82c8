"""What is opened now and read later, piece by piece, is that of one moment.

A model's files are opened anew for each tensor, and a run that ends puts another model of the same
shape in the place of the one before it: its size tells nothing, and half of each would be a model
that nobody has trained. Texts are hashed first and read afterwards, for hours. The time of the last
change tells, to the file system's clock (some milliseconds on Linux).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.checkpoint.source import Source

Stamps = Mapping[Path, tuple[int, int] | None]
"""File -> (bytes, time of the last change in ns); None where it is not there"""


def stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def stamps_of(files: Iterable[Path]) -> Stamps:
    """What `check_unchanged` holds the files against."""
    return {file: stamp(file) for file in files}


def check_unchanged(stamps: Stamps) -> None:
    """ValueError where a file is not as it was."""
    for file, before in stamps.items():
        if stamp(file) != before:
            raise ValueError(
                f"{file} was changed while it was read; run the same command again when nobody "
                "writes there"
            )


def weights_in(path: Path) -> list[Path]:
    """What a model is read from: the file itself, or the folder's files."""
    return [path / "config.json", *sorted(path.glob("*.safetensors"))] if path.is_dir() else [path]


def steady(source: Source, stamps: Stamps) -> Source:
    """`source`, whose tensors raise ValueError where a file is not as it was at its `stamps`."""
    return source._replace(tensors=Steady(source, stamps))


@dataclass(frozen=True)
class Steady:
    """The tensors of a source; called, it gives them one by one."""

    source: Source
    stamps: Stamps

    def __call__(self) -> Iterator[Any]:
        return self._checked(self.source.tensors)

    def pieces(self) -> Iterator[Any]:
        """As Source.pieces gives them."""
        return self._checked(self.source.pieces)

    def _checked(self, read: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        """Each is looked at when it has been read: what changes later is no part of it."""
        for each in read():
            check_unchanged(self.stamps)
            yield each
