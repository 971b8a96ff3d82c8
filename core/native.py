"""Checked calls into `puna.core._C`, the native engine for CPUs.

The extension has no knowledge of torch: it gets addresses. Everything is checked here, and the
tensors that it goes on reading are kept alive here. Without the extension, or for a model that it
does not take, `engine_for` returns None and PyTorch does the work.
"""

import functools
import logging
import os
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.core import ops
from puna.core.extension import extension
from puna.core.model import Block, Transformer

log = logging.getLogger("puna")


class Step(NamedTuple):
    """What a call returns: logits (W, V) fp32, or the tokens drawn from them with log-probs."""

    logits: Tensor | None
    tokens: Tensor | None  # (W,) int64
    logprobs: Tensor | None  # (W,) fp32


class Engine:
    """A model's weights, packed for decoding, and a key/value cache of `rows` x `slots` tokens."""

    def __init__(self, model: Transformer, instruction_set: str | None = None):
        module = extension()
        if module is None:
            raise ValueError("the native engine is not built; install Puna with a C++ compiler")
        why = unfit(model)
        if why:
            raise ValueError(f"the native engine does not take this model: {why}")
        fitting = instruction_sets(model.config.head_dim)
        if instruction_set is None:
            instruction_set = fitting[0]
        elif instruction_set not in fitting:
            raise ValueError(
                f"instruction set is {instruction_set!r}; this machine and a head size of "
                f"{model.config.head_dim} allow {fitting}"
            )
        self.config = model.config
        self.stamp = stamp(model)
        self._alive = (
            model.model.embed_tokens.weight.detach(),
            *model.rope_tables(torch.device("cpu")),
        )
        self._native = module.make_engine(instruction_set, *_description(model, self._alive))

    def reserve(self, rows: int, slots: int) -> None:
        """Room for `rows` rows of `slots` tokens; what was in the cache is lost."""
        if rows < 1 or not 1 <= slots <= self.config.context:
            raise ValueError(
                f"cannot reserve {rows} rows of {slots} slots: at least 1 row, and 1 to "
                f"{self.config.context} slots (the model's context)"
            )
        self._native.reserve(rows, slots)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        rows, slots = self._native.rows, self._native.slots
        if not (0 <= source < rows and 0 <= target < rows and 0 <= length <= slots):
            raise ValueError(
                f"cannot copy {length} tokens from row {source} to row {target} of a cache of "
                f"{rows} rows and {slots} slots"
            )
        if source != target:
            self._native.copy_row(source, target, length)

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        positions: Tensor,
        wanted: Tensor,
        *,
        seeds: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Step:
        """Append tokens (N,) at `positions` (N,) of cache `rows` (N,); all int64.

        A row's tokens stand next to each other, positions rising by one; a token sees its row up
        to itself. `wanted` (W,) names the tokens whose next one is asked for. With `seeds` (W,)
        int64 it is drawn as `ops.sample` does, without truncation; else the logits come back.
        Raises ValueError for tensors that are not CPU int64, contiguous and of fitting lengths,
        for ids the model does not know and for places outside the cache.
        """
        count = wanted.numel()
        for name, tensor in (("tokens", tokens), ("rows", rows), ("positions", positions)):
            _check_vector(name, tensor, tokens.numel())
        _check_vector("wanted", wanted, count)
        logits = torch.empty(count, self.config.vocab_size)
        drawn = logprobs = None
        if seeds is not None:
            _check_vector("seeds", seeds, count)
            if not temperature >= 0:
                raise ValueError(f"temperature {temperature} must be >= 0")
            drawn, logprobs = torch.empty(count, dtype=torch.int64), torch.empty(count)
        self._native.forward(
            tokens.numel(), tokens.data_ptr(), rows.data_ptr(), positions.data_ptr(),
            count, wanted.data_ptr(), logits.data_ptr(), float(temperature),
            *(0 if t is None else t.data_ptr() for t in (seeds, drawn, logprobs)),
            torch.get_num_threads(),
        )  # fmt: skip
        return Step(logits if drawn is None else None, drawn, logprobs)


WIDTHS = {"avx512": 16, "avx2": 8, "base": 4}  # floats a vector
HEAD_VECTORS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)  # head sizes the engine has code for, in vectors


def unfit(model: Transformer) -> str | None:
    """Why the engine cannot run this model, or None."""
    config = model.config
    if model.head != "lm":
        return "it has no language-model head"
    if ops.traced():
        return "it is being traced"
    for weight in model.parameters():
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return f"its weights are {weight.dtype} on {weight.device}, not float32 on the CPU"
        if type(weight) is not torch.nn.Parameter:
            return "its weights are sharded"
        if not weight.is_contiguous():
            return "its weights are not contiguous"
    if not instruction_sets(config.head_dim):
        return f"its head size is {config.head_dim}"
    return None


def instruction_sets(head_dim: int) -> list[str]:
    """Those of this machine that have code for a head size, best first."""
    module = extension()
    return [
        name
        for name in (module.instruction_sets() if module else [])
        if head_dim % WIDTHS[name] == 0 and head_dim // WIDTHS[name] in HEAD_VECTORS
    ]


def stamp(model: Transformer) -> tuple[tuple[int, int], ...]:
    """What changes when a weight is replaced or written to.

    Read from the weights themselves (60 MB in 3 ms): fused optimizers and `.data` write to them
    without a trace in torch's version counters.
    """
    module = extension()
    assert module is not None
    return tuple(
        (p.data_ptr(), module.fingerprint(p.data_ptr(), p.numel())) for p in model.parameters()
    )


_engines: "weakref.WeakKeyDictionary[Transformer, Engine]" = weakref.WeakKeyDictionary()


def engine_for(model: Transformer) -> Engine | None:
    """The model's engine with its weights as they are now; None where PyTorch is to do the work.

    Packing copies the weights; the copy is kept until the weights change or the model goes. A
    model of more than a quarter of the machine's memory stays with PyTorch, which is said once.
    `use_backend("native")` takes it too, and makes it an error where there can be no engine.
    """
    asked = ops.forced()
    if asked not in ("auto", "native"):
        return None
    if asked == "auto" and (unfit(model) or extension() is None or _too_large(model)):
        return None
    engine = _engines.get(model)
    if engine is None or engine.stamp != stamp(model):
        _engines.pop(model, None)  # before the new copy is made
        engine = _engines[model] = Engine(model)
    return engine


def _too_large(model: Transformer) -> bool:
    """Whether a second copy of the weights, beside the first, might fill the memory."""
    size = 4 * sum(weight.numel() for weight in model.parameters())
    if size <= _memory() / 4:
        return False
    _say_too_large(size)
    return True


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _say_too_large(size: int) -> None:
    log.warning(
        "The model's weights take %.1f of this machine's %.1f GB: sampling goes without the native "
        "engine, which would hold them twice. use_backend('native') insists.",
        size / 1e9,
        _memory() / 1e9,
    )


def _description(
    model: Transformer, alive: tuple[Tensor, ...]
) -> tuple[dict[str, Any], dict[str, int], list[dict[str, int]]]:
    """Shape, weights and layers as the extension wants them: numbers and addresses."""
    config, decoder = model.config, model.model
    shape = {
        "layers": config.n_layers, "dim": config.dim, "heads": config.n_heads,
        "kv_heads": config.n_kv_heads, "head_dim": config.head_dim, "ffn": config.ffn_dim,
        "vocab": config.vocab_size, "eps": config.norm_eps,
    }  # fmt: skip
    embedding, cos, sin = alive
    tensors = {
        "embedding": embedding, "head": model.head_weight, "norm": decoder.norm.weight,
        "cos": cos, "sin": sin,
    }  # fmt: skip
    layers = []
    for block in decoder.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            {
                "q": attention.q_proj.weight,
                "k": attention.k_proj.weight,
                "v": attention.v_proj.weight,
                "o": attention.o_proj.weight,
                "gate": mlp.gate_proj.weight,
                "up": mlp.up_proj.weight,
                "down": mlp.down_proj.weight,
                "attention_norm": block.input_layernorm.weight,
                "ffn_norm": block.post_attention_layernorm.weight,
            }
        )
    return shape, _addresses(tensors), [_addresses(layer) for layer in layers]


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.data_ptr() % 4:
            raise ValueError(f"{name} must be contiguous float32, aligned to 4 bytes")
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _check_vector(name: str, tensor: Tensor, count: int) -> None:
    if (
        tensor.dtype != torch.int64
        or tensor.device.type != "cpu"
        or tensor.shape != (count,)
        or not tensor.is_contiguous()
        or tensor.data_ptr() % 8
    ):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected a "
            f"contiguous int64 ({count},) on the CPU"
        )
