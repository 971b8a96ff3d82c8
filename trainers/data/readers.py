"""Readers of the files a user brings: texts, dialogues, preferences, prompts.

Every file is `.jsonl`, one JSON object a line; a text may also be a `.txt`, which is one
document. What each kind of row may look like is in `formats.py`. A row that cannot be read stops
the reader with `file:line: what is wrong, what was expected`; a row that can be read but not
used is skipped, counted and named.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from puna.core.documents import json_rows, listed, regular_file
from puna.trainers.data.answered import Answered, parse_answered
from puna.trainers.data.formats import (
    Columns,
    Dialogue,
    Ghost,
    Preference,
    Preprompt,
    Prompt,
    Ratings,
    parse_dialogue,
    parse_ghost,
    parse_instruction,
    parse_preference,
    parse_preprompt,
    parse_prompt,
    parse_text,
)
from puna.trainers.data.messages import Malformed, Unusable, inside_messages

T = TypeVar("T")


class Skipped(Counter[str]):
    """How many rows were skipped for each reason; `first` says where each was met first. `notes`
    are sentences on what else of the rows is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}
        self.notes: list[str] = []

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return len(self) > 0 or bool(self.notes)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Counts rows, the first of them found at `where` (such as `file:line`)."""
        self[reason] += count
        self.first.setdefault(reason, where)

    def merge(self, other: "Skipped") -> None:
        """Adds the counts of another reader."""
        self.update(other)
        self.first = {**other.first, **self.first}
        self.notes += other.notes

    def merge_held_out(self, other: "Skipped") -> None:
        """Adds the counts of rows that were held out."""
        for reason, count in other.items():
            self.add(f"held out, and {reason}", other.first[reason], count)
        self.notes += other.notes

    def reasons(self) -> str:
        """One line for each reason, most frequent first; empty where nothing was skipped."""
        return "\n".join(
            f"skipped {count} {'row' if count == 1 else 'rows'}: {reason} (first {where})"
            for reason, count in self.most_common()
            for where in [self.first[reason]]
        )

    def __str__(self) -> str:
        """The reasons and the notes, one a line."""
        return "\n".join([*filter(None, [self.reasons()]), *self.notes])


class Row(dict[str, Any]):
    """A row that notes in `read`, which the rows of a file share, which columns are looked at."""

    def __init__(self, columns: Mapping[str, Any], read: set[str]):
        super().__init__(columns)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def read_texts(path: str | Path, columns: Columns | None = None) -> tuple[list[str], Skipped]:
    """Documents of a `.txt` (the whole file is one) or a `.jsonl` with `text`.

    Raises ValueError where the file is absent, has a line that cannot be read, or no usable row;
    so do the other readers.
    """
    skipped = Skipped()
    return [*each_text(path, columns, skipped)], skipped


def each_text(path: str | Path, columns: Columns | None, skipped: Skipped) -> Iterator[str]:
    """`read_texts`, one document after the other; what is skipped is added in the end."""
    path = Path(path)
    if path.suffix != ".txt":
        rows = json_rows(path)
        yield from _each(
            str(path), rows, lambda row: parse_text(row, columns or Columns()), skipped
        )
        return
    try:
        text = regular_file(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8, expected UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    yield text.replace("\r\n", "\n")


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


def read_answered(
    path: str | Path, columns: Columns | None = None
) -> tuple[list[Answered], Skipped]:
    """Answers to be judged: dialogues as above with perhaps `safety`, or rows of samples.jsonl."""
    return _read(path, lambda row: parse_answered(row, columns or Columns()))


def read_preferences(
    path: str | Path, columns: Columns | None = None, ratings: Ratings | None = None
) -> tuple[list[Preference], Skipped]:
    """Comparisons: native rows, `prompt/chosen/rejected`, transcripts, or answers a and b."""
    return _read(path, lambda row: parse_preference(row, columns or Columns(), ratings or {}))


def read_ghosts(path: str | Path, *, alone: bool = False) -> tuple[list[Ghost], Skipped]:
    """What Ghost Attention samples from: rows of `turns` or `messages`, and perhaps `instruction`
    and `short`; with `alone`, rows of the last two."""
    return _read(path, parse_instruction if alone else parse_ghost)


def read_prompts(path: str | Path, columns: Columns | None = None) -> tuple[list[Prompt], Skipped]:
    """Prompts to be answered: rows of `messages` or `prompt`, and perhaps `safety`, `category`."""
    return _read(path, lambda row: parse_prompt(row, columns or Columns()))


def read_preprompts(path: str | Path) -> tuple[list[Preprompt], Skipped]:
    """What is put before adversarial prompts: rows of `preprompt`, and perhaps `category`."""
    return _read(path, parse_preprompt)


def _read(path: str | Path, parse: Callable[[Mapping[str, Any]], T]) -> tuple[list[T], Skipped]:
    return _usable(str(path), json_rows(Path(path)), parse)


def _usable(
    source: str, rows: Iterable[tuple[str, Any]], parse: Callable[[Mapping[str, Any]], T]
) -> tuple[list[T], Skipped]:
    skipped = Skipped()
    return [*_each(source, rows, parse, skipped)], skipped


def _each(
    source: str,
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[Mapping[str, Any]], T],
    skipped: Skipped,
) -> Iterator[T]:
    """What `parse` makes of each (where it is, row) of `source`; what has a place for it is told
    where it is. Columns that no row's parsing looks at are named in the end."""
    usable = 0
    own = Skipped()
    read: set[str] = set()
    columns: dict[str, None] = {}  # in the order in which they are met
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise Malformed(f"a {type(row).__name__}, expected an object with named columns")
            if unread := row.keys() - read:  # in most files of the first row alone
                columns |= dict.fromkeys(name for name in row if name in unread)
                row = Row(row, read)
            found: Any = parse(row)
            columns |= dict.fromkeys(inside_messages(row))
        except Unusable as reason:
            own.add(str(reason), where)
            continue
        except Malformed as error:
            raise ValueError(f"{where}: {error}") from error
        usable += 1
        yield found._replace(where=where) if hasattr(found, "where") else found
    if not usable:
        reasons = own.reasons().replace("\n", "; ") or "the file is empty"
        raise ValueError(f"{source}: no usable row: {reasons}")
    if never := [name for name in columns if name not in read]:
        several = len(never) > 1
        own.notes.append(
            f"{source}: the column{'s' * several} {listed(never)} {'are' if several else 'is'} "
            "not used; a recipe's [columns], where the command has them, maps what belongs to a row"
        )
    skipped.merge(own)
