"""A value from a recipe or from Python as its field's type."""

import dataclasses
import numbers
import types
import typing
from pathlib import Path
from typing import Any


def convert(hint: Any, value: Any, name: str) -> Any:
    """The value as `hint` says, ValueError where it cannot be: texts for paths, whole numbers for
    numbers, numpy's scalars for Python's, a list for a tuple.

    TOML has no null: where a field may be None, the text "None" stands for it, as in flags.
    """
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if types.NoneType in options and value in (None, "None"):
        return None
    for option in options:
        found = _as(option, value, name)
        if found is not _NOT:
            return found
    raise ValueError(f"'{name}' is {value!r}; expected {_describe(hint)}")


_NOT = object()  # a value that is not of a type


def _as(option: Any, value: Any, name: str) -> Any:
    """The value as one type that is no union; `_NOT` where it is none of it."""
    origin, inner = typing.get_origin(option) or option, typing.get_args(option)
    if origin is Any:
        return value
    if origin is Path and isinstance(value, (str, Path)):
        return Path(value)
    if origin is float and _is_number(value, numbers.Real):
        return float(value)
    if origin is int and _is_number(value, numbers.Integral):
        return int(value)
    if origin is typing.Literal and isinstance(value, str) and value in inner:
        return value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(convert(inner[0], each, name) for each in value)
    if origin is dict and isinstance(value, dict):
        return {key: convert(inner[1], each, f"{name}.{key}") for key, each in value.items()}
    if isinstance(origin, type) and origin not in (int, float) and type(value) is origin:
        return value
    return _NOT


def _is_number(value: Any, kind: type) -> bool:
    """A yes or no is no number, though Python counts with it."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _describe(hint: Any) -> str:
    """A field's type in words."""
    if _is_union(hint):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(repr(value) for value in inner)
    if origin in (list, tuple):
        return f"a list, each of it {_describe(inner[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a table"
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(hint, '"None"' if hint is types.NoneType else "a text")
