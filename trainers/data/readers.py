"""Readers of the files a user brings: texts, dialogues, preferences, prompts.

Every file is `.jsonl`, one JSON object a line; a text may also be a `.txt`, which is one
document. What each kind of row may look like is in `formats.py`. A row that cannot be read stops
the reader with `file:line: what is wrong, what was expected`; a row that can be read but not
used is skipped, counted and named.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from puna.trainers.data.formats import (
    Columns,
    Dialogue,
    Malformed,
    Preference,
    Prompt,
    Ratings,
    Unusable,
    parse_dialogue,
    parse_preference,
    parse_prompt,
    parse_text,
)

T = TypeVar("T")


class Skipped(Counter[str]):
    """How many rows were skipped for each reason; `first` says where each was met first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str) -> None:
        """Counts one row, found at `where` (such as `file:line`)."""
        self[reason] += 1
        self.first.setdefault(reason, where)

    def merge(self, other: "Skipped") -> None:
        """Adds the counts of another reader."""
        self.update(other)
        self.first = {**other.first, **self.first}

    def __str__(self) -> str:
        """One line for each reason, most frequent first; empty where nothing was skipped."""
        return "\n".join(
            f"skipped {count} {'row' if count == 1 else 'rows'}: {reason} (first {where})"
            for reason, count in self.most_common()
            for where in [self.first[reason]]
        )


def read_texts(path: str | Path, columns: Columns | None = None) -> tuple[list[str], Skipped]:
    """Documents of a `.txt` (the whole file is one) or a `.jsonl` with `text`.

    Raises ValueError where the file is absent, has a line that cannot be read, or no usable row;
    so do the other readers.
    """
    path = Path(path)
    if path.suffix != ".txt":
        return _read(path, lambda row: parse_text(row, columns or Columns()))
    try:
        text = _existing(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8, expected UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return [text.replace("\r\n", "\n")], Skipped()


def read_dialogues(
    path: str | Path, columns: Columns | None = None
) -> tuple[list[Dialogue], Skipped]:
    """Dialogues to learn from: rows of `messages`, or of `prompt` and `response`."""
    return _read(path, lambda row: parse_dialogue(row, columns or Columns()))


def parse_dialogues(
    rows: Iterable[Any], columns: Columns | None = None
) -> tuple[list[Dialogue], Skipped]:
    """`read_dialogues` of rows that are in memory already: as in a file, or bare lists of messages.

    The rows are counted from 1. Raises ValueError for one that cannot be read, or no usable row.
    """
    columns = columns or Columns()
    found = [(f"row {number}", _object(row, columns)) for number, row in enumerate(rows, start=1)]
    if not found:
        raise ValueError("there are no dialogues to learn from; an iterator gives its rows once")
    return _usable("the dialogues", found, lambda row: parse_dialogue(row, columns))


def _object(row: Any, columns: Columns) -> Any:
    return {columns.messages: list(row)} if isinstance(row, (list, tuple)) else row


def read_preferences(
    path: str | Path, columns: Columns | None = None, ratings: Ratings | None = None
) -> tuple[list[Preference], Skipped]:
    """Comparisons: native rows, `prompt/chosen/rejected`, transcripts, or answers a and b."""
    return _read(path, lambda row: parse_preference(row, columns or Columns(), ratings or {}))


def read_prompts(path: str | Path, columns: Columns | None = None) -> tuple[list[Prompt], Skipped]:
    """Prompts to be answered: rows of `messages` or `prompt`, and perhaps `safety`."""
    return _read(path, lambda row: parse_prompt(row, columns or Columns()))


def _read(path: str | Path, parse: Callable[[dict[str, Any]], T]) -> tuple[list[T], Skipped]:
    path = _existing(Path(path))
    return _usable(str(path), _json_rows(path), parse)


def _usable(
    source: str, rows: Iterable[tuple[str, Any]], parse: Callable[[dict[str, Any]], T]
) -> tuple[list[T], Skipped]:
    """What `parse` makes of each (where it is, row) of `source`."""
    parsed: list[T] = []
    skipped = Skipped()
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise Malformed(f"a {type(row).__name__}, expected an object with named columns")
            parsed.append(parse(dict(row)))
        except Unusable as reason:
            skipped.add(str(reason), where)
        except Malformed as error:
            raise ValueError(f"{where}: {error}") from error
    if not parsed:
        found = str(skipped).replace("\n", "; ") or "the file is empty"
        raise ValueError(f"{source}: no usable row: {found}")
    return parsed, skipped


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8, expected UTF-8 text") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error.msg} at column {error.colno}), "
                    "expected one JSON object a line"
                ) from error
            except RecursionError as error:
                raise ValueError(f"{path}:{number}: the JSON is nested too deeply") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}:{number}: a JSON {type(row).__name__}, expected one object a line"
                )
            yield f"{path}:{number}", row


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return path
