"""A model in any of the formats that Puna reads; which one it is, is seen from the path."""

import os
import re
from pathlib import Path

from puna.core.checkpoint import folder, meta
from puna.core.checkpoint.source import Source


def open_any(path: str | os.PathLike[str], context: int = 4096) -> Source:
    """Open a model folder (ours or Hugging Face's), Meta's folder, a llama2.c `.bin` or
    a GGUF file.

    `context` is for Meta's folders, which do not store it. Raises ValueError where `path` is none
    of them, or damaged.
    """
    path = Path(path)
    if path.is_file() and re.fullmatch(r"consolidated\.\d+\.pth", path.name):
        raise ValueError(f"{path} is one file of Meta's format; give its folder, {path.parent}")
    if (path / "params.json").exists() and not (path / "config.json").exists():
        return meta.open_source(path, context)
    return folder.open_source(path)
