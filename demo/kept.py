"""Files of the demo's own that are made anew where they are absent or damaged."""

from pathlib import Path
from typing import TypeVar

from puna.core.documents import parse_json, typed

T = TypeVar("T")


def kept(path: Path, kind: type[T]) -> T | None:
    """The JSON value of this kind (dict or list) in a file; None where there is none."""
    try:
        return typed(parse_json(path.read_bytes(), str(path), "it is made anew"), kind, str(path))
    except (OSError, ValueError):
        return None


def seconds(out: Path) -> dict[str, float]:
    """Seconds by stage, as the pipeline noted them in the folder of a run."""
    noted = kept(out / "seconds.json", dict) or {}
    return {name: spent for name, spent in noted.items() if type(spent) in (int, float)}
