"""JSON that others wrote, read in one way: what is wrong is one sentence that names file and line.

`read_object` reads a file that is one object, `json_rows` one that has an object a line, and
`field` takes a value out of an object only if it has the type that it must have.
"""

import codecs
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

T = TypeVar("T")

LARGEST = 1 << 28  # bytes of a file that is one object: Llama 3's tokenizer.json has 9 MB
LONGEST = 1 << 28  # bytes of a line
WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    list: "a list",
}
_REQUIRED: Any = object()


def regular_file(path: Path, absent: str = "no such file") -> Path:
    """`path`; ValueError where there is none, saying `absent`, and where it is a folder, a pipe or
    a device: opening a pipe that nobody writes to would wait for ever."""
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    if path.exists():
        raise ValueError(
            f"{path} is a pipe or a device, expected a regular file; write its contents to one"
        )
    raise ValueError(f"{path}: {absent}")


def read_object(path: Path, absent: str = "no such file") -> dict[str, Any]:
    """The JSON object that is the whole of a file. ValueError where it is absent, saying `absent`,
    or is none."""
    if (size := regular_file(path, absent).stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, which no such file needs; fetch it again")
    document = parse_json(path.read_bytes(), str(path), "fetch or save it again")
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object; fetch or save it again")
    return document


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of each line that is not blank; lines end with a line feed and with
    nothing else. ValueError where the file is absent and for a line that is no object."""
    with regular_file(path).open("rb") as file:
        for where, row in json_lines(file, str(path)):
            if isinstance(row, ValueError):
                raise row
            yield where, row


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """(`name:line`, object) of each line that is not blank; for one that is no object the
    ValueError that says so."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > LONGEST:
            raise ValueError(f"{where}: longer than {LONGEST:,} bytes, expected one row a line")
        if line.strip():
            yield where, _object(line.rstrip(b"\r\n"), where)


def _object(line: bytes, where: str) -> dict[str, Any] | ValueError:
    try:
        row = parse_json(line, where, "expected one JSON object a line")
    except ValueError as error:
        return error
    return row if isinstance(row, dict) else no_object(row, where, "one object a line")


def no_object(value: Any, where: str, expected: str) -> ValueError:
    """What to say of a row that is another kind of JSON."""
    return ValueError(f"{where}: a JSON {type(value).__name__}, expected {expected}")


def append_rows(path: Path, rows: Iterable[Any], mode: Literal["a", "w"] = "a") -> None:
    """Write one JSON line a row at the end of a file ("w": in place of it), on to the disk. Raises
    OSError with one sentence that names the file; what it leaves of a line has no line feed."""
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        named = OSError(
            f"{path} could not be written to its end ({error.strerror}); make room, then run again"
        )
        named.errno = error.errno
        raise named from error


def parse_json(data: bytes, where: str, remedy: str) -> Any:
    """The JSON value in `data`, with or without a byte order mark; ValueError says `where`."""
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n")
        place = f"{where}:{line + 1}" if line else where
        raise ValueError(f"{place}: not UTF-8, expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column" if error.lineno > 1 else "column"
        what = error.msg.removesuffix(" at")  # as some of Python's own messages end
        raise ValueError(
            f"{where}: not JSON ({what} at {place} {error.colno}); {remedy}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where}: the JSON is nested too deeply; {remedy}") from error
    except ValueError as error:  # Python converts no longer ones: it would take too long
        raise ValueError(f"{where}: a number has more than 4,300 digits; {remedy}") from error


def field(document: Mapping[str, Any], key: str, kind: type[T], default: Any = _REQUIRED) -> T:
    """`document[key]`, which must be of this kind (a key of `WORDS`; a float may be written as a
    whole number); the default where it is left out or null. Raises ValueError for anything else."""
    value = document.get(key)
    if value is None and default is not _REQUIRED:
        return default
    name = as_name(key)
    if key not in document:
        raise ValueError(f"{name} is missing, expected {WORDS[kind]}")
    return typed(value, kind, name)


def typed(value: Any, kind: type[T], name: str) -> T:
    """`value`, which must be of this kind; ValueError calls it `name`."""
    found: Any = float(value) if kind is float and _is_small_int(value) else value
    endless = isinstance(found, float) and not math.isfinite(found)
    if type(found) is not kind or endless:
        raise ValueError(f"{name} is {shortened(value)}, expected {WORDS[kind]}")
    return found


def _is_small_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 1000  # a float has no room for more


def are_ids(values: list[Any]) -> bool:
    """Whether all of a list are whole numbers that can be token ids."""
    return set(map(type, values)) <= {int} and (
        not values or 0 <= min(values) <= max(values) < 1 << 31
    )


def shortened(value: Any) -> str:
    """A value as JSON, short enough for a message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names of columns, as many as a message has room for."""
    known = [as_name(name) for name in names]
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(f"'{name}'" for name in known[:most]) + more


def count_of(number: int, noun: str) -> str:
    """So many of what the noun names, which takes an s: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def as_name(name: str) -> str:
    """A name that others gave, on one line and short enough for a message."""
    return shortened(name)[1:-1]
