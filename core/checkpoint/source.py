"""A set of weights, wherever it is stored: its shape, its tensors by our names, its check.

Our names are Hugging Face's. Meta's (and llama2.c's) stand beside them here, with the one
thing that differs besides the name: the order of the rows of q and k. Meta rotates adjacent
pairs of a head (x0 x1, x2 x3, ...), we rotate x0 with x[D/2]: rows are reordered once, at
conversion. C model width, D head size, H heads.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from puna.core.config import ModelConfig
from puna.core.model import Transformer

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
    dtype: torch.dtype  # as stored (the embedding's)
    tokenizer: Path | None
    # Every parameter once, by our names. A tensor may be a view of a mapped file: copy it.
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


def fresh(config: ModelConfig, seed: int, head: str = "lm") -> Source:
    """The weights of a model that nothing was trained yet, drawn from `seed`."""
    with torch.device("meta"):
        model = Transformer(config, head)
    return Source(config, head, torch.float32, None, lambda: model.initial_weights(seed))


def in_memory(source: Source, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """The model of `source`. Peak memory is about one model."""
    with torch.device("meta"):
        model = Transformer(source.config, source.head)
    for name, tensor in source.tensors():
        # A copy, always: the source may be a mapped file that is later removed or changed.
        value = nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True))
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)
    return model


def meta_name(name: str) -> str:
    """Meta's name of our parameter `name`: model.layers.0.mlp.up_proj.weight ->
    layers.0.feed_forward.w3.weight."""
    stem = name.removesuffix(".weight")
    if stem in META_NAMES:
        return f"{META_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"layers.{layer}.{META_NAMES[part]}.weight"


def rope_heads(name: str, config: ModelConfig) -> int | None:
    """Number of heads whose rows the two layouts order differently; None where they agree."""
    if name.endswith("q_proj.weight"):
        return config.n_heads
    if name.endswith("k_proj.weight"):
        return config.n_kv_heads
    return None


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of (H*D, C) from adjacent pairs to halves: x0 x1 x2 x3 -> x0 x2 x1 x3."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.transpose(1, 2).reshape(rows, width)


def parameter_shapes(config: ModelConfig, head: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order."""
    with torch.device("meta"):
        model = Transformer(config, head)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


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
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
