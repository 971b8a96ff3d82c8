"""Tensors in safetensors files: their headers, checked, and one tensor at a time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puna.core.checkpoint import mistaken
from puna.core.documents import as_name, read_object, regular_file, typed

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Stored(NamedTuple):
    """A tensor as a safetensors header describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_headers(folder: Path) -> dict[str, dict[str, Stored]]:
    """File -> name -> shape and type of every tensor in the folder's safetensors."""
    if (folder / "model.safetensors").exists():
        return {"model.safetensors": read_header(folder / "model.safetensors")}
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        mistaken.check_folder(folder)
        raise ValueError(f"{folder} holds no model.safetensors; fetch or save the model again")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; fetch or save it again")
    files = sorted({typed(file, str, f"{index}: a file") for file in weight_map.values()})
    for file in files:
        if Path(file).name != file or len(file) > 255:
            raise ValueError(f"{index} points outside its folder ({as_name(file)}); fetch it again")
    headers = {file: read_header(folder / file) for file in files}
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{folder / file} holds {as_name(name)}, which its index does not name"
                )
    return headers


def read_header(file: Path) -> dict[str, Stored]:
    header = {}
    with _opened(file) as tensors:
        for name in tensors.keys():
            if name.endswith("rotary_emb.inv_freq"):
                continue  # a table that old versions of transformers stored
            view = tensors.get_slice(name)
            if view.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{file}: {as_name(name)} is stored as {view.get_dtype()}; Puna reads floats "
                    "only: use a checkpoint that is not quantised"
                )
            header[name] = Stored(tuple(view.get_shape()), FLOATS[view.get_dtype()])
    return header


def read_tensor(file: Path, name: str) -> Tensor:
    # Opened anew for each tensor: the pages of a file kept open would count as ours.
    with _opened(file) as tensors:
        return tensors.get_tensor(name)


def read_rows(file: Path, name: str, count: int) -> Iterator[tuple[int, Tensor]]:
    """A tensor's rows, about `count` numbers at a time: (the first row, rows)."""
    with _opened(file) as tensors:
        rows, *others = tensors.get_slice(name).get_shape()
    step = max(1, count // math.prod(others))
    for first in range(0, rows, step):
        with _opened(file) as tensors:  # anew, as above
            yield first, tensors.get_slice(name)[first : first + step]


@contextmanager
def _opened(file: Path) -> Iterator:
    regular_file(file, "the file is missing; fetch the checkpoint again")
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} is damaged or cut short ({why}); fetch or save it again"
        ) from error
