"""`puna convert`: Hugging Face, Meta, llama2.c and GGUF models into each other's formats."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import tokenizer_in
from puna.core.checkpoint.source import DTYPES
from puna.core.terminal import say
from puna.trainers.train.ranges import Count, Options


@dataclass
class ConvertConfig(Options):
    """Convert a model: a model folder (Puna's and Hugging Face's are one), Meta's folder, a
    llama2.c .bin or a GGUF file, into a model folder or, where the target's name ends so, a .bin
    or a .gguf."""

    source: Path
    """What to convert: a folder, a .bin or a .gguf file."""
    target: Path
    """What to write: a new folder, or a new file whose name ends in .bin or .gguf."""
    to: Literal["auto", "folder", "bin", "gguf"] = "auto"
    """Format of the target (auto: by its name)."""
    tokenizer: Path | None = None
    """A tokenizer.model to put into the folder (default: the source's own)."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = "stored"
    """Type of the weights in the folder (stored: each tensor's own); a .bin always has fp32."""
    context: Count = 4096
    """Longest sequence in tokens, for Meta's folders, which do not say (Llama 2: 4096)."""


def run(config: ConvertConfig) -> Path:
    """Convert, say where the result stands, and return that path."""
    target = convert(
        config.source,
        config.target,
        tokenizer=config.tokenizer,
        dtype=None if config.dtype == "stored" else DTYPES[config.dtype],
        context=config.context,
        to=config.to,
    )
    say(f"wrote {target}")
    if target.is_dir() and tokenizer_in(target, None) is None:
        say("the source has no tokenizer: name one with --tokenizer to put it beside")
    return target
