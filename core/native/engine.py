"""Checked calls into `puna.core._C`, the native engine for CPUs.

The extension has no knowledge of torch: it gets addresses. The model is checked here, and the
tensors that it goes on reading are kept alive here; what generates is a `Session`. Without the
extension, or for a model that it does not take, `engine_for` returns None and PyTorch does the
work.
"""

import functools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from puna.core import ops
from puna.core.checkpoint.source import parameter_shapes
from puna.core.config import ModelConfig
from puna.core.model import Block, RMSNorm, Transformer
from puna.core.native.loader import WIDTHS, best_instructions, extension
from puna.core.native.session import Session
from puna.core.plain import altered

log = logging.getLogger("puna")


FORMATS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.125}  # bytes a weight; groups of 32 share a scale


class Engine:
    """A model's weights as they are now, packed for decoding; sessions read them.

    `weight_format` is that of the packed copy: "fp32"; "bf16", where what the weights multiply is
    rounded too if the processor has products of bf16 (instruction set "avx512_bf16"); "int8", where
    groups of 32 inputs share an fp32 scale for each output, and what they multiply is rounded to
    int8 in the same groups. All else is fp32. Nothing changes an engine: any number of sessions,
    threads too, read it at once, and go on with the weights they began with when the model's
    change.
    """

    def __init__(
        self, model: Transformer, instruction_set: str | None = None, *, weight_format: str = "fp32"
    ):
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
        # Read where they are. The embedding is a copy, or a session would see it change.
        self._alive = (
            model.model.embed_tokens.weight.detach().clone(),
            *model.rope_tables(torch.device("cpu")),
        )
        self._native = module.make_engine(
            instruction_set, weight_format, *_description(model, self._alive)
        )
        self._idle: deque[Session] = deque(maxlen=1)

    def new_session(self) -> Session:
        """A session without room yet, for who keeps it longer than a call."""
        return Session(self._native.new_session(), self.config, self._alive)

    @contextmanager
    def session(self, rows: int, max_tokens: int) -> Iterator[Session]:
        """A session with room for `rows` rows of `max_tokens` tokens, for one call alone.

        The last one to be given back is kept for the next call: its memory is there (the page
        faults of a new one took 4% of 64 rows of 40 tokens), and it knows how many threads are
        faster.
        """
        try:
            session = self._idle.pop()
        except IndexError:
            session = self.new_session()
        try:
            session.reserve(rows, max_tokens)
            yield session
        finally:
            self._idle.append(session)


HEAD_VECTORS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)  # head sizes the engine has code for, in vectors


def unfit(model: Transformer) -> str | None:
    """Why the engine cannot run this model, or None."""
    config = model.config
    if model.head != "lm":
        return "it has no language-model head"
    if ops.traced():
        return "it is being traced"
    for name, module in model.named_modules():
        if why := altered(module):
            return f"of {name or 'the model'}, {why}"
    if "logits" in model.__dict__:
        return "its logits were replaced"
    if other := _unlike_its_config(model):
        return f"{other} is not as its config says"
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


def _unlike_its_config(model: Transformer) -> str | None:
    """The first parameter or norm that a layer added, cut or replaced makes another one."""
    expected = dict(_shapes(model.config))
    for name, weight in model.named_parameters(remove_duplicate=False):
        if expected.pop(name, None) != weight.shape:
            return name
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and module.eps != model.config.norm_eps:
            return f"{name}.eps"
    return next(iter(expected), None)


@functools.cache
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(config, "lm")


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

    Read from the weights themselves (97 MB in 3 ms): fused optimizers and `.data` write to them
    without a trace in torch's version counters.
    """
    module = extension()
    assert module is not None
    best, threads = best_instructions(), torch.get_num_threads()
    return tuple(
        (p.data_ptr(), module.fingerprint(best, p.data_ptr(), p.numel(), threads))
        for p in model.parameters()
    )


class _Kept:
    """A model's engines by format; who looks, or packs anew, holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engines: dict[str, Engine] = {}


_kept: "weakref.WeakKeyDictionary[Transformer, _Kept]" = weakref.WeakKeyDictionary()
_kept_lock = threading.Lock()


def engine_for(model: Transformer, weight_format: str = "fp32") -> Engine | None:
    """The model's engine with its weights as they are now; None where PyTorch is to do the work.

    Packing copies the weights, in `weight_format`; the copy is kept until the model's
    change or the model goes. A model of more than a quarter of the machine's memory stays with
    PyTorch, which is said once. `use_backend("native")` takes it too, and makes it an error
    (ValueError) where there can be no engine; so does a format that only the engine has.
    """
    if weight_format not in FORMATS:
        raise ValueError(
            f"weight_format is {weight_format!r}; expected one of {', '.join(FORMATS)}"
        )
    asked = ops.forced()
    if asked not in ("auto", "native"):
        if weight_format != "fp32":
            raise ValueError(
                f"{weight_format} weights need the native engine, not back end {asked!r}"
            )
        return None
    unable = extension() is None or unfit(model) is not None
    if asked == "auto" and weight_format == "fp32" and (unable or _too_large(model)):
        return None
    with _kept_lock:
        kept = _kept.setdefault(model, _Kept())
    with kept.lock:
        engine = kept.engines.get(weight_format)
        if engine is None or unable or engine.stamp != stamp(model):
            engine = None
            kept.engines.pop(weight_format, None)  # before the new copy is made
            engine = kept.engines[weight_format] = Engine(model, weight_format=weight_format)
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
