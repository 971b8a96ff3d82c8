"""Model folders: written whole or not at all, read strictly.

A folder holds config.json, the weights in safetensors (one file, or shards with an index), and
the tokenizer's files: transformers, vLLM and llama.cpp's converter open it as it is. Trainers
put their own state in `training/` beside the weights.
"""

import os
import shutil
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.core.checkpoint import adapter, gguf_file, hf_tokenizer, llama2c, mistaken
from puna.core.checkpoint import hf_config as hf_format
from puna.core.checkpoint.atomic import atomic_folder as atomic_folder
from puna.core.checkpoint.atomic import recover
from puna.core.checkpoint.kept import keep_foreign
from puna.core.checkpoint.shards import SHARD_BYTES, write_json, write_shards
from puna.core.checkpoint.source import PIECE, Source, check_shapes, check_tensors, in_memory
from puna.core.checkpoint.steady import stamps_of, steady, weights_in
from puna.core.checkpoint.tensor_files import read_headers, read_rows, read_tensor
from puna.core.config import ModelConfig
from puna.core.documents import read_object
from puna.core.errors import Notice
from puna.core.model import Transformer
from puna.core.parameters import EMBEDDING, HEADS, check_parameters, parameter_shapes
from puna.core.text.tokenizer import Tokenizer

ABSENT = "no such model; give a model folder or a .gguf or llama2.c .bin file"


def save_model(
    folder: str | os.PathLike[str],
    model: Transformer,
    tokenizer_path: str | os.PathLike[str] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` as a model folder, replacing an earlier one only when all is on disk; files
    that are no model's (a README.md) stay.

    Raises ValueError where the tokenizer's vocabulary is not the model's, the model has adapters
    that are not merged, or `folder` holds something else than a model; OSError where the disk is
    full.
    """
    with atomic_folder(folder) as partial:
        keep_foreign(Path(folder), partial)
        write_model(partial, model, tokenizer_path, shard_bytes=shard_bytes)


def write_model(
    folder: Path,
    model: Transformer,
    tokenizer_path: str | os.PathLike[str] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The files of `save_model` into an existing folder: for use inside `atomic_folder`."""
    check_parameters(model, model.config, model.head)
    write_tensors(
        folder,
        model.config,
        model.head,
        ((name, parameter.detach()) for name, parameter in model.named_parameters()),
        tokenizer_path,
        dtype=model.model.norm.weight.dtype,
        shard_bytes=shard_bytes,
    )


def write_tensors(
    folder: Path,
    config: ModelConfig,
    head: str,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype,
    keep_types: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The files of a model folder from a stream of named tensors (a full state dict's items,
    a conversion): at most one shard of them is held in memory.

    All become `dtype`; with `keep_types` each keeps its own, and config.json says `dtype`. Raises
    ValueError where a number does not fit. A tokenizer whose ids no tokenizer.json of ours gives
    is written without one, with a warning.
    """
    write_texts(folder, config, head, tokenizer_path, dtype=dtype)
    shapes = write_shards(folder, tensors, None if keep_types else dtype, shard_bytes)
    check_shapes(shapes, parameter_shapes(config, head), folder)


def write_texts(
    folder: Path,
    config: ModelConfig,
    head: str,
    tokenizer_path: str | os.PathLike[str] | None,
    *,
    dtype: torch.dtype,
) -> None:
    """The files of a model folder but for its weights."""
    tokenizer = None
    if tokenizer_path is not None:
        tokenizer = check_vocabulary(tokenizer_path, config.vocab_size)
        if tokenizer.is_sentencepiece:
            _write_sentencepiece(folder, config, head, tokenizer)
        else:
            hf_tokenizer.copy_json(folder, config, tokenizer)
    write_json(folder / "config.json", hf_format.config_json(config, head, dtype, tokenizer))
    if head == "lm":
        write_json(folder / "generation_config.json", hf_format.special_ids(tokenizer))


def _write_sentencepiece(
    folder: Path, config: ModelConfig, head: str, tokenizer: Tokenizer
) -> None:
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    document = hf_tokenizer.tokenizer_config_json(config, head, tokenizer)
    try:
        ours = hf_tokenizer.checked_tokenizer_json(tokenizer.path)
        write_json(folder / "tokenizer.json", ours)
    except ValueError as error:
        document["tokenizer_class"] = "LlamaTokenizer"  # which reads tokenizer.model
        warnings.warn(f"{error}; it is left out", Notice, stacklevel=3)
    write_json(folder / "tokenizer_config.json", document)


def load_model(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    fresh_head: bool = False,
    seed: int = 0,
) -> Transformer:
    """A model from a folder (ours or Hugging Face's) or a llama2.c `.bin`.

    Options as in `open_model`. Peak memory is about one model.
    """
    source = open_model(path, head=head, fresh_head=fresh_head, seed=seed)
    return in_memory(source, device, dtype)


def open_model(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    fresh_head: bool = False,
    seed: int = 0,
) -> Source:
    """A model's weights with the head asked for, checked and not yet in memory.

    `head` None takes the stored one; "score" with `fresh_head` puts a new score head (normal,
    std (C + 1)^-1/2, drawn from `seed`) on any checkpoint. Raises ValueError where the files are
    damaged, incomplete or no Llama 2, or have another head.
    """
    source = open_source(path)
    head = head or source.head
    if fresh_head and head != "score":
        raise ValueError("fresh_head is for a score head; ask for head='score'")
    if head != source.head and not fresh_head:
        remedy = "train a reward model from it first, with `puna reward`"
        if head == "lm":
            remedy = "take the language model it was trained from"
        stored = {"lm": "an lm head", "score": "a score head"}[source.head]
        raise ValueError(f"{path} holds {stored} and no {head} head; {remedy}")
    if not fresh_head:
        return source

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.tensors():
            if name not in ("lm_head.weight", "score.weight"):
                yield name, tensor
        yield "score.weight", _fresh_score(source.config, seed)

    return source._replace(head=head, tensors=tensors)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open and check a model folder or a llama2.c `.bin`; nothing is read into memory yet. Its
    tensors raise ValueError where a file has changed until they are read."""
    path = Path(path)
    if not path.exists():
        recover(path)
    stamps = stamps_of(weights_in(path))
    return steady(_open_source(path), stamps)


def _open_source(path: Path) -> Source:
    if path.suffix == ".bin":
        return llama2c.open_source(path)
    if path.suffix == ".gguf" and not path.is_dir():
        return gguf_file.open_source(path)
    if not path.is_dir():
        mistaken.check_file(path)
        raise ValueError(
            f"{path}: no such model; give a model folder or a .gguf or llama2.c .bin file"
        )
    if not (path / "config.json").exists():
        if (path / adapter.SETTINGS).exists():
            return adapter.merged(path, open_source, tokenizer_in(path, None))
        if (path / "params.json").exists():
            raise ValueError(f"{path} is in Meta's format; convert it first with `puna convert`")
        mistaken.check_folder(path)
    config, head, tied = hf_format.read_config(path / "config.json")
    shards = read_headers(path)
    found = {name: view.shape for tensors in shards.values() for name, view in tensors.items()}
    # Of two that are tied one may be left out. Where both are stored both count, as in
    # transformers: the config says tied, but the head may have been trained apart.
    copied = _left_out(found) if tied and head == "lm" else {}
    found |= {name: found[other] for other, name in copied.items()}
    check_tensors(found, config, head, path)
    tokenizer = tokenizer_in(path, config.vocab_size)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)

    types = {name: view.dtype for stored in shards.values() for name, view in stored.items()}
    dtype = types.get(EMBEDDING) or types[HEADS["lm"]]
    return Source(config, head, dtype, tokenizer, InShards(path, shards, copied))


@dataclass(frozen=True)
class InShards:
    """The tensors of a folder's safetensors; called, it gives them one by one."""

    folder: Path
    shards: Mapping[str, Iterable[str]]  # file -> names
    copied: Mapping[str, str]  # stored name -> name of its copy

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        for file, names in self.shards.items():
            for name in names:
                tensor = read_tensor(self.folder / file, name)
                yield name, tensor
                if name in self.copied:
                    yield self.copied[name], tensor.clone()

    def pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """As Source.pieces gives them."""
        for file, names in self.shards.items():
            for name in names:
                for first, rows in read_rows(self.folder / file, name, PIECE):
                    yield name, first, rows
                    if name in self.copied:
                        yield self.copied[name], first, rows


def _left_out(found: Container[str]) -> dict[str, str]:
    """Stored name -> name of its copy, where one of the embedding and the head is not stored."""
    pairs = ((EMBEDDING, HEADS["lm"]), (HEADS["lm"], EMBEDDING))
    return {one: other for one, other in pairs if one in found and other not in found}


def tokenizer_in(folder: Path, vocab_size: int | None) -> Path | None:
    """The tokenizer's file in a model folder: its tokenizer.model, or its tokenizer.json where it
    has no other or only that one knows tokens that were added later."""
    pieces, document = folder / "tokenizer.model", folder / "tokenizer.json"
    if not pieces.exists():
        return document if document.exists() else None
    if not document.exists():
        return pieces
    known = Tokenizer(pieces).pieces
    if known == vocab_size or not hf_tokenizer.adds_tokens(document, known):
        return pieces
    return document


def tokenizer_path(path: str | os.PathLike[str]) -> Path:
    """The tokenizer.model or tokenizer.json of a model folder; ValueError where it has none, or
    there is no model."""
    if not Path(path).exists():
        raise ValueError(
            f"{path}: no such model; give a model folder or a .gguf or llama2.c .bin file"
        )
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        return Path(path)
    config = Path(path) / "config.json"
    vocab_size = read_object(config).get("vocab_size") if config.is_file() else None
    file = tokenizer_in(Path(path), vocab_size)
    if file is None and (Path(path) / adapter.SETTINGS).exists():
        file = open_source(path).tokenizer
    if file is None:
        if Path(path).is_dir() and not (Path(path) / "config.json").exists():
            mistaken.check_folder(Path(path))
        raise ValueError(f"{path} has no tokenizer.model; name the tokenizer it was trained with")
    return file


def check_vocabulary(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer at `path`, padded to `vocab_size` ids; ValueError where it is not one of so
    many pieces or a few less."""
    tokenizer = Tokenizer(Path(path))
    if not tokenizer.pads_to(vocab_size):
        raise ValueError(
            f"{path} has {tokenizer.pieces} pieces where the model's vocabulary is "
            f"{vocab_size}; use the tokenizer that the model was trained with"
        )
    tokenizer.vocab_size = vocab_size
    return tokenizer


def check_own(path: str | os.PathLike[str], own: Path) -> None:
    """ValueError where `path`, a tokenizer named for a model, has hardly a piece where `own`, the
    one in the model's folder, has it: its ids would mean other words."""
    given, known = Tokenizer(path), Tokenizer(own)
    texts = [i for i in range(known.pieces) if known.is_text(i)]  # bytes are alike everywhere
    same = sum(i < given.pieces and given.piece(i) == known.piece(i) for i in texts)
    if 2 * same < len(texts):
        raise ValueError(
            f"{path} agrees with the model's own tokenizer, {own}, in {same} of {len(texts)} "
            "pieces; leave it out"
        )


def _fresh_score(config: ModelConfig, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.dim, generator=generator) * (config.dim + 1) ** -0.5
