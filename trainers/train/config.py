"""A dataclass, a TOML recipe and the command line become one configuration.

`parse(SFTConfig, ["7b/sft.toml", "--lr", "1e-5"])`: the dataclass gives the defaults, the recipe
overrides them, a flag overrides the recipe. Recipes are flat, plus one table for each field that
is itself a dataclass or a dict; a recipe or a table may start from another recipe, `base = "..."`
(`recipes`). No name in a recipe ever becomes code.
"""

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from puna.trainers.train.arguments import in_front, joined
from puna.trainers.train.ranges import Options, check_ranges, drafts, enforce
from puna.trainers.train.recipes import find_recipe, is_toml, read_recipe
from puna.trainers.train.values import convert

Config = TypeVar("Config")


def parse(cls: type[Config], argv: Sequence[str], prog: str) -> Config:
    """The configuration of `argv`: an optional recipe first, then flags. Of a class that has a
    `recipe` itself, that is the recipe's name.

    Raises ValueError for a recipe that cannot be found or read, or has an unknown key or a value
    of the wrong type, and for options that cannot be (`ranges`); prints usage and exits for wrong
    flags, as command lines do.
    """
    about = any(field.name == "recipe" for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    arguments = in_front("--recipe", argv) if about else list(argv)
    values: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        first = arguments.pop(0)
        values = {"recipe": first} if about else named_recipe(cls, first)
    with drafts():
        config = tyro.cli(
            cls,
            args=joined(cls, arguments),
            default=from_values(cls, values),
            prog=f"{prog} [recipe.toml]",
            description=(cls.__doc__ or "").strip(),
        )
    if isinstance(config, Options):
        enforce(config)
    return config


def named_recipe(cls: type, name: str) -> dict[str, Any]:
    """The values of a recipe that stands first on a command line; ValueError where something else
    stands there, with the option that it is perhaps meant for."""
    path = Path(name)
    try:
        return load_recipe(cls, find_recipe(name))
    except ValueError as error:
        if path.suffix == ".toml" or not path.exists() or is_toml(path):
            raise
        is_model = path.is_dir() or path.suffix in (".gguf", ".bin")
        meant = ("model", "policy") if is_model else ("data", "prompts", "dialogues")
        known = {field.name for field in dataclasses.fields(cls)}
        option = next((f"--{each}" for each in meant if each in known), "its option")
        raise ValueError(
            f"{name} is no recipe, which alone is given without an option's name; "
            f"give it as {option} {name}"
        ) from error


def load_recipe(cls: type, path: Path) -> dict[str, Any]:
    """The recipe's values, checked against the fields of `cls`."""
    values = read_recipe(path)
    if path.name == "config.toml" and path.with_name("inputs.json").exists():
        values["out"] = str(path.parent)  # a run's own: it may have been moved or copied
    check_keys(cls, values, str(path))
    try:
        with drafts():
            draft = from_values(cls, values)
        if isinstance(draft, Options):
            check_ranges(draft)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return values


def check_keys(
    cls: type, values: Mapping[str, Any], where: str, taken: Mapping[str, str] | None = None
) -> None:
    """ValueError naming the nearest known keys where `values` has one that `cls` has not, or
    saying what to do instead where it has one that is `taken`: set by whoever asks."""
    for key in values:
        if taken and key in taken:
            raise ValueError(f"{where}: '{key}' cannot be set here; {taken[key]}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
            raise ValueError(f"{where}: unknown key '{key:.60}'; did you mean {', '.join(near)}?")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            check_keys(typing.cast(type, hints[key]), value, f"{where} [{key}]")


def check_table(
    cls: type,
    values: Mapping[str, Any],
    table: str,
    taken: Mapping[str, str],
    given: Mapping[str, Any],
) -> None:
    """ValueError where `values`, a recipe's `table` of options for `cls`, cannot be used.

    `taken` has a piece of advice for each key that the table may not set; `given` a value for each
    option that will be set then (any of the right type), so that `cls.check` can look at the whole.
    """
    check_keys(cls, values, f"[{table}]", taken)
    from_values(cls, {**values, **given}, f"{table}.")


def from_values(cls: type[Config], values: dict[str, Any], table: str = "") -> Config | Any:
    """An instance of `cls` from plain TOML values; fields without a value or a default stay
    missing, for the command line to fill."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            name, value = table + field.name, values[field.name]
            if dataclasses.is_dataclass(hints[field.name]) and isinstance(value, dict):
                value = from_values(hints[field.name], value, f"{name}.")
            arguments[field.name] = convert(hints[field.name], value, name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            arguments[field.name] = tyro.MISSING
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"[{table[:-1]}] {error}" if table else str(error)) from error


def to_toml(config: Any, *, without: Collection[str] = ()) -> str:
    """The resolved configuration as a recipe that gives the same one again, but for `without`."""
    kept = {name: value for name, value in _plain(config).items() if name not in without}
    return _rows(kept, "")


def _plain(config: Any) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None or field.default is not None:
            values[field.name] = _plain(value) if dataclasses.is_dataclass(value) else value
    return values


def _rows(values: Mapping[str, Any], table: str) -> str:
    """`name = value` rows, then each table with its own; `table` is the name of this one."""
    plain, tables = [], []
    for key, value in values.items():
        key = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quote(key)
        if isinstance(value, Mapping):
            tables.append(f"\n[{table}{key}]\n{_rows(value, f'{table}{key}.')}")
        else:
            plain.append(f"{key} = {_quote(value)}\n")
    return "".join(plain) + "".join(tables)


def _quote(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_quote(v) for v in value) + "]"
    # JSON's escapes are TOML's, but for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
