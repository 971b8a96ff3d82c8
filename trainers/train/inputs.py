"""What a run reads, pinned: a digest of every file that its options name, in inputs.json.

A run that is continued must go on with what it began with. Names and places may change, contents
may not.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from puna.core.checkpoint.hashes import digests
from puna.core.documents import count_of
from puna.trainers.data.files import Source, is_copy, sources
from puna.trainers.train.kinds import Kind, kinds_of
from puna.trainers.train.notice import notice
from puna.trainers.train.paths import path_fields

OF_A_MODEL = ("config.json", "params.json", "corpus.json")  # one of these is in its folder
# Of a model's folder; a README may come and go.
READ_OF_A_MODEL = (".safetensors", ".json", ".model", ".jinja")
LARGE = 2_000_000_000  # bytes that take seconds to read: said

Inputs = dict[str, list[dict[str, Any]]]
"""Option -> its files, each as {"path", "bytes", "lines", "sha256"}"""


Given = Mapping[str, Iterable[Any] | Callable | None]
"""Argument -> rows of JSON, or a function, that came from Python and not from a file; or nothing"""


def inputs_of(config: Any, given: Given | None = None) -> Inputs:
    """The digests of all files that `config` names, `out` left out; and of what was `given`."""
    cls: type = type(config)
    named = {
        name: [
            source
            for path in paths_in(getattr(config, name))
            for source in files_of(path, is_data=path_fields(cls).get(name, False))
        ]
        for name, kind in kinds_of(cls).items()
        if kind is Kind.FILES and name != "out"
    }
    files = [source.file for found in named.values() for source in found]
    size = sum(file.stat().st_size for file in files)
    if size > LARGE:
        notice(f"reading {size / 1e9:.1f} GB of inputs to pin them")
    found = dict(zip(files, digests(files), strict=True))
    inputs = {
        name: [{"path": called(source), **found[source.file]._asdict()} for source in listed]
        for name, listed in named.items()
        if listed
    }
    from_python = {name: value for name, value in (given or {}).items() if value is not None}
    return inputs | {
        name: [of_function(value) if callable(value) else of_rows(value)]
        for name, value in from_python.items()
    }


def paths_in(value: Any) -> list[Path]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, Path)]


def files_of(path: Path, *, is_data: bool) -> list[Source]:
    """The file itself, what is read of a model folder, or what a folder, a pattern, a pipe of data
    stands for; nothing where there is nothing: whoever opens it says so better."""
    if not is_data and path.is_file():
        return [Source(str(path), path)]
    if (not is_data and path.is_dir()) or any((path / name).is_file() for name in OF_A_MODEL):
        inside = sorted(path.iterdir())
        files = [each for each in inside if each.suffix in READ_OF_A_MODEL and each.is_file()]
        return [Source(str(each), each) for each in files]
    try:
        return sources(path) if is_data else []
    except ValueError:
        return []


def called(source: Source) -> str:
    """A file's whole path; of a pipe its name."""
    return source.name if is_copy(source) else str(source.file.resolve())


def of_rows(rows: Iterable[Any]) -> dict[str, Any]:
    state, count = hashlib.sha256(), 0
    for row in rows:
        state.update(json.dumps(row).encode() + b"\n")
        count += 1
    return {"path": None, "sha256": state.hexdigest(), "lines": count}


def of_function(function: Callable) -> dict[str, Any]:
    """Its name: what it does cannot be compared."""
    named = function if hasattr(function, "__qualname__") else type(function)
    name = f"{named.__module__}.{named.__qualname__}"
    return {"path": None, "sha256": hashlib.sha256(name.encode()).hexdigest(), "name": name}


def differences(before: Inputs, now: Inputs) -> list[str]:
    """One phrase for each option whose files are not those of before."""
    return [
        phrase
        for name in sorted(before.keys() | now.keys())
        if (phrase := difference(name, before.get(name, []), now.get(name, []))) is not None
    ]


def difference(name: str, before: list[dict], now: list[dict]) -> str | None:
    if [each["sha256"] for each in before] == [each["sha256"] for each in now]:
        return None
    if len(before) != len(now):
        return f"{name} is {count_of(len(now), 'file')} where it was {len(before)}"
    old, new = next(
        (old, new) for old, new in zip(before, now, strict=True) if old["sha256"] != new["sha256"]
    )
    what = os.path.basename(new["path"]) if new["path"] else "what was handed over"
    return f"{name}: {what} is {size(new)} where it was {size(old)}"


def size(file: dict[str, Any]) -> str:
    """Rows where a file has them, bytes where not; of a function its name."""
    if "name" in file:
        return file["name"]
    tail = f" (sha256 {file['sha256'][:8]})"
    name = file["path"] or ".jsonl"
    if name.endswith((".jsonl", ".txt")):
        return f"{count_of(file['lines'], 'row')}{tail}"
    return f"{count_of(file['bytes'], 'byte')}{tail}"
