"""Bytes that a rank needs, by kind: arithmetic over shapes, no model is built.

Of FSDP2 as `core.parallel` applies it: parameters, gradients and AdamW's moments are fp32 shards; a
block's parameters are gathered in the computing dtype as it runs, the next one's beside them; a
block's whole gradients are in that dtype until they are added up over the ranks in fp32; embedding,
final norm and head stay gathered.
"""

from typing import NamedTuple

import torch

from puna.core.config import ModelConfig, block_parameters, parameter_count
from puna.core.generation.kv_cache import bytes_a_token
from puna.trainers.train.precision import DTYPES

Bytes = dict[str, float]  # kind -> bytes of one rank
FP32 = 4
MOMENTS = 2 * FP32


class Setting(NamedTuple):
    """What decides how much a rank holds."""

    shape: ModelConfig
    ranks: int
    dtype: str  # "fp32" | "bf16": of the products
    checkpointing: str = "none"
    tp: int = 1  # so many of the ranks work on the same tokens
    offload: bool = False

    @property
    def width(self) -> int:
        """Bytes of a number in products."""
        return dtype_of(self.dtype).itemsize

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the model: on one rank it casts to another dtype."""
        return self.ranks > 1 or self.dtype != "fp32"


def dtype_of(name: str) -> torch.dtype:
    return DTYPES[name] or torch.float32


def root_parameters(shape: ModelConfig, head: str = "lm") -> int:
    """Embedding, final norm and head."""
    rows = 2 * shape.vocab_size if head == "lm" else shape.vocab_size + 1
    return (rows + 1) * shape.dim


def parameters(shape: ModelConfig, head: str = "lm") -> int:
    less = 0 if head == "lm" else (shape.vocab_size - 1) * shape.dim
    return parameter_count(shape) - less


def trained(setting: Setting, head: str = "lm") -> Bytes:
    """A network with its optimizer, between steps."""
    count = parameters(setting.shape, head) / setting.ranks
    return {"parameters": FP32 * count, "moments": 0.0 if setting.offload else MOMENTS * count}


def stepping(setting: Setting, head: str = "lm") -> Bytes:
    """What the optimizer's own step takes beside `trained`: moments that are on the host else."""
    count = parameters(setting.shape, head) / setting.ranks
    return {"gradients": FP32 * count, "moments": MOMENTS * count if setting.offload else 0.0}


def frozen(setting: Setting, head: str = "lm") -> Bytes:
    """A network to look with."""
    return {"frozen": setting.width * parameters(setting.shape, head) / setting.ranks}


def gathered(setting: Setting, head: str = "lm") -> Bytes:
    """What stands whole in a forward pass without gradients."""
    if not setting.is_sharded:
        return {}
    block = block_parameters(setting.shape) / setting.tp
    whole = 2 * block + root_parameters(setting.shape, head)
    return {"gathered": setting.width * whole}


def step(setting: Setting, tokens: int, head: str = "lm") -> Bytes:
    """What a training step takes beside `trained`, at the most. That is in the backward pass: as a
    block's gradients are added up, or those of embedding and head at its end."""
    shape, width = setting.shape, setting.width
    found = {
        "gradients": FP32 * parameters(shape, head) / setting.ranks,
        "activations": activations(setting, tokens),
    }
    if not setting.is_sharded:
        return found
    block, root = block_parameters(shape) / setting.tp, root_parameters(shape, head)
    of_head = root - shape.vocab_size * shape.dim
    of_block = {
        "gathered": float(width * (2 * block + root)),  # the block at work, the next one, the root
        "whole gradients": float(width * (block + of_head)),
        "reduction": float(FP32 * block),
    }
    at_the_end = {
        "gathered": 0.0,  # dropped before its gradients are added up
        "whole gradients": float(width * root),
        "reduction": float(FP32 * root),
    }
    return found | max(of_block, at_the_end, key=total)


def activations(setting: Setting, tokens: int) -> float:
    """What the backward pass needs of `tokens` tokens: inputs of both norms and of all products,
    q, k, v, the attention's output, gate, up and their product. Of a block that is computed again
    its input alone is kept, and all of one such block at a time."""
    shape, tp = setting.shape, setting.tp
    whole, layers = a_block(shape, tp), shape.n_layers
    again = {"none": 0, "selective": layers // 2, "full": layers}[setting.checkpointing]
    kept = whole * (layers - again) + shape.dim / tp * again + whole * bool(again)
    final = shape.dim if tp > 1 else 0  # the hidden states, on every rank
    return float(setting.width * tokens * (kept + final))


def a_block(shape: ModelConfig, tp: int = 1) -> float:
    """Numbers that a block keeps of one token on one of `tp` ranks: they share out all but what
    goes into attention and FFN."""
    kept = 2 * shape.dim + 2 * shape.q_dim + 2 * shape.kv_dim + 3 * shape.ffn_dim
    return 2 * shape.dim + kept / tp


def looking(setting: Setting, tokens: int, head: str = "lm") -> Bytes:
    """A forward pass without gradients over `tokens` tokens."""
    kept = a_block(setting.shape, setting.tp)
    work = {"activations": float(setting.width * tokens * kept)}
    return gathered(setting, head) | work


def sampling(setting: Setting, tp: int, rows: int, longest: int, cache_bytes: float) -> Bytes:
    """The policy to sample with, keys and values of at most `rows` answers that are at most
    `longest` tokens with their prompts, and one step's logits. Where `tp` ranks share the model,
    they continue all of their answers together."""
    shape = setting.shape
    a_row = bytes_a_token(shape, dtype_of(setting.dtype)) / tp * longest
    side_by_side = max(1, min(rows, int(cache_bytes / a_row)))
    return sampler(setting, tp) | {
        "keys and values": a_row * side_by_side,
        "logits": 2 * FP32 * side_by_side * shape.vocab_size,
    }


def sampler(setting: Setting, tp: int) -> Bytes:
    """The whole policy, or a part of it on each of `tp` ranks: all but the embedding."""
    if not setting.is_sharded:
        return {}
    once = setting.shape.vocab_size * setting.shape.dim
    policy = once + (parameters(setting.shape) - once) / tp
    return {"sampling model": setting.width * policy}


def gathering(setting: Setting, tp: int) -> Bytes:
    """The policy to sample with as the last block arrives, or embedding, norm and head: in one
    piece, and parameter by parameter."""
    whole = max(block_parameters(setting.shape), root_parameters(setting.shape))
    return sampler(setting, tp) | {"gathered": 2.0 * setting.width * whole}


def total(*parts: Bytes) -> float:
    return sum(value for part in parts for value in part.values())


def together(*parts: Bytes) -> Bytes:
    """The sum, kind by kind."""
    found: Bytes = {}
    for part in parts:
        for kind, value in part.items():
            found[kind] = found.get(kind, 0.0) + value
    return found
