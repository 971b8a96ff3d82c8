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

import torch
from torch import Tensor

from puna.core import ops
from puna.core.checkpoint.source import LAYER, Source, as_type
from puna.core.config import ModelConfig
from puna.core.model import RMSNorm, Transformer
from puna.core.native.linear import FAST
from puna.core.native.loader import WIDTHS, best_instructions, extension
from puna.core.native.session import Session
from puna.core.parameters import parameter_shapes
from puna.core.plain import altered_part

log = logging.getLogger("puna")


FORMATS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.125}  # bytes a weight; groups of 32 share a scale


def cached_bytes(weight_format: str, head_dim: int) -> float:
    """Bytes of a number in the cache of keys and values beside weights of a format."""
    rounded = weight_format != "fp32" and best_instructions(head_dim) == "avx512_bf16"
    return 2.0 if rounded else 4.0


PARTS = {  # of a parameter's name: what the extension calls it
    "model.embed_tokens": "embedding", "lm_head": "head", "score": "head", "model.norm": "norm",
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
    "self_attn.q_proj.bias": "q_bias", "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias", "self_attn.o_proj.bias": "o_bias",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


class Engine:
    """A model's weights as they are now, packed for decoding; sessions read them.

    `weight_format` is that of the packed copy: "fp32"; "bf16", where what the weights multiply is
    rounded too if the processor has products of bf16 (instruction set "avx512_bf16"); "int8", where
    groups of 32 inputs share an fp32 scale for each output, and what they multiply is rounded to
    int8 in the same groups; the embedding's rows are rounded so, too, and in bf16 they are not.
    Attention multiplies bf16 in both where the processor can, and keys and values are kept so. All
    else is fp32. Nothing changes an engine: any number of sessions, threads too, read it at once,
    and go on with the weights they began with when the model's change.
    """

    def __init__(
        self, model: Transformer, instruction_set: str | None = None, *, weight_format: str = "fp32"
    ):
        check_built()
        refuse(unfit(model), weight_format)
        self.stamp = stamp(model)
        tables = model.rope_tables(torch.device("cpu"))
        self._allocate(model.config, model.head, tables, instruction_set, weight_format)
        for name, weight in model.named_parameters(remove_duplicate=False):
            self._pack(name, 0, weight.detach())

    @classmethod
    def read(
        cls, source: Source, weight_format: str, instruction_set: str | None = None
    ) -> "Engine":
        """The engine of a checkpoint that is read piece by piece, so that its weights are in memory
        in `weight_format` alone. ValueError where it is not the engine's."""
        check_built()
        refuse(unfit_config(source.config), weight_format)
        with torch.device("meta"):
            tables = Transformer(source.config).rope_tables(torch.device("cpu"))
        engine = cls.__new__(cls)
        engine.stamp = ()
        engine._allocate(source.config, source.head, tables, instruction_set, weight_format)
        for name, first, rows in source.pieces():
            engine._pack(name, first, as_type(name, rows, torch.float32).contiguous())
        return engine

    def _allocate(
        self,
        config: ModelConfig,
        head: str,
        tables: tuple[Tensor, Tensor],
        instruction_set: str | None,
        weight_format: str,
    ) -> None:
        fitting = instruction_sets(config.head_dim)
        if instruction_set is None:
            instruction_set = fitting[0]
        elif instruction_set not in fitting:
            raise ValueError(
                f"instruction set is {instruction_set!r}; this machine and a head size of "
                f"{config.head_dim} allow {fitting}"
            )
        module = extension()
        assert module is not None
        self.config, self.outputs = config, config.vocab_size if head == "lm" else 1
        self._alive = tables  # read where they are
        shape = {
            "layers": config.n_layers, "dim": config.dim, "heads": config.n_heads,
            "kv_heads": config.n_kv_heads, "head_dim": config.head_dim, "ffn": config.ffn_dim,
            "vocab": config.vocab_size, "outputs": self.outputs, "eps": config.norm_eps,
            "qkv_bias": "q_proj" in config.biased, "o_bias": "o_proj" in config.biased,
        }  # fmt: skip
        self._native = module.make_engine(
            instruction_set, weight_format, shape, *(_address("RoPE", each) for each in tables)
        )
        self._idle: deque[Session] = deque(maxlen=1)

    def _pack(self, name: str, first: int, rows: Tensor) -> None:
        """Rows of a parameter, from `first` on."""
        stem = name.removesuffix(".weight")
        layer = 0
        if found := LAYER.match(stem):
            layer, stem = int(found[1]), stem[found.end() :]
        self._native.pack(PARTS[stem], layer, first, len(rows), _address(name, rows))

    def new_session(self) -> Session:
        """A session without room yet, for who keeps it longer than a call."""
        return Session(self._native.new_session(), self.config, self.outputs, self._alive)

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
    if ops.traced():
        return "it is being traced"
    if why := altered_part(model, model.config.biased):
        return why
    if other := _unlike_its_config(model):
        return f"{other} is not as its config says"
    for weight in model.parameters():
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return f"its weights are {weight.dtype} on {weight.device}, not float32 on the CPU"
        if type(weight) is not torch.nn.Parameter:
            return "its weights are sharded"
        if not weight.is_contiguous():
            return "its weights are not contiguous"
    return unfit_config(model.config)


def unfit_config(config: ModelConfig) -> str | None:
    """Why the engine can run no model of this shape, or None."""
    if not instruction_sets(config.head_dim):
        return f"its head size is {config.head_dim}"
    return None


def refuse(why: str | None, weight_format: str) -> None:
    """ValueError where there is a reason, with what does without the engine."""
    if why:
        way = "" if weight_format == "fp32" else f"; leave {weight_format} out: PyTorch takes fp32"
        raise ValueError(f"the native engine does not take this model: {why}{way}")


def check_built() -> None:
    """ValueError where there is no extension."""
    if extension() is None:
        raise ValueError("the native engine is not built; install Puna with a C++ compiler")


def _unlike_its_config(model: Transformer) -> str | None:
    """The first parameter or norm that a layer added, cut or replaced makes another one."""
    expected = dict(_shapes(model.config, model.head))
    for name, weight in model.named_parameters(remove_duplicate=False):
        if expected.pop(name, None) != weight.shape:
            return name
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and module.eps != model.config.norm_eps:
            return f"{name}.eps"
    return next(iter(expected), None)


@functools.cache
def _shapes(config: ModelConfig, head: str) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(config, head)


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


_read: "weakref.WeakKeyDictionary[Transformer, tuple[str, Engine]]" = weakref.WeakKeyDictionary()
"""The models of `in_format`, with their format"""
_kept: "weakref.WeakKeyDictionary[Transformer, _Kept]" = weakref.WeakKeyDictionary()
_kept_lock = threading.Lock()


def in_format(source: Source, weight_format: str) -> Transformer:
    """A model that only generates: its weights are in memory as the engine's, in `weight_format`,
    and its parameters are on the meta device. At the peak it takes little more than these.

    ValueError where the engine does not take the model or another back end is asked for.
    """
    check_format(weight_format)
    if (asked := ops.forced()) not in ("auto", "native"):
        raise ValueError(f"{weight_format} weights need the native engine, not back end {asked!r}")
    with torch.device("meta"):
        model = Transformer(source.config, source.head)
    engine = Engine.read(source, weight_format)
    with _kept_lock:
        _read[model] = weight_format, engine
    return model


def check_format(weight_format: str) -> None:
    """ValueError for a format that there is not."""
    if weight_format not in FORMATS:
        raise ValueError(
            f"weight_format is {weight_format!r}; expected one of {', '.join(FORMATS)}"
        )


def engine_for(model: Transformer, weight_format: str = "fp32") -> Engine | None:
    """The model's engine with its weights as they are now; None where PyTorch is to do the work.

    Packing copies the weights, in `weight_format`; the copy is kept until the model's
    change or the model goes. A model of more than a quarter of the machine's memory stays with
    PyTorch, which is said once. `use_backend("native")` takes it too, and makes it an error
    (ValueError) where there can be no engine; so does a format that only the engine has.
    """
    check_format(weight_format)
    if (read := _read.get(model)) is not None:
        if weight_format != read[0]:
            raise ValueError(
                f"this model's weights are in memory as {read[0]} alone; load it again for "
                f"{weight_format} ones"
            )
        return read[1]
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


def engine_for_now(model: Transformer) -> Engine | None:
    """An engine in the products in force, whose copy of the weights goes with it; None where the
    model's own operations are to do the work. They give other bits with biases, which PyTorch adds,
    and with heads of another instruction set than the products'."""
    best = best_instructions()
    if model.config.biased or best not in FAST or best_instructions(model.config.head_dim) != best:
        return None
    if ops.forced() not in ("auto", "native") or ops.transformed() or extension() is None:
        return None
    if torch.is_autocast_enabled("cpu") or unfit(model) is not None or _size(model) > _memory() / 4:
        return None
    return Engine(model, weight_format=ops.products())


def _size(model: Transformer) -> int:
    """Bytes of its weights in fp32."""
    return 4 * sum(weight.numel() for weight in model.parameters())


def _too_large(model: Transformer) -> bool:
    """Whether a second copy of the weights, beside the first, might fill the memory."""
    size = _size(model)
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


def _address(name: str, tensor: Tensor) -> int:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.data_ptr() % 4:
        raise ValueError(f"{name} must be contiguous float32, aligned to 4 bytes")
    return tensor.data_ptr()
