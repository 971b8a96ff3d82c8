"""Meta's folders: params.json beside consolidated.00.pth, consolidated.01.pth, ...

Each file is one model-parallel rank's share: some matrices are cut by rows, some by columns,
the norms are repeated. Shares are mapped, not read, and joined one tensor at a time. The files
are pickles: they are opened with `weights_only`, which builds tensors and runs nothing.
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.core.checkpoint.source import (
    Source,
    check_layers,
    check_shapes,
    half_split,
    meta_name,
    rope_heads,
)
from puna.core.config import ModelConfig, ffn_width
from puna.core.documents import count_of, field, read_object, regular_file
from puna.core.errors import Notice
from puna.core.parameters import parameter_shapes

TIKTOKEN = "name the tokenizer.json of the same model in Hugging Face's format with --tokenizer"
# The dimension along which the ranks' shares are joined; the norms have none.
CUT = {
    "tok_embeddings": 1,
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
    "output": 0,
}


def open_source(folder: Path, context: int = 4096) -> Source:
    """Open and check a folder in Meta's format. `context` is not stored there: Llama 2's is 4096.

    Raises ValueError for missing, damaged or unsafe files and for tensors that do not fit
    params.json.
    """
    shares = [_open_share(file) for file in _share_files(folder)]
    config = _read_params(folder / "params.json", shares, context)
    check_layers(shares[0], config, folder)
    shapes = parameter_shapes(config, "lm")
    _check(folder, shares, shapes)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            tensor = _join(shares, meta_name(name))
            heads = rope_heads(name, config)
            yield name, half_split(tensor, heads) if heads else tensor

    # Meta's download keeps one tokenizer beside the models' folders.
    places = (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model")
    tokenizer = next((place for place in places if place.exists()), None)
    if tokenizer is not None and _is_tiktoken(tokenizer):
        warnings.warn(f"{tokenizer} is a tiktoken file, which is left out; {TIKTOKEN}", Notice, 2)
        tokenizer = None
    return Source(config, "lm", shares[0]["norm.weight"].dtype, tokenizer, tensors)


def _is_tiktoken(path: Path) -> bool:
    """Whether a file has lines of a piece in base64 and its rank, as Llama 3's has."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1024)) is not None


def _share_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [f"consolidated.{rank:02d}.pth" for rank in range(len(files))]
    if not files or [file.name for file in files] != names:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{folder}: expected consolidated.00.pth, consolidated.01.pth, ... without a gap, "
            f"found {found}; fetch the missing files"
        )
    return files


def _open_share(file: Path) -> Mapping[str, Tensor]:
    regular_file(file)
    try:
        share = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and is not opened: fetch it from a source you trust"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise ValueError(f"{file} is damaged or cut short; fetch it again") from error
    if not isinstance(share, dict) or not all(map(_is_entry, share, share.values())):
        raise ValueError(f"{file} is no set of named tensors of floats; fetch it again")
    # The model's size is read from these.
    for name, dimensions in (("tok_embeddings.weight", 2), ("norm.weight", 1)):
        if name not in share or share[name].dim() != dimensions:
            raise ValueError(f"{file} lacks {name}; fetch it again")
    return share


def _is_entry(name: Any, tensor: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
    )


def _read_params(path: Path, shares: list[Mapping[str, Tensor]], context: int) -> ModelConfig:
    params = read_object(path)
    if params.get("use_scaled_rope"):
        raise ValueError(f"{path}: use_scaled_rope is not what a Llama 2 computes")
    try:
        dim, heads = field(params, "dim", int), field(params, "n_heads", int)
        vocab_size = field(params, "vocab_size", int, -1)
        if vocab_size == -1:  # Meta's files leave it to the tokenizer
            vocab_size = shares[0]["tok_embeddings.weight"].shape[0]
        return ModelConfig(
            dim=dim,
            n_layers=field(params, "n_layers", int),
            n_heads=heads,
            n_kv_heads=field(params, "n_kv_heads", int, heads),
            ffn_dim=ffn_width(
                dim,
                field(params, "multiple_of", int, 256),
                field(params, "ffn_dim_multiplier", float, None),
            ),
            vocab_size=vocab_size,
            context=context,
            norm_eps=field(params, "norm_eps", float, 1e-5),
            rope_theta=field(params, "rope_theta", float, 10000.0),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check(
    folder: Path, shares: list[Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every share has every tensor, and joined they have the model's shapes."""
    widths = sum(share["tok_embeddings.weight"].shape[1] for share in shares)
    dim = shapes["model.norm.weight"][0]
    if widths < dim:
        raise ValueError(
            f"{folder}: {count_of(len(shares), 'consolidated file')} with {widths} of {dim} "
            "columns; fetch the missing files"
        )
    expected = {meta_name(name): shape for name, shape in shapes.items()}
    for share in shares:
        cut = {}
        for name, shape in expected.items():
            along = CUT.get(_stem(name))
            cut[name] = tuple(
                size // len(shares) if d == along else size for d, size in enumerate(shape)
            )
        found = {name: tuple(t.shape) for name, t in share.items() if name != "rope.freqs"}
        check_shapes(found, cut, folder)


def _stem(name: str) -> str:
    """layers.0.attention.wq.weight -> attention.wq; output.weight -> output."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "layers" else parts)


def _join(shares: list[Mapping[str, Any]], name: str) -> Tensor:
    dim = CUT.get(_stem(name))
    if dim is None or len(shares) == 1:
        return shares[0][name].clone()
    return torch.cat([share[name] for share in shares], dim)
