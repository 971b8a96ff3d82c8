"""The same weights in every provider: made by Puna, saved, and opened from the folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puna.benchmarks.machine import installed, matmul_rate, read_rate
from puna.core.checkpoint.folder import save_model
from puna.core.config import ModelConfig, size
from puna.core.model import Transformer


@dataclass(frozen=True)
class Ceilings:
    """The best this machine was seen to do, whatever the program."""

    matmul: float  # fp32 FLOP/s
    read: float  # bytes/s, of a block as large as the weights


@dataclass(frozen=True)
class Models:
    """One shape, and its weights in each provider."""

    shape: str
    config: ModelConfig
    puna: Transformer
    transformers: Any | None  # LlamaForCausalLM; None where it is not installed
    ceilings: Ceilings

    @property
    def device(self) -> torch.device:
        return self.puna.device


def open_models(shape: str, folder: Path, device: torch.device) -> Models:
    """Random weights of the size called `shape` (seed 0), saved in `folder` and opened again."""
    config = size(shape)
    model = Transformer(config)
    model.init_weights(seed=0)
    save_model(folder, model)
    model.to(device)
    peer = open_transformers(folder, device) if installed("transformers") else None
    stored = 4 * multiplied_parameters(config)
    ceilings = Ceilings(matmul_rate(device, torch.float32), read_rate(device, stored))
    return Models(shape, config, model, peer, ceilings)


def open_transformers(folder: Path, device: torch.device) -> Any:
    """LlamaForCausalLM in fp32, with the attention that transformers chooses by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # every answer has its full length
    return model.to(device)


def multiplied_parameters(config: ModelConfig) -> int:
    """Parameters that enter a matrix product: all but the embedding and the norms."""
    kv_dim = config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * (config.dim + kv_dim)
    block = attention + 3 * config.dim * config.ffn_dim
    return config.n_layers * block + config.vocab_size * config.dim
