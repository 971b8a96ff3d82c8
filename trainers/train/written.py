"""What a run has written and will read again: samples, selections, comparisons. Noted in its
folder with hashes, so that an edited or cut file is named and not trained on."""

import json
from collections.abc import Sequence
from pathlib import Path

from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.hashes import digest, leading

WRITTEN = "written.json"


def note(folder: Path, *names: str) -> None:
    """Note what the files of these names in `folder` hold now."""
    found = noted(folder)
    for name in names:
        now = digest(folder / name)
        found[name] = {"bytes": now.bytes, "sha256": now.sha256}
    write_text(folder / WRITTEN, json.dumps(found, indent=2) + "\n")


def forget(folder: Path, *names: str) -> None:
    """The files of these names were removed, so that they are made anew."""
    found = noted(folder)
    if not found.keys() & set(names):
        return
    for name in names:
        found.pop(name, None)
    if found:
        write_text(folder / WRITTEN, json.dumps(found, indent=2) + "\n")
    else:
        (folder / WRITTEN).unlink()


def noted(folder: Path) -> dict[str, dict]:
    """File name -> bytes and hash; nothing where none was noted. ValueError where the notes are
    damaged."""
    path = folder / WRITTEN
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(
            type(each["bytes"]) is int and isinstance(each["sha256"], str)
            for each in found.values()
        ):
            return found
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} is damaged; remove it to trust the files beside it as they are")


def check(folder: Path, *names: str, grows: bool = False, brought: Sequence[str] = ()) -> None:
    """ValueError where a file is not what was noted; one that is missing, or was never noted, is
    none of this. One that `grows` may be longer: a kill comes between a row and its note. Those
    that were `brought`, by an annotator say, are not made anew."""
    found = noted(folder)
    for name in names:
        path = folder / name
        if name not in found or not path.exists():
            continue
        size = path.stat().st_size
        whole = size == found[name]["bytes"] or (grows and size > found[name]["bytes"])
        if not whole or leading(path, found[name]["bytes"]) != found[name]["sha256"]:
            raise ValueError(
                f"{path} is not what the run has learned from; put the former content back, or "
                "give another --out"
                if name in brought
                else f"{path} is not what the run wrote; put that back, or remove the file to make "
                "it anew"
            )
