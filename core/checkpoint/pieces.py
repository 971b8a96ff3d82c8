"""Named tensors in pieces: each rank writes its own, and any number of ranks reads what it needs.

The files are those of PyTorch's distributed checkpoint (DCP) in its Hugging Face form: safetensors
whose header says, under DCP_SHARDING_INFO, where each piece begins in its whole tensor; PyTorch's
HuggingFaceStorageReader reads them. DCP's own code is left out: its usual form keeps a pickle
(.metadata), which runs what a stranger wrote into it; its Hugging Face writer builds every file a
second time in memory; and its planner has all ranks talk before a write and a read, where a rank
here looks at headers alone. A file that says nothing of pieces holds whole tensors.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puna.core.documents import as_name, parse_json

PLACES = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"
Block = tuple[slice, ...]


class Piece(NamedTuple):
    """A block of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """where it begins in the whole"""


class Sliced(Protocol):
    """What a block can be taken of: a tensor, or one that lies in files."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, block: Block, /) -> Tensor: ...


class _Place(NamedTuple):
    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def metadata(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """What the header of a file of these pieces says besides."""
    places = {name: {OFFSETS: list(piece.offsets)} for name, piece in pieces.items()}
    return {PLACES: json.dumps(places)}


class Stored:
    """A tensor that lies in files, in pieces: `stored[block]` reads that block of it, on the CPU.

    It may be a view of a mapped file: copy it.
    """

    def __init__(self, name: str, places: list[_Place]):
        self.name, self.places = name, places

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        ends = [
            [begin + size for begin, size in zip(place.offsets, place.shape, strict=True)]
            for place in self.places
        ]
        return torch.Size(max(each) for each in zip(*ends, strict=True))

    def __getitem__(self, block: Block) -> Tensor:
        """Raises ValueError where a part of it is in no file, or a file is damaged."""
        parts = []
        for place in self.places:
            where = [
                (max(s.start, begin), min(s.stop, begin + size))
                for s, begin, size in zip(block, place.offsets, place.shape, strict=True)
            ]
            if all(start < stop for start, stop in where):
                parts.append((self._read(place, where), where))
        wanted = [s.stop - s.start for s in block]
        if sum(part.numel() for part, _ in parts) != math.prod(wanted):
            folder = self.places[0].file.parent
            raise ValueError(
                f"{folder} does not hold all of {as_name(self.name)}; resume from a checkpoint "
                "that is whole"
            )
        if len(parts) == 1:
            return parts[0][0]
        whole = torch.empty(wanted, dtype=parts[0][0].dtype if parts else None)
        for part, where in parts:
            starts = zip(block, where, strict=True)
            whole[tuple(slice(a - s.start, b - s.start) for s, (a, b) in starts)] = part
        return whole

    def _read(self, place: _Place, where: list[tuple[int, int]]) -> Tensor:
        block = zip(where, place.offsets, strict=True)
        # Opened anew each time: the pages of a file kept open would count as ours.
        with _opened(place.file) as file:
            return file.get_slice(self.name)[tuple(slice(a - o, b - o) for (a, b), o in block)]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error


def open_pieces(path: Path) -> dict[str, Stored]:
    """All tensors of one file, or of a folder of files; nothing but headers is read.

    Raises ValueError where a file cannot be read or does not say where its pieces belong.
    """
    found: dict[str, list[_Place]] = {}
    for each in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with _opened(each) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            said = (file.metadata() or {}).get(PLACES)
        offsets = {name: (0,) * len(shape) for name, shape in shapes.items()}
        if said is not None:
            offsets = _offsets(each, said)
        for name, shape in shapes.items():
            begin = offsets.get(name, ())
            if len(begin) != len(shape) or any(n < 0 for n in begin):
                raise ValueError(f"{each} does not say where its piece of {as_name(name)} belongs")
            found.setdefault(name, []).append(_Place(each, begin, shape))
    return {name: Stored(name, places) for name, places in found.items()}


def _offsets(file: Path, said: str) -> dict[str, tuple[int, ...]]:
    """Name -> where its piece begins, as the header says."""
    try:
        places = parse_json(said.encode(), str(file), "resume from a checkpoint that is whole")
        return {name: tuple(int(n) for n in place[OFFSETS]) for name, place in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} does not say where its pieces belong") from error
