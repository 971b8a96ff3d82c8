"""Configurations made in Python may name files as text; inside, a file is always a Path."""

import os
import typing
from functools import cache
from pathlib import Path
from typing import Any


def as_paths(config: Any) -> None:
    """Turn text into a Path in every field of a dataclass that holds a path or several; where
    several are expected, one alone stands for a list of one."""
    cls: type = type(config)
    for name, several in path_fields(cls).items():
        value = getattr(config, name)
        if several and isinstance(value, (str, Path)):
            value = [value]
        if isinstance(value, str):
            setattr(config, name, Path(value))
        elif isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(Path(each) for each in value))


OUTPUTS = ("out", "output")


def refuse_own_input(config: Any) -> None:
    """ValueError where the file that is written would take the place of one that is read."""
    cls: type = type(config)
    fields = path_fields(cls)
    for output in OUTPUTS:
        out = getattr(config, output, None)
        if not isinstance(out, Path) or not os.path.isfile(out):  # which no odd name makes raise
            continue
        for name in sorted(fields.keys() - {output}):
            value = getattr(config, name)
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, Path) and os.path.isfile(each) and out.samefile(each):
                    raise ValueError(
                        f"{out} is read here ({name}) and would be replaced; give another {output}"
                    )


@cache
def path_fields(cls: type) -> dict[str, bool]:
    """The fields of `cls` that hold paths, and whether each holds several."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if hint is Path or Path in typing.get_args(hint):
            found[name] = typing.get_origin(hint) in (list, tuple)
    return found
