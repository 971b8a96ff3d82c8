"""Readers of what a user brings: texts, dialogues, preferences, prompts.

What may be named is in `files`, what each kind of row may look like in `formats`, how other layouts
become these in `layouts`. A row that cannot be read stops the reader with `file:line: what is
wrong, what was expected`, or is counted where `Reading.on_error` says so; a row that can be read
but not used is skipped, counted and named.
"""

import codecs
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from puna.core.documents import count_of, listed
from puna.trainers.data.answered import Answered, parse_answered
from puna.trainers.data.columns import Columns, Reading, ReadingComparisons, ReadingMessages
from puna.trainers.data.files import Rows, Source, each_row, is_text, sources, unpacked
from puna.trainers.data.formats import (
    Dialogue,
    Ghost,
    Preference,
    Preprompt,
    Prompt,
    Start,
    parse_dialogue,
    parse_ghost,
    parse_instruction,
    parse_preference,
    parse_preprompt,
    parse_prompt,
    parse_start,
    parse_text,
)
from puna.trainers.data.layouts import Kind, is_said, read_as
from puna.trainers.data.messages import Malformed, Unusable, inside_messages, renamed

T = TypeVar("T")

PIECE = 1 << 20  # bytes of a text that are read at a time
LONGEST_TEXT = 1 << 33  # bytes of one document
UNREADABLE = "unreadable"
FIRST = "the first row that cannot be read: "


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
            f"skipped {count_of(count, 'row')}: {reason} (first {where})"
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


def read_texts(path: str | Path, how: Reading | None = None) -> tuple[list[str], Skipped]:
    """Documents: a `.txt` is one, of other files every row's `text`.

    Raises ValueError where a file is absent, has a row that cannot be read, or no usable row; so do
    the other readers.
    """
    skipped = Skipped()
    return [*each_text(path, how, skipped)], skipped


def each_text(path: str | Path, how: Reading | None, skipped: Skipped) -> Iterator[str]:
    """`read_texts`, one document after the other; what is skipped is added in the end."""
    for source in sources(path):
        if is_text(source):
            yield whole_text(source)
        else:
            yield from _each([source], str(path), "texts", how, skipped, parse_text)


def whole_text(source: Source) -> str:
    """A file as one text. Raises ValueError where it is none."""
    parts: list[str] = []
    decode, size = codecs.getincrementaldecoder("utf-8-sig")().decode, 0
    with unpacked(source) as file:
        try:
            while piece := file.read(PIECE):
                parts.append(decode(piece))
                size += len(piece)
                if size > LONGEST_TEXT:
                    most = f"{LONGEST_TEXT:,}"
                    raise ValueError(f"{source.name} has more than {most} bytes; cut it into files")
            parts.append(decode(b"", True))
        except UnicodeDecodeError as error:
            line = sum(part.count("\n") for part in parts) + 1
            line += error.object[: error.start].count(b"\n")
            raise ValueError(f"{source.name}:{line}: not UTF-8, expected UTF-8 text") from error
    text = "".join(parts)
    if not text.strip():
        raise ValueError(f"{source.name}: the file is empty")
    return text.replace("\r\n", "\n")


def each_line(source: Source, column: str) -> Rows:
    """The lines of a text that are not blank, as rows with that column."""
    for number, line in enumerate(whole_text(source).split("\n"), start=1):
        if line.strip():
            yield f"{source.name}:{number}", {column: line}


def read_dialogues(
    path: str | Path, how: ReadingMessages | None = None
) -> tuple[list[Dialogue], Skipped]:
    """Dialogues to learn from: rows of `messages`, or of `prompt` and `response`."""
    return _read(path, "dialogues", how, parse_dialogue)


def parse_dialogues(
    rows: Iterable[Any], how: ReadingMessages | None = None
) -> tuple[list[Dialogue], Skipped]:
    """`read_dialogues` of rows that are in memory already: as in a file, or bare lists of messages.

    The rows are counted from 1. Raises ValueError for one that cannot be read, or no usable row.
    """
    how = how or ReadingMessages()
    found = [
        (f"row {number}", _object(row, how.columns)) for number, row in enumerate(rows, start=1)
    ]
    if not found:
        raise ValueError("there are no dialogues to learn from; an iterator gives its rows once")
    skipped = Skipped()
    parsed = _parsed(iter(found), "the dialogues", "dialogues", how, skipped, parse_dialogue)
    return [*_usable(parsed, "the dialogues", skipped)], skipped


def _object(row: Any, columns: Columns) -> Any:
    if isinstance(row, (list, tuple)):
        return {columns.messages: list(row)}
    if isinstance(row, Mapping):
        return row
    return Malformed(f"a {type(row).__name__}, expected an object with named columns")


def read_answered(
    path: str | Path, how: ReadingMessages | None = None
) -> tuple[list[Answered], Skipped]:
    """Answers to be judged: dialogues as above with perhaps `safety`, or rows of samples.jsonl."""
    return _read(path, "answered", how, parse_answered)


def read_preferences(
    path: str | Path, how: ReadingComparisons | None = None
) -> tuple[list[Preference], Skipped]:
    """Comparisons: native rows, `prompt/chosen/rejected`, transcripts, or answers a and b."""
    return _read(path, "preferences", how, parse_preference)


def read_ghosts(
    path: str | Path, how: ReadingMessages | None = None, *, alone: bool = False
) -> tuple[list[Ghost], Skipped]:
    """What Ghost Attention samples from: rows of `turns` or `messages`, and perhaps `instruction`
    and `short`; with `alone`, rows of the last two."""
    return _read(path, "others", how, parse_instruction if alone else parse_ghost)


def read_prompts(
    path: str | Path, how: ReadingMessages | None = None
) -> tuple[list[Prompt], Skipped]:
    """Prompts to be answered: rows of `messages` or `prompt`, and perhaps `safety`, `category`; or
    the lines of a `.txt`."""
    return _read(path, "prompts", how, parse_prompt, lines=True)


def read_starts(path: str | Path, how: Reading | None = None) -> tuple[list[Start], Skipped]:
    """Texts to be continued: rows of `prompt` or `text`, or the lines of a `.txt`."""
    return _read(path, "others", how, parse_start, lines=True)


def read_preprompts(
    path: str | Path, how: ReadingMessages | None = None
) -> tuple[list[Preprompt], Skipped]:
    """What is put before adversarial prompts: rows of `preprompt`, and perhaps `category`."""
    return _read(path, "others", how, parse_preprompt)


def _read(
    path: str | Path,
    kind: Kind,
    how: Reading | None,
    parse: Callable[..., T],
    lines: bool = False,
) -> tuple[list[T], Skipped]:
    skipped = Skipped()
    return [*_each(sources(path), str(path), kind, how, skipped, parse, lines)], skipped


def _each(
    found: Sequence[Source],
    name: str,
    kind: Kind,
    how: Reading | None,
    skipped: Skipped,
    parse: Callable[..., T],
    lines: bool = False,
) -> Iterator[T]:
    """What `parse` makes of the rows of files that are named together, with `lines` of a text's
    lines, too; ValueError where it makes nothing of any."""
    own = Skipped()
    how = how or Reading()
    prompt = how.columns.prompt
    parsed = (
        _parsed(
            each_line(file, prompt) if lines and is_text(file) else each_row(file),
            file.name, kind, how, own, parse,
        )
        for file in found
    )  # fmt: skip
    yield from _usable(chain.from_iterable(parsed), name, own)
    skipped.merge(own)


def _usable(parsed: Iterable[T], name: str, skipped: Skipped) -> Iterator[T]:
    """The same; ValueError where there is nothing."""
    usable = 0
    for each in parsed:
        usable += 1
        yield each
    if not usable:
        first = [note for note in skipped.notes if note.startswith(FIRST)]
        reasons = [each for each in (*skipped.reasons().split("\n"), *first) if each]
        why = "; ".join(reasons) or "the file is empty"
        raise ValueError(f"{name}: no usable row: {why}")


def _parsed(
    rows: Rows,
    name: str,
    kind: Kind,
    how: Reading,
    skipped: Skipped,
    parse: Callable[..., T],
) -> Iterator[T]:
    """What `parse` makes of each row of one file; what has a place for it is told where it is.
    Columns that no row's parsing looks at are named in the end."""
    read: set[str] = set()
    columns: dict[str, None] = {}  # in the order in which they are met
    layout, ratings, rows = read_as(kind, rows, how)
    options = (layout.columns, ratings) if kind == "preferences" else (layout.columns,)
    roles = getattr(how, "roles", {})
    for where, row in rows:
        try:
            if isinstance(row, Exception):
                raise row
            row = renamed(row, roles) if roles else row
            if unread := row.keys() - read:  # in most files of the first row alone
                columns |= dict.fromkeys(name for name in row if name in unread)
                row = Row(row, read)
            found: Any = parse(row, *options)
            columns |= dict.fromkeys(inside_messages(row))
        except Unusable as reason:
            skipped.add(str(reason), where)
            continue
        except ValueError as error:
            _count_or_stop(error, where, how, skipped)
            continue
        yield found._replace(where=where) if hasattr(found, "where") else found
    if columns and is_said(layout, how):
        skipped.notes.append(f"{name}: read as {layout}")
    if never := [name for name in columns if name not in read]:
        several = len(never) > 1
        skipped.notes.append(
            f"{name}: the column{'s' * several} {listed(never)} {'are' if several else 'is'} "
            "not used; a recipe's [columns], where the command has them, maps what belongs to a row"
        )


def _count_or_stop(error: ValueError, where: str, how: Reading, skipped: Skipped) -> None:
    """A row that cannot be read."""
    said = f"{where}: {error}" if isinstance(error, Malformed) else str(error)
    if how.on_error == "stop":
        raise ValueError(said) from error
    if UNREADABLE not in skipped:
        skipped.notes.append(FIRST + said)
    skipped.add(UNREADABLE, where)
