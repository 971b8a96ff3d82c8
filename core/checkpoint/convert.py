"""Conversion between model formats, one tensor (or one shard) in memory at a time.

From a model folder (ours or Hugging Face's), Meta's folder, a llama2.c `.bin` or GGUF; to a model
folder, a `.bin` or a GGUF file. What a path is, is seen from the path.
"""

import os
from pathlib import Path

import torch

from puna.core.checkpoint import folder as checkpoint
from puna.core.checkpoint import gguf_write, llama2c
from puna.core.checkpoint.any_format import open_any
from puna.core.checkpoint.atomic import atomic_file, atomic_folder
from puna.core.checkpoint.folder import check_own
from puna.core.checkpoint.kept import carry_over


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    context: int = 4096,
    to: str = "auto",
    shard_bytes: int = checkpoint.SHARD_BYTES,
) -> Path:
    """Convert `source` to `target`: what `to` says ("folder", "bin" or "gguf"), or its name: a
    `.bin`, a `.gguf`, else a model folder.

    `tokenizer` goes into the folder (None: the source's own, where it has one); `dtype` None
    keeps each tensor's stored type (a `.bin` and a GGUF file's norms are always fp32); `context` is
    for Meta's folders, which do not store it. From folder to folder all goes along that is not
    weights: a chat template, generation settings, a README. Raises ValueError for a source that is
    no Llama 2 or damaged, where something stands at `target` already, for a tokenizer that is not
    the model's and for a number that `dtype` cannot hold.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists; choose another target or remove it")
    opened = open_any(source, context)
    if tokenizer is not None and opened.tokenizer is not None:
        check_own(tokenizer, opened.tokenizer)
    if to == "auto" and target.suffix in (".safetensors", ".pt", ".pth"):
        raise ValueError(
            f"{target} is called as one file of weights; Puna writes model folders, .bin and .gguf:"
            " give a folder's name"
        )
    if to == "auto":
        to = {".bin": "bin", ".gguf": "gguf"}.get(target.suffix, "folder")
    if to == "folder" and target.suffix in (".bin", ".gguf"):
        raise ValueError(f"{target} is called as a file, and a folder is asked for; rename it")
    if to != "folder" and target.suffix != f".{to}":
        raise ValueError(f"such a file is known by its ending: call it {target.name}.{to}")
    if to == "bin" and dtype not in (None, torch.float32):
        raise ValueError("a llama2.c .bin always has fp32: leave dtype out, or write a .gguf")
    if to == "gguf":
        with atomic_file(target) as partial:
            gguf_write.write(partial, opened, tokenizer or opened.tokenizer, dtype)
        return target
    if to == "bin":
        if opened.head != "lm":
            raise ValueError(f"{source} has a score head; a llama2.c .bin holds language models")
        with atomic_file(target) as partial:
            llama2c.write(partial, opened.config, opened.tensors())
        return target
    with atomic_folder(target) as partial:
        checkpoint.write_tensors(
            partial,
            opened.config,
            opened.head,
            opened.tensors(),
            tokenizer or opened.tokenizer,
            dtype=dtype or opened.dtype,
            keep_types=dtype is None,
            shard_bytes=shard_bytes,
        )
        if Path(source, "config.json").is_file():
            carry_over(Path(source), partial, same_tokenizer=tokenizer is None)
    return target
