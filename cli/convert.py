"""`puna convert`: Hugging Face, Meta and llama2.c models into each other's formats."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from puna.core.checkpoint.convert import convert
from puna.core.terminal import say
from puna.trainers.train.ranges import Count, Options


@dataclass
class ConvertConfig(Options):
    """Convert a model: a model folder (Puna's and Hugging Face's are one), Meta's folder or a
    llama2.c .bin, into a model folder or, where the target's name ends so, a .bin."""

    source: Path
    """What to convert: a folder or a .bin file."""
    target: Path
    """What to write: a new folder, or a new file whose name ends in .bin."""
    tokenizer: Path | None = None
    """A tokenizer.model to put into the folder (default: the source's own)."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Type of the weights in the folder (stored: each tensor's own); a .bin always has float32."""
    context: Count = 4096
    """Longest sequence in tokens, for Meta's folders, which do not say (Llama 2: 4096)."""


def run(config: ConvertConfig) -> Path:
    """Convert, say where the result stands, and return that path."""
    target = convert(
        config.source,
        config.target,
        tokenizer=config.tokenizer,
        dtype=None if config.dtype == "stored" else getattr(torch, config.dtype),
        context=config.context,
    )
    say(f"wrote {target}")
    if target.is_dir() and not (target / "tokenizer.model").exists():
        say("the source has no tokenizer.model: name one with --tokenizer to put it beside")
    return target
