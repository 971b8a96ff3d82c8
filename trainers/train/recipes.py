"""Recipes: TOML files of options, found by name, that may start from one another.

A recipe, or any table of it, that says `base = "<recipe>"` has that recipe's values wherever it
gives none of its own; tables are joined key by key. A base is looked for beside the recipe that
names it, then among those that Puna ships.

Where `7b/sft.toml` is no file, but `7b.toml` and `sft.toml` stand beside each other, it is
`sft.toml` with the table [sft] of `7b.toml` over it: one file a stage, a small one a size. Bases
keep the prefix: `base = "ppo.toml"` in `rlhf.toml` means `7b/ppo.toml` in `7b/rlhf.toml`.
"""

import difflib
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from puna.core.documents import regular_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_PARTS = 200  # of keys in a line
LARGEST_RECIPE = 1 << 20  # bytes
LONGEST_NAME = 1000


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """The recipe called `name`: one in `folder`, or one that Puna ships (`7b/sft.toml`; the ending
    may be left out). Raises ValueError naming the nearest known ones."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"no recipe has so long a name as '{name[:57]}...'; name a file")
    wanted = name if name.endswith(".toml") else f"{name}.toml"
    for place in (folder / name, folder / wanted, shipped() / wanted):
        if place.is_file() or is_overlaid(place):
            return place
    known = known_recipes()
    alike = [each for each in known if each.startswith(wanted.removesuffix(".toml"))]
    near = alike or difflib.get_close_matches(wanted, known, n=3, cutoff=0.3) or known
    raise ValueError(f"no recipe '{name}': no such file, and Puna ships {', '.join(near)}")


def shipped() -> Path:
    return Path(str(resources.files("puna.recipes")))


def known_recipes() -> list[str]:
    """The names of all recipes that Puna ships: files, and each stage at each size."""
    root = shipped()
    files = sorted(root.rglob("*.toml"))
    sizes = [path for path in files if path.parent == root and is_overlay(path)]
    plain = [path for path in files if path not in sizes]
    stages = [path.name for path in plain if path.parent == root]
    return [str(path.relative_to(root)) for path in plain] + [
        f"{size.stem}/{stage}" for size in sizes for stage in stages
    ]


def is_overlaid(path: Path) -> bool:
    """Whether `path`, which is no file, is a recipe with another one's table over it."""
    stage, overlay = overlaid(path)
    return stage.is_file() and overlay.is_file() and is_overlay(overlay)


def overlaid(path: Path) -> tuple[Path, Path]:
    """(sft.toml, 7b.toml) of 7b/sft.toml."""
    folder = path.parent
    return folder.parent / path.name, folder.parent / f"{folder.name}.toml"


def is_overlay(path: Path) -> bool:
    """Whether the file holds nothing but tables, each called after a recipe beside it."""
    return all(
        isinstance(value, dict) and path.with_name(f"{key}.toml").is_file()
        for key, value in read_toml(path).items()
    )


def read_recipe(path: Path, trail: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's values, those of its bases included. `trail`: the recipes that led here."""
    place = path.resolve()
    if place in trail:
        circle = " -> ".join(step.name for step in (*trail[trail.index(place) :], place))
        raise ValueError(f"{trail[-1]}: its bases go in a circle ({circle}); take one out")
    if path.is_file():
        values = read_toml(path)
    else:
        stage, overlay = overlaid(path)
        values = merged(read_toml(stage), read_toml(overlay).get(path.stem, {}))
    return with_bases(values, path, (*trail, place))


def with_bases(values: dict[str, Any], path: Path, trail: tuple[Path, ...]) -> dict[str, Any]:
    """`values`, a recipe's or those of one of its tables, over those of the base they name."""
    own = {
        key: with_bases(value, path, trail) if isinstance(value, dict) else value
        for key, value in values.items()
        if key != "base"
    }
    if "base" not in values:
        return own
    try:
        base = find_recipe(str(values["base"]), path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from error
    return merged(read_recipe(base, trail), own)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, `above` winning; tables that both have are joined the same way."""
    joined = {
        key: merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | joined


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; ValueError names the file, and the line where there is one."""
    if (size := regular_file(path, "no such recipe").stat().st_size) > LARGEST_RECIPE:
        raise ValueError(f"{path} has {size:,} bytes, which no recipe needs; name a recipe")
    data = path.read_bytes()
    for number, line in enumerate(data.split(b"\n"), start=1):
        # A key's parts cost memory by their square: 20,000 took 1.7 GB.
        if line.count(b".") > MOST_PARTS and (dots := dots_outside_texts(line)) > MOST_PARTS:
            raise ValueError(f"{path}:{number}: a key of {dots + 1:,} parts; a recipe's have two")
    try:
        return tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line_number = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line_number}: not UTF-8, expected UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: the TOML is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: a number has more than 4,300 digits") from error


def is_toml(path: Path) -> bool:
    """Whether a recipe could be read there."""
    try:
        read_toml(path)
    except ValueError:
        return False
    return True


def dots_outside_texts(line: bytes) -> int:
    """How many dots of a line are in no text: those between the parts of a key, and in numbers."""
    count, quote, escaped = 0, 0, False
    for byte in line:
        if escaped:
            escaped = False
        elif quote:
            escaped = byte == ord("\\") and quote == ord('"')
            quote = 0 if byte == quote else quote
        elif byte in b"\"'":
            quote = byte
        else:
            count += byte == ord(".")
    return count
