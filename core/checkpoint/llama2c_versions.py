"""llama2.c's `.bin` of version 1 (fp32) and 2 (int8 in groups), read only.

A header of 256 bytes: "ak42", the version, dim, FFN width, layers, heads, key/value heads,
vocabulary, context as int32, one byte that says whether the head is the embedding, and in version
2 the size of a group. Then the norms of all layers in fp32 and every matrix, kind by kind; in
version 2 a matrix is its int8 numbers, followed by one fp32 scale for each group of a row.
Source: export.py of karpathy/llama2.c, `version1_export` and `version2_export`.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from puna.core.checkpoint.source import Source, exactly, half_split, rope_heads
from puna.core.config import ModelConfig, parameter_count
from puna.core.documents import count_of
from puna.core.parameters import EMBEDDING, HEADS, parameter_shapes

MAGIC = b"24ka"
HEADER = struct.Struct("<4si7iBi")
BEGIN = 256  # bytes before the weights
NORMS = ("input_layernorm", "post_attention_layernorm")
MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
HEAD = HEADS["lm"]
REMEDY = "export the model again"


def open_source(path: Path) -> Source:
    """Open a `.bin` of version 1 or 2; ValueError where its size is not its header's."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path} is {count_of(len(header), 'byte')} long; {REMEDY}")
    _, version, dim, ffn, layers, heads, kv_heads, vocab, context, shared, group = HEADER.unpack(
        header
    )
    if version not in (1, 2):
        raise ValueError(f"{path} is a .bin of version {version}; Puna reads 0, 1 and 2")
    try:
        config = ModelConfig(dim, layers, heads, kv_heads, ffn, vocab, context=context)
        group = group if version == 2 else 0
        expected = BEGIN + _length(config, bool(shared), group)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from error
    size = path.stat().st_size
    if size != expected:
        raise ValueError(
            f"{path} is {count_of(size, 'byte')} long, its header asks for {expected}; {REMEDY}"
        )
    return Source(
        config, "lm", torch.float32, None, lambda: _read(path, config, bool(shared), group)
    )


def _length(config: ModelConfig, shared: bool, group: int) -> int:
    """Bytes of the weights: counted, whatever a header says. `group` 0: all is fp32."""
    norms = (2 * config.n_layers + 1) * config.dim
    matrices = parameter_count(config) - norms
    matrices -= config.vocab_size * config.dim if shared else 0
    if not group:
        return 4 * (norms + matrices)
    kv_dim = config.n_kv_heads * config.head_dim
    rows = config.dim, config.ffn_dim, kv_dim
    if group < 0 or any(size % group for size in rows[:2]):
        raise ValueError(f"groups of {group} do not divide the rows")
    return 4 * norms + matrices + 4 * (matrices // group)


def _names(config: ModelConfig, shared: bool) -> list[str]:
    """Every parameter that is stored, in the file's order."""

    def layers(kind: str) -> list[str]:
        return [f"model.layers.{layer}.{kind}.weight" for layer in range(config.n_layers)]

    norms = [name for kind in NORMS for name in layers(kind)]
    matrices = [name for kind in MATRICES for name in layers(kind)]
    return [*norms, "model.norm.weight", EMBEDDING, *matrices, *([] if shared else [HEAD])]


def _read(
    path: Path, config: ModelConfig, shared: bool, group: int
) -> Iterator[tuple[str, Tensor]]:
    shapes = parameter_shapes(config, "lm")
    with path.open("rb") as file:
        file.seek(BEGIN)
        for name in _names(config, shared):
            count = math.prod(shapes[name])
            if group and len(shapes[name]) == 2:
                numbers = torch.frombuffer(exactly(file, count), dtype=torch.int8)
                scales = _floats(exactly(file, 4 * (count // group)))
                tensor = numbers.view(-1, group) * scales[:, None]
            else:
                tensor = _floats(exactly(file, 4 * count))
            tensor = tensor.view(shapes[name])
            heads = rope_heads(name, config)
            yield name, half_split(tensor, heads) if heads else tensor
            if shared and name == EMBEDDING:
                yield HEAD, tensor.clone()


def _floats(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.float32)
