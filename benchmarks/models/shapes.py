"""The same weights in every provider: made by Puna, saved, and opened from the folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from puna.benchmarks.machine import installed, matmul_rate, read_rate
from puna.core.checkpoint.folder import save_model
from puna.core.config import ModelConfig, parameter_count, size
from puna.core.model import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """The best this machine was seen to do, whatever the program."""

    matmul: float  # FLOP/s in the models' dtype
    read: float  # bytes/s, of a block as large as the weights


@dataclass(frozen=True)
class Shape:
    """A size of Llama, or its first blocks where it is too large for the machine."""

    size: str  # a name of puna.core.config.SIZES
    layers: int = 0  # blocks kept; 0: all
    tiny: bool = False  # another model in its place, to see that all runs

    def check(self) -> None:
        """ValueError for an unknown size, and for more blocks than it has."""
        if self.layers > (blocks := size(self.size).n_layers):
            raise ValueError(
                f"layers is {self.layers} and {self.size} has {blocks} blocks; keep fewer"
            )

    @property
    def config(self) -> ModelConfig:
        """Raises ValueError as `check` does."""
        self.check()
        whole = size(self.size)
        if self.tiny:
            group = whole.n_heads // whole.n_kv_heads
            return ModelConfig(16 * group, 2, group, 1, 32, 128, context=64)
        return replace(whole, n_layers=self.layers) if self.layers else whole

    def __str__(self) -> str:
        whole = size(self.size).n_layers
        if self.tiny:
            return f"{self.size} (dry run)"
        cut = 0 < self.layers < whole
        return f"{self.size} cut to {self.layers} of {whole}" if cut else self.size


@dataclass(frozen=True)
class Models:
    """One shape, and its weights in each provider, all in `dtype`."""

    shape: Shape
    dtype: str  # a key of DTYPES
    gpu: bool  # measured as on a GPU: rows, batches and providers are a GPU's
    config: ModelConfig
    puna: Transformer
    transformers: Any | None  # LlamaForCausalLM; None where it is not installed
    ceilings: Ceilings

    @property
    def device(self) -> torch.device:
        return self.puna.device


def open_models(
    shape: Shape,
    folder: Path,
    device: torch.device,
    dtype: str = "fp32",
    *,
    gpu: bool = False,
    peers: bool = True,
) -> Models:
    """Random weights of a shape (seed 0), saved in `folder` and opened again."""
    config, kind = shape.config, DTYPES[dtype]
    model = Transformer(config)
    model.init_weights(seed=0)
    save_model(folder, model)
    model.to(device, kind)
    theirs = (
        open_transformers(folder, device, kind) if peers and installed("transformers") else None
    )
    stored = kind.itemsize * multiplied_parameters(config)
    ceilings = Ceilings(matmul_rate(device, kind), read_rate(device, stored))
    return Models(shape, dtype, gpu, config, model, theirs, ceilings)


def blocks_that_fit(size_name: str, memory: int, bytes_a_parameter: int) -> int:
    """How many blocks of a size fit `memory` bytes, a fifth of which is left to activations; at
    least one, and 0 where all do."""
    config = size(size_name)
    whole = parameter_count(config)
    block = parameter_count(replace(config, n_layers=config.n_layers + 1)) - whole
    room = 0.8 * memory / bytes_a_parameter - (whole - config.n_layers * block)
    found = max(1, int(room / block))
    return 0 if found >= config.n_layers else found


def open_transformers(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """LlamaForCausalLM, with the attention that transformers chooses by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None  # every answer has its full length
    return model.to(device)


def multiplied_parameters(config: ModelConfig) -> int:
    """Parameters that enter a matrix product: all but the embedding and the norms."""
    kv_dim = config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * (config.dim + kv_dim)
    block = attention + 3 * config.dim * config.ffn_dim
    return config.n_layers * block + config.vocab_size * config.dim
