"""llama2.c's legacy `.bin`: seven int32 of header, then every weight as fp32, little-endian.

Header: dim, FFN width, layers, heads, key/value heads, vocabulary (negative where the head is
not the embedding), context. The weights follow kind by kind, all layers of a kind together,
with Meta's order of the rows of q and k; two RoPE tables that nobody reads stand before the
head. The format has no room for norm_eps and rope_theta: they are Llama 2's.
"""

import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from puna.core.checkpoint import llama2c_versions
from puna.core.checkpoint.source import (
    Source,
    as_type,
    exactly,
    half_split,
    interleaved,
    rope_heads,
)
from puna.core.config import ModelConfig, parameter_count
from puna.core.documents import count_of, regular_file
from puna.core.parameters import EMBEDDING, HEADS, parameter_shapes

HEADER = struct.Struct("<7i")
HEAD = HEADS["lm"]
# What else a .bin may be, by its first bytes.
OTHERS = {
    b"PK": "a pickled PyTorch file",
    b"GGUF": "a GGUF file",
}
LAYER_KINDS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


def open_source(path: Path) -> Source:
    """Open a `.bin` of any version; ValueError where it is none or its size is not its
    header's."""
    regular_file(path, "no such file; give a model folder or a llama2.c .bin file")
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    remedy = "give a whole .bin in llama2.c's legacy format (export version 0)"
    if header.startswith(llama2c_versions.MAGIC):
        return llama2c_versions.open_source(path)
    for magic, what in OTHERS.items():
        if header.startswith(magic):
            raise ValueError(f"{path} is {what}; {remedy}")
    if len(header) < HEADER.size:
        raise ValueError(f"{path} is {count_of(len(header), 'byte')} long; {remedy}")
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, context = HEADER.unpack(header)
    try:
        config = ModelConfig(
            dim, n_layers, n_heads, n_kv_heads, ffn_dim, abs(vocab_size), context=context
        )
        tied = vocab_size > 0
        expected = HEADER.size + 4 * _layout_end(config, tied)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remedy}") from error
    size = path.stat().st_size
    if size != expected:
        raise ValueError(
            f"{path} is {count_of(size, 'byte')} long, its header asks for {expected}; {remedy}"
        )
    return Source(config, "lm", torch.float32, None, lambda: _read(path, config, tied))


def write(path: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write named tensors, in any order, one in memory at a time; tied where the head equals
    the embedding. Raises ValueError for a model that the format cannot describe."""
    for name, value, only in (
        ("norm_eps", config.norm_eps, 1e-5),
        ("rope_theta", config.rope_theta, 10000.0),
    ):
        if not math.isclose(value, only):
            raise ValueError(
                f"a llama2.c .bin cannot hold {name} {value}: it is always {only}; write a model "
                "folder or a .gguf"
            )
    for name in ("rope_scaling", "head_size", "attention_bias", "qkv_bias"):
        if getattr(config, name):
            raise ValueError(f"a llama2.c .bin cannot hold {name}; write a model folder or a .gguf")
    offsets = _layout(config)
    kept: dict[str, Tensor] = {}  # the two that decide whether the head is tied
    with path.open("wb") as file:
        for name, tensor in tensors:
            tensor = as_type(name, tensor, torch.float32)
            if name in (HEAD, EMBEDDING):
                kept[name] = tensor.clone()
            heads = rope_heads(name, config)
            _put(file, offsets[name], interleaved(tensor, heads) if heads else tensor)
        for table, offset in zip(_rope_tables(config), _table_offsets(config), strict=True):
            _put(file, offset, table)
        tied = torch.equal(kept[HEAD], kept[EMBEDDING])
        file.truncate(HEADER.size + 4 * _layout_end(config, tied))
        file.seek(0)
        vocab_size = config.vocab_size if tied else -config.vocab_size
        file.write(
            HEADER.pack(
                config.dim,
                config.ffn_dim,
                config.n_layers,
                config.n_heads,
                config.n_kv_heads,
                vocab_size,
                config.context,
            )
        )


def _names(config: ModelConfig) -> list[str]:
    """Every parameter but the head, in the file's order."""
    layers = [
        f"model.layers.{layer}.{kind}.weight"
        for kind in LAYER_KINDS
        for layer in range(config.n_layers)
    ]
    return [EMBEDDING, *layers, "model.norm.weight"]


def _layout(config: ModelConfig) -> dict[str, int]:
    """Name -> where its numbers begin, counted in floats after the header."""
    shapes = parameter_shapes(config, "lm")
    offsets, offset = {}, 0
    for name in _names(config):
        offsets[name] = offset
        offset += math.prod(shapes[name])
    offsets[HEAD] = offset + 2 * _table_size(config)
    return offsets


def _layout_end(config: ModelConfig, tied: bool) -> int:
    """Length of the file in floats after the header: counted, whatever a header says."""
    head = config.vocab_size * config.dim
    return parameter_count(config) + 2 * _table_size(config) - (head if tied else 0)


def _table_size(config: ModelConfig) -> int:
    return config.context * config.head_dim // 2


def _table_offsets(config: ModelConfig) -> tuple[int, int]:
    end = _layout(config)[HEAD]
    return end - 2 * _table_size(config), end - _table_size(config)


def _rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (context, D/2): once read by llama2.c, skipped today."""
    pairs = torch.arange(0, config.head_dim, 2).float()
    angles = torch.outer(
        torch.arange(config.context).float(),
        1.0 / (config.rope_theta ** (pairs / config.head_dim)),
    )
    return angles.cos(), angles.sin()


def _put(file: BinaryIO, offset: int, tensor: Tensor) -> None:
    file.seek(HEADER.size + 4 * offset)
    file.write(tensor.contiguous().numpy().astype("<f4", copy=False).tobytes())


def _read(path: Path, config: ModelConfig, tied: bool) -> Iterator[tuple[str, Tensor]]:
    shapes, offsets = parameter_shapes(config, "lm"), _layout(config)
    if tied:
        offsets[HEAD] = offsets[EMBEDDING]
    with path.open("rb") as file:
        for name, offset in offsets.items():
            file.seek(HEADER.size + 4 * offset)
            data = exactly(file, 4 * math.prod(shapes[name]))
            tensor = torch.frombuffer(data, dtype=torch.float32).view(shapes[name])
            heads = rope_heads(name, config)
            yield name, half_split(tensor, heads) if heads else tensor
