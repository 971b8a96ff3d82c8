"""SHA-256 of the files in a folder: written with it, held against it when it is read.

A flipped bit in weights or moments is a valid number; only a hash tells. One thread does 1.4 GB a
second (measured, Zen 4), several files are read side by side.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HASHES = "sha256.json"
PIECE = 1 << 20  # bytes read at a time
THREADS = 4


class Digest(NamedTuple):
    """What a file holds."""

    sha256: str
    bytes: int
    lines: int


def digest(path: Path) -> Digest:
    """Of one file, read once from end to end."""
    state, size, lines = hashlib.sha256(), 0, 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            state.update(piece)
            size += len(piece)
            lines += piece.count(b"\n")
    return Digest(state.hexdigest(), size, lines)


def leading(path: Path, size: int) -> str:
    """The hash of the first `size` bytes of a file."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while size > 0 and (piece := file.read(min(PIECE, size))):
            state.update(piece)
            size -= len(piece)
    return state.hexdigest()


def digests(paths: Iterable[Path]) -> list[Digest]:
    """Of several files, in their order."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(digest, paths))


def write_hashes(folder: Path, name: str = HASHES, known: Mapping[str, str] | None = None) -> None:
    """Note the hash of every file below `folder` in the file `name` there; `known` are those that
    need not be read again."""
    hashes = dict(known or {})
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names = sorted(files - hashes.keys())
    read = digests(folder / each for each in names)
    hashes |= {each: found.sha256 for each, found in zip(names, read, strict=True)}
    text = json.dumps(hashes, indent=2, sort_keys=True)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def damage(folder: Path, name: str = HASHES, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a folder that `write_hashes` was called for; None where nothing is.

    Files that were put there later are no damage. With the `share` (n, of) that all are there is
    seen, and the n-th part of so many is read: several ranks read the whole together.
    """
    try:
        noted = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{name} is missing"
    except (ValueError, OSError):
        return f"{name} cannot be read"
    if not isinstance(noted, dict) or not noted:
        return f"{name} names no files"
    paths = {each: folder / os.path.normpath(each) for each in noted}
    for each, path in paths.items():
        if not path.is_file():
            return f"{each} is missing"
    mine = list(paths)[share[0] :: share[1]]
    for each, found in zip(mine, digests(paths[each] for each in mine), strict=True):
        if found.sha256 != noted[each]:
            return f"{each} is not what was written"
    return None
