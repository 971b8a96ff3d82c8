"""The same weights in every provider: made or read by Puna, saved where others are to open them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.benchmarks.machine import installed, matmul_rate, read_rate
from puna.benchmarks.models.vllm import open_vllm
from puna.benchmarks.opponents import attempted, has
from puna.core.checkpoint.folder import open_model, save_model
from puna.core.checkpoint.source import Source, fresh, in_memory
from puna.core.config import SIZES, ModelConfig, parameter_count, size
from puna.core.model import Transformer
from puna.core.parameters import parameter_shapes

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """The best this machine was seen to do, whatever the program."""

    matmul: float  # FLOP/s in the models' dtype
    read: float  # bytes/s, of a block as large as the weights


@dataclass(frozen=True)
class Shape:
    """A size of Llama or a model's folder, or its first blocks where it is too large for the
    machine."""

    size: str  # a name of puna.core.config.SIZES, or the path of a model's folder
    layers: int = 0  # blocks kept; 0: all
    tiny: bool = False  # another model in its place, to see that all runs

    @property
    def folder(self) -> Path | None:
        """Where its weights lie, if it is no size's name."""
        return Path(self.size) if self.size not in SIZES and Path(self.size).exists() else None

    @property
    def whole(self) -> ModelConfig:
        """Before anything is cut. ValueError where it is neither a size nor a model."""
        return open_model(self.folder, head="lm").config if self.folder else size(self.size)

    def check(self) -> None:
        """ValueError for an unknown size, and for more blocks than it has."""
        if self.layers > (blocks := self.whole.n_layers):
            raise ValueError(
                f"layers is {self.layers} and {self.size} has {blocks} blocks; keep fewer"
            )

    @property
    def config(self) -> ModelConfig:
        """Raises ValueError as `check` does."""
        self.check()
        whole = self.whole
        if self.tiny:
            group = whole.n_heads // whole.n_kv_heads
            return ModelConfig(16 * group, 2, group, 1, 32, 128, context=64)
        return replace(whole, n_layers=self.layers) if self.layers else whole

    def __str__(self) -> str:
        name = self.folder.resolve().name if self.folder else self.size
        if self.tiny:
            return f"{name} (dry run)"
        whole = self.whole.n_layers
        cut = 0 < self.layers < whole
        return f"{name} cut to {self.layers} of {whole}" if cut else name


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
    vllm: Any | None = None  # its engine; None where it takes no part

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
    engines: bool = False,
) -> Models:
    """A shape's weights, and the same opened again by each peer from `folder`; `engines`: by those,
    too, that generate and cannot train."""
    kind = DTYPES[dtype]
    model = weights_of(shape, device, kind)
    config = model.config
    trains = peers and installed("transformers") is not None
    if trains or (peers and engines and has("vllm")):  # 7B's are a minute of a GPU's time
        save_model(folder, model)
    theirs = None
    if trains:
        theirs = attempted("transformers", lambda: open_transformers(folder, device, kind))
    stored = kind.itemsize * multiplied_parameters(config)
    ceilings = Ceilings(matmul_rate(device, kind, dry=shape.tiny), read_rate(device, stored))
    vllm = open_vllm(folder, device, dtype, config.context) if peers and engines else None
    return Models(shape, dtype, gpu, config, model, theirs, ceilings, vllm)


def weights_of(
    shape: Shape, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Transformer:
    """A folder's, or random ones."""
    return in_memory(source_of(shape, device), device, dtype)


def source_of(shape: Shape, device: torch.device, head: str = "lm", seed: int = 0) -> Source:
    """The weights of a shape: a folder's, or random ones; of a score head always those."""
    config = shape.config
    if shape.folder is None or shape.tiny or head != "lm":
        return fresh(config, seed, head, device)
    stored, kept = open_model(shape.folder, head="lm"), parameter_shapes(config, head)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in stored.tensors() if name in kept)

    return stored._replace(config=config, tensors=tensors)


def blocks_that_fit(shape: Shape, memory: int, bytes_a_parameter: float) -> int:
    """How many blocks of a shape fit `memory` bytes, a fifth of which is left to activations; 0
    where all do. ValueError where not even one does."""
    config = shape.whole
    whole = parameter_count(config)
    block = parameter_count(replace(config, n_layers=config.n_layers + 1)) - whole
    room = 0.8 * memory / bytes_a_parameter - (whole - config.n_layers * block)
    found = int(room // block)
    if found < 1:
        raise ValueError(
            f"not even one block of {shape} fits {memory / 1e9:.0f} GB as it is measured here; "
            "take a smaller shape, or --no-peers"
        )
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


def finishing_parameters(config: ModelConfig) -> int:
    """Those of the last block's products that only tokens whose output is wanted go through."""
    return config.dim * config.dim + 3 * config.dim * config.ffn_dim
