"""A set of weights, wherever it is stored: its shape, its tensors by our names, its check.

Our names are Hugging Face's. Meta's (and llama2.c's) stand beside them here, with the one
thing that differs besides the name: the order of the rows of q and k. Meta rotates adjacent
pairs of a head (x0 x1, x2 x3, ...), we rotate x0 with x[D/2]: rows are reordered once, at
conversion. C model width, D head size, H heads.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from puna.core.config import ModelConfig
from puna.core.documents import as_name, count_of
from puna.core.model import Transformer
from puna.core.parameters import initial_weights, parameter_shapes

LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
# What others put before a model's names: whose it is, and the way out.
PREFIXES = {
    "_orig_mod.": ("torch.compile", "save the model that was compiled (its `_orig_mod`)"),
    "module.": ("a distributed wrapper", "save the model inside of it (its `module`)"),
    "base_model.": ("peft", "merge the adapter first (merge_and_unload) and save that"),
}
PIECE = 1 << 19  # numbers of a tensor that are read at once, where it need not be whole
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as options say
META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


class Source(NamedTuple):
    """Weights that can be read: opened and checked, not yet in memory."""

    config: ModelConfig
    head: str  # "lm" or "score"
    dtype: torch.dtype  # the embedding's, as stored; others may have another
    tokenizer: Path | None
    # Every parameter once, by our names. A tensor may be a view of a mapped file: copy it.
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]

    def pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """Every parameter, in as small pieces as the files allow: its name, a row and the rows from
        there on; of a norm, rows are numbers. `tensors` with a method `pieces` gives them."""
        if (pieces := getattr(self.tensors, "pieces", None)) is not None:
            return pieces()
        return ((name, 0, tensor) for name, tensor in self.tensors())


def fresh(
    config: ModelConfig, seed: int, head: str = "lm", device: torch.device | str = "cpu"
) -> Source:
    """The weights of a model that nothing was trained yet, drawn from `seed` on `device`."""
    tensors = partial(initial_weights, config, head, seed, device)
    return Source(config, head, torch.float32, None, tensors)


def in_memory(source: Source, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """The model of `source`. Peak memory is about one model."""
    with torch.device("meta"):
        model = Transformer(source.config, source.head)
    for name, tensor in source.tensors():
        # A copy, always: the source may be a mapped file that is later removed or changed.
        kept = as_type(name, tensor, dtype)
        value = nn.Parameter(kept.to(device=device, copy=kept is tensor))
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)
    return model


def as_type(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` as `dtype` (None: its own); ValueError where a number would become infinite."""
    if dtype is None or dtype == tensor.dtype:
        return tensor
    converted = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        lost = converted.isinf() & tensor.isfinite()
        if lost.any():
            raise ValueError(
                f"{name} holds {tensor[lost][0].item():g}, and {str(dtype).removeprefix('torch.')} "
                f"ends at {torch.finfo(dtype).max:g}; choose a type that reaches further"
            )
    return converted


def meta_name(name: str) -> str:
    """Meta's name of our weight `name`: model.layers.0.mlp.up_proj.weight ->
    layers.0.feed_forward.w3.weight."""
    stem = name.removesuffix(".weight")
    if stem in META_NAMES:
        return f"{META_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"layers.{layer}.{META_NAMES[part]}.weight"


def rope_heads(name: str, config: ModelConfig) -> int | None:
    """Number of heads whose rows the two layouts order differently; None where they agree."""
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        return config.n_heads
    if name.endswith(("k_proj.weight", "k_proj.bias")):
        return config.n_kv_heads
    return None


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of (H*D, C), or (H*D,), from adjacent pairs to halves: x0 x1 x2 x3 -> x0 x2 x1 x3."""
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def check_tensors(
    found: Mapping[str, tuple[int, ...]], config: ModelConfig, head: str, where: Path
) -> None:
    """ValueError where these are not the tensors of a model of this shape, named as ours are."""
    for prefix, (whose, remedy) in PREFIXES.items():
        if any(name.startswith(prefix) for name in found):
            raise ValueError(
                f"{where}: the tensors' names begin with `{prefix}`, which {whose} puts there; "
                f"{remedy}"
            )
    check_layers(found, config, where)
    check_shapes(found, parameter_shapes(config, head), where)


def check_layers(names: Iterable[str], config: ModelConfig, where: Path) -> None:
    """ValueError where the weights have fewer layers than the config says. Nothing is made for a
    layer, not even its name, before it is known to be there: a config may say 10^9."""
    numbers = {found[1] for name in names if (found := LAYER.match(name))}
    if len(numbers) < config.n_layers:
        raise ValueError(
            f"{where}: the config says {count_of(config.n_layers, 'layer')}, the weights have "
            f"{len(numbers)}; fetch the checkpoint again, or use the config it was saved with"
        )


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path
) -> None:
    """ValueError naming the first missing, extra or mis-shaped tensor."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    remedy = "fetch the checkpoint again, or use the config it was saved with"
    if missing:
        raise ValueError(f"{where}: missing tensors: {_names(missing)}; {remedy}")
    if extra:
        raise ValueError(f"{where}: tensors that this Llama has not: {_names(extra)}; {remedy}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(found[name])} where the config says {shape}; "
                f"{remedy}"
            )


def _names(names: list[str]) -> str:
    return as_name(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def exactly(file: BinaryIO, size: int) -> bytearray:
    """So many bytes of a file; ValueError where it ends before: it was whole when it was opened."""
    data = bytearray(file.read(size))
    if len(data) < size:
        raise ValueError(f"{file.name} is cut short; fetch it again")
    return data
