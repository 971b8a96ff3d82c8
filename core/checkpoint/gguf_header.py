"""The head of a GGUF file, llama.cpp's format: its settings and where its tensors lie.

Read by hand and not by the `gguf` package, which believes every length that a file states: here
nothing is counted further than the file has bytes.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from puna.core.documents import regular_file

MAGIC = b"GGUF"
LARGEST_HEAD = 1 << 28  # bytes; 256,000 tokens and their merges take 12 MB
DEEPEST = 4  # arrays of arrays
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
REMEDY = "fetch it again"


class Place(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]  # rows first, as in PyTorch
    kind: int  # ggml's number of the type
    offset: int  # bytes from the file's beginning


class Header(NamedTuple):
    """What a GGUF file says before its weights."""

    values: dict[str, Any]
    tensors: dict[str, Place]


def read_header(path: Path) -> Header:
    """The head of the GGUF file at `path`; ValueError where it is none or damaged."""
    regular_file(path, "no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            return _read(_Reader(file, min(size, LARGEST_HEAD)), size)
        except ValueError as error:
            raise ValueError(f"{path} is damaged or no GGUF file ({error}); {REMEDY}") from error


class _Reader:
    """Numbers and texts one behind the other, none beyond `size` bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("it ends too early")
        self.left -= count
        found = self.file.read(count)
        if len(found) < count:
            raise ValueError("it ends too early")
        return found

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("a text is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == DEEPEST:
            raise ValueError(f"a value has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            form = SCALARS[inner]
            data = self.take(count * struct.calcsize("<" + form))
            return list(struct.unpack(f"<{count}{form}", data))
        if count > self.left // 8:
            raise ValueError("it ends too early")
        return [self.value(inner, depth + 1) for _ in range(count)]


def _read(reader: _Reader, size: int) -> Header:
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, expected 2 or 3")
    tensors, count = reader.number("Q"), reader.number("Q")
    values = _named(reader, count, lambda: reader.value(reader.number("I")))
    places = _named(reader, tensors, lambda: _place(reader))
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise ValueError("its alignment is no number of bytes")
    head = min(size, LARGEST_HEAD) - reader.left
    begin = -(-head // alignment) * alignment
    found = {name: at._replace(offset=at.offset + begin) for name, at in places.items()}
    return Header(values, found)


def _named(reader: _Reader, count: int, read: Callable[[], Any]) -> dict[str, Any]:
    """So many values by their names."""
    if count > reader.left // 8:
        raise ValueError("it ends too early")
    found: dict[str, Any] = {}
    for _ in range(count):
        name = reader.text()
        if name in found:
            raise ValueError("a name comes up twice")
        found[name] = read()
    return found


def _place(reader: _Reader) -> Place:
    dimensions = reader.number("I")
    if not 1 <= dimensions <= 4:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    return Place(shape, reader.number("I"), reader.number("Q"))
