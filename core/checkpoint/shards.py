"""A model's weights in files of a size: one, or several with an index, as Hugging Face's are."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.core.checkpoint.source import as_type

SHARD_BYTES = 5_000_000_000
SMALL = 100_000_000  # bytes: a file is not cut smaller for the sake of more writers


def write_json(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def save_tensors(
    tensors: dict[str, Tensor], file: Path, *, like: Path, metadata: dict[str, str] | None = None
) -> None:
    """A .safetensors file with the mode of the file `like`: safetensors makes it for the owner
    alone."""
    save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})
    shutil.copymode(like, file)


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Write the tensors in order, a new file whenever one would pass `shard_bytes`; `dtype` None
    keeps each one's own. Returns their shapes."""
    shards: list[list[str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    held: dict[str, Tensor] = {}

    def write() -> None:
        shards.append(list(held))
        file = folder / f"{len(shards)}.safetensors"
        save_tensors(held, file, like=folder / "config.json")
        held.clear()

    size = total = 0
    for name, tensor in tensors:
        tensor = as_type(name, tensor, dtype).to(device="cpu").contiguous()
        if held and size + tensor.nbytes > shard_bytes:
            write()
            size = 0
        held[name], shapes[name] = tensor, tuple(tensor.shape)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    for number, file in enumerate(file_names(len(shards)), 1):
        (folder / f"{number}.safetensors").rename(folder / file)
    write_index(folder, shards, total)
    return shapes


def file_names(count: int) -> list[str]:
    """What so many files of weights are called."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: list[list[str]], total: int) -> None:
    """Which tensor is in which file, where there are several; `total` bytes in all."""
    if len(shards) == 1:
        return
    weight_map = {
        name: file
        for file, names in zip(file_names(len(shards)), shards, strict=True)
        for name in names
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def shared_out(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """The names of `sizes` (bytes) in files of about a size: one for each of so many ranks to
    write, several where they are large."""
    total = sum(sizes.values())
    count = math.ceil(total / min(SHARD_BYTES, max(SMALL, math.ceil(total / ranks))))
    shards: list[list[str]] = [[] for _ in range(count)]
    begin = 0
    for name, size in sizes.items():
        shards[begin * count // total].append(name)
        begin += size
    return [names for names in shards if names]
