"""GGUF, llama.cpp's format: models are read from it, quantised ones as fp32.

The rows of q and k are ordered as Meta's are, but for Qwen2's. What the file says of its tokenizer
is read in `core/text/gguf_tokenizer.py`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.core.checkpoint.gguf_header import Header, Place, read_header
from puna.core.checkpoint.source import (
    PIECE,
    Source,
    check_tensors,
    exactly,
    half_split,
    rope_heads,
)
from puna.core.config import ModelConfig
from puna.core.documents import as_name, field
from puna.core.parameters import EMBEDDING, HEADS, parameter_shapes
from puna.core.rope_scaling import RopeScaling

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight"}
HEAD = HEADS["lm"]
FREQUENCIES = "rope_freqs.weight"  # what the frequencies of RoPE are divided by
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# ggml's number of a quantised type: (numbers in a block, bytes of a block)
BLOCKS = {
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
}
FIRST_CONTEXT = "rope.scaling.original_context_length"


def gguf_name(name: str) -> str:
    """llama.cpp's name of our parameter `name`."""
    if name in OUTSIDE or name == HEAD:
        return OUTSIDE.get(name, "output.weight")
    stem, _, kind = name.rpartition(".")
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def stored_heads(name: str, config: ModelConfig) -> int | None:
    """Number of heads whose rows are ordered otherwise in a file than here; None: none are."""
    return None if config.qkv_bias else rope_heads(name, config)


def open_source(path: Path) -> Source:
    """Open and check a GGUF file; nothing but its head is in memory yet. ValueError where it is
    damaged, no Llama or quantised in a way that is not known."""
    header = read_header(path)
    try:
        config = _config(path, header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shapes = parameter_shapes(config, "lm") if _has_layers(header, config) else {}
    ours = {gguf_name(name): name for name in shapes}
    stored = {name: at for name, at in header.tensors.items() if name != FREQUENCIES}
    tied = "output.weight" not in stored
    found = {ours.get(name, name): at.shape for name, at in stored.items()}
    if tied and EMBEDDING in found:
        found[HEAD] = found[EMBEDDING]
    check_tensors(found, config, "lm", path)
    size = path.stat().st_size
    for name, at in stored.items():
        if at.offset + _bytes(path, name, at) > size:
            raise ValueError(f"{path} is cut short; fetch it again")

    places = {
        name: stored[gguf_name(EMBEDDING if name == HEAD and tied else name)] for name in shapes
    }
    dtype = FLOATS.get(stored[OUTSIDE[EMBEDDING]].kind, torch.float32)
    tokenizer = path if "tokenizer.ggml.tokens" in header.values else None
    return Source(config, "lm", dtype, tokenizer, InFile(path, config, places))


@dataclass(frozen=True)
class InFile:
    """The tensors of a GGUF file; called, it gives them one by one."""

    path: Path
    config: ModelConfig
    places: Mapping[str, Place]  # by our names

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        for name, at in self.places.items():
            yield name, self._ordered(name, _read(self.path, at))

    def pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """As Source.pieces gives them: of q and k whole heads."""
        for name, at in self.places.items():
            for first, part in _parts(self.path, name, at, self.config.head_dim):
                yield name, first, self._ordered(name, _read(self.path, part))

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor, from a head's first on, in our order."""
        if stored_heads(name, self.config) is None:
            return rows
        return half_split(rows, len(rows) // self.config.head_dim)


def _has_layers(header: Header, config: ModelConfig) -> bool:
    """Whether the file has so many layers, before a name is made for each."""
    return config.n_layers <= len(header.tensors)


def _config(path: Path, header: Header) -> ModelConfig:
    values = header.values
    name = field(values, "general.architecture", str)
    if name not in ("llama", "qwen2"):
        raise ValueError(f"the architecture is {as_name(name)}; Puna reads llama and qwen2")

    def said(key: str, kind: type, *default: Any) -> Any:
        return field(values, f"{name}.{key}", kind, *default)

    embedding = header.tensors.get(OUTSIDE[EMBEDDING])
    if embedding is None:
        raise ValueError(f"it lacks {OUTSIDE[EMBEDDING]}; fetch it again")
    heads = said("attention.head_count", int)
    config = ModelConfig(
        dim=said("embedding_length", int),
        n_layers=said("block_count", int),
        n_heads=heads,
        n_kv_heads=said("attention.head_count_kv", int, heads),
        ffn_dim=said("feed_forward_length", int),
        vocab_size=embedding.shape[0],
        context=said("context_length", int),
        norm_eps=_short(said("attention.layer_norm_rms_epsilon", float)),
        rope_theta=_short(said("rope.freq_base", float, 10000.0)),
        head_size=said("attention.key_length", int, None),
        attention_bias=name == "llama" and "blk.0.attn_q.bias" in header.tensors,
        qkv_bias=name == "qwen2",
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if said(key, int, config.head_dim) != config.head_dim:
            raise ValueError(f"{name}.{key} is another size than the heads have; Puna has no such")
    if said("expert_count", int, 0):
        raise ValueError("it is a mixture of experts, which Puna does not compute")
    return ModelConfig(**{**vars(config), "rope_scaling": _scaling(path, header, config)})


def _short(value: float) -> float:
    """An fp32 number as it was written: 1e-5, not 9.99999974e-6."""
    return float(np.format_float_scientific(np.float32(value)))


def _scaling(path: Path, header: Header, config: ModelConfig) -> RopeScaling | None:
    name = "qwen2" if config.qkv_bias else "llama"
    about = f"{name}.rope.scaling"
    kind = field(header.values, f"{about}.type", str, "none")
    if kind == "linear":
        return RopeScaling("linear", field(header.values, f"{about}.factor", float))
    if kind != "none":
        raise ValueError(f"rope.scaling.type = {as_name(kind)} is not what Puna computes")
    at = header.tensors.get(FREQUENCIES)
    if at is None:
        return None
    if at.kind != 0 or at.shape != (config.head_dim // 2,):
        raise ValueError(f"{FREQUENCIES} does not fit the heads; fetch it again")
    divisors = _read(path, at).double()
    if torch.allclose(divisors, torch.ones_like(divisors)):
        return None
    # Released models begin with the default's 8,192 tokens; the slowest pair is slowed wholly.
    first = field(header.values, f"{name}.{FIRST_CONTEXT}", int, None)
    known = RopeScaling("llama3", _short(float(divisors.max())))
    if first is not None:
        known = known._replace(original_max_position_embeddings=first)
    known.check(config.rope_theta)
    if torch.allclose(known.divisors(config.head_dim, config.rope_theta), divisors, rtol=1e-4):
        return known
    raise ValueError(f"{FREQUENCIES} stretches the context in a way that Puna does not know")


def _bytes(path: Path, name: str, at: Place) -> int:
    numbers = math.prod(at.shape)
    if at.kind in FLOATS:
        return numbers * FLOATS[at.kind].itemsize
    if at.kind not in BLOCKS:
        raise ValueError(
            f"{path}: {as_name(name)} is stored in ggml's type {at.kind}, which Puna does not "
            "read; take a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or a K-quant"
        )
    block, size = BLOCKS[at.kind]
    if at.shape[-1] % block:
        raise ValueError(f"{path}: {as_name(name)} has rows that are no whole blocks")
    return numbers // block * size


def _parts(path: Path, name: str, at: Place, multiple: int) -> Iterator[tuple[int, Place]]:
    """A tensor's rows, about PIECE numbers at a time and a multiple of so many rows: (the first
    row, where they lie). What has one dimension stays whole: its blocks may span it."""
    if len(at.shape) == 1:
        yield 0, at
        return
    rows, *others = at.shape
    row_bytes = _bytes(path, name, at) // rows
    step = multiple * max(1, PIECE // (multiple * math.prod(others)))
    for first in range(0, rows, step):
        shape = min(step, rows - first), *others
        yield first, Place(shape, at.kind, at.offset + first * row_bytes)


def _read(path: Path, at: Place) -> Tensor:
    size = _bytes(path, "a tensor", at)
    with path.open("rb") as file:
        file.seek(at.offset)
        data = exactly(file, size)
    if at.kind in FLOATS:
        return torch.frombuffer(data, dtype=FLOATS[at.kind]).view(at.shape)
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ValueError(
            f"{path} is quantised, which the `gguf` package reads; install it "
            "(pip install 'puna[gguf]')"
        ) from None
    rows = np.frombuffer(data, np.uint8).reshape(*at.shape[:-1], -1)
    numbers = quants.dequantize(rows, GGMLQuantizationType(at.kind))
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).view(at.shape)
