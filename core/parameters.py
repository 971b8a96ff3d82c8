"""The parameters of a Llama by name: their shapes, how they start, and whether a model has just
these.

C model width, F FFN width, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from puna.core.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEADS = {"lm": "lm_head.weight", "score": "score.weight"}


def parameter_shapes(config: ModelConfig, head: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order: counted, no model is built."""
    C, F, HD, KD = config.dim, config.ffn_dim, config.q_dim, config.kv_dim
    block = {
        "self_attn.q_proj": (HD, C),
        "self_attn.k_proj": (KD, C),
        "self_attn.v_proj": (KD, C),
        "self_attn.o_proj": (C, HD),
        "mlp.gate_proj": (F, C),
        "mlp.up_proj": (F, C),
        "mlp.down_proj": (C, F),
        "input_layernorm": (C,),
        "post_attention_layernorm": (C,),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, C)}
    for layer in range(config.n_layers):
        for part, shape in block.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
            if part.removeprefix("self_attn.") in config.biased:
                shapes[f"model.layers.{layer}.{part}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (C,)
    shapes[HEADS[head]] = (config.vocab_size if head == "lm" else 1, C)
    return shapes


def initial_std(config: ModelConfig, name: str) -> float:
    """The standard deviation of a matrix's start, by its name (the paper gives no scheme).

    | matrix             | standard deviation      |
    |--------------------|-------------------------|
    | embedding          | 0.5                     |
    | o_proj, down_proj  | fan_in^-1/2 / sqrt(2 L) |
    | other projections  | fan_in^-1/2             |
    | lm_head            | 0.02                    |
    | score              | (C + 1)^-1/2            |

    At width 128 the usual 0.02 everywhere never learned to copy in 2.4M tokens.
    """
    starts = {EMBEDDING: 0.5, HEADS["lm"]: 0.02, HEADS["score"]: (config.dim + 1) ** -0.5}
    if name in starts:
        return starts[name]
    matrix = name.removesuffix(".weight").rpartition(".")[2]
    fan_in = {"o_proj": config.q_dim, "down_proj": config.ffn_dim}
    if matrix in fan_in:
        return fan_in[matrix] ** -0.5 / math.sqrt(2 * config.n_layers)
    return config.dim**-0.5


def initial_weights(
    config: ModelConfig, head: str, seed: int = 0, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's start in fp32, one at a time: normal, of `initial_std`; norms are one,
    biases zero. Drawn on the CPU they are the same for any device; on a GPU, where 7B's are there
    in a moment and not in a minute, others of the same scale."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in parameter_shapes(config, head).items():
        if len(shape) == 1:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
        else:
            start, std = torch.empty(shape, device=device), initial_std(config, name)
            yield name, start.normal_(0.0, std, generator=generator)


def check_parameters(model: nn.Module, config: ModelConfig, head: str) -> None:
    """Raises ValueError where the parameters' names are not those of a plain Llama of this shape:
    saved, initialised or copied by name, what an adapter adds would be lost or make no sense."""
    expected = set(parameter_shapes(config, head))
    found = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    other = sorted(found - expected) or sorted(expected - found)
    if other:
        raise ValueError(
            f"this is not a plain Llama's parameter: {other[0]}; merge the adapters first (peft: "
            "merge_and_unload), and remove parametrizations"
        )
