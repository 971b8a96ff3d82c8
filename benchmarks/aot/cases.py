"""What benchmarks/aot/run.py compiles: every launcher of kernels/ at the shapes of Llama 2 7B.

N = 8192 tokens, C = 4096, F = 11008, H = 32 heads (K = 8 key/value heads for grouped queries),
D = 128, V = 32000, bf16; four rows of 2048 tokens for attention, caches of 4096 slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

C, F, H, D, V = 4096, 11008, 32, 128, 32000
ROWS, LENGTH = 8192, 2048

# What a kernel must be: "memory": limited by memory, so it loads 128 bits a thread and spills
# nothing; "products": it multiplies matrices, on tensor cores, in bf16; "other": neither.
BOUND = {
    "rms_norm_forward_kernel": "memory",
    "rms_norm_backward_kernel": "memory",
    "rope_kernel": "memory",
    "swiglu_forward_kernel": "memory",
    "swiglu_backward_kernel": "memory",
    "attention_forward_kernel": "products",
    "attention_backward_q_kernel": "products",
    "attention_backward_kv_kernel": "products",
    "decode_attention_kernel": "products",
    "decode_attention_combine_kernel": "other",  # a few numbers of each head
    "cross_entropy_kernel": "memory",
    "scale_kernel": "memory",
    "linear_softmax_forward_kernel": "products",
    "linear_softmax_backward_kernel": "products",
    "linear_softmax_join_kernel": "other",  # a few numbers of each row
    "sample_draw_kernel": "other",  # forty passes over a row that it holds in registers
    "gae_scan_kernel": "memory",
}
# Bytes a thread that a kernel not limited by memory may spill: with triton from 3.9 on, with an
# older one, and why.
_TWICE = "with smaller tiles the queries would be read twice as often"
_HALF = "a narrower tile would halve the use of what is loaded"
_OLD = "older tritons spill a few words outside the loop"
SPILLS: dict[tuple[str, str], tuple[int, int, str]] = {
    ("attention_backward_kv_kernel", "sm_80"): (8, 32, _TWICE),
    ("attention_backward_kv_kernel", "sm_90"): (32, 40, _TWICE),
    ("linear_softmax_backward_kernel", "sm_90"): (32, 144, _HALF),
    ("linear_softmax_backward_kernel", "sm_100"): (0, 24, _OLD),
    ("sample_draw_kernel", "sm_80"): (0, 8, _OLD),
    ("sample_draw_kernel", "sm_90"): (0, 32, _OLD),
    ("sample_draw_kernel", "sm_100"): (0, 32, _OLD),
}


class Maker:
    """Tensors of a case: without memory on "meta", random on the CPU."""

    def __init__(self, device: str, length: int = LENGTH):
        self.device = device
        self.length = length  # tokens of a sequence of attention

    def bf16(self, *shape: int) -> Tensor:
        return self.fp32(*shape).to(torch.bfloat16)

    def fp32(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, device=self.device)

    def lengths(self, length: int, count: int) -> Tensor:
        return torch.full((count,), length, device=self.device)

    def cuts(self, tokens: int, each: int) -> Tensor:
        """Of so many sequences of about `each` tokens as there are whole ones."""
        count = tokens // each
        found = torch.arange(count + 1, device=self.device) * tokens // count
        return found.to(torch.int32)


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[..., Any]
    arguments: Callable[[Maker, int], list[Any]]
    counted: int = 0  # rows over which `aot_traffic` counts what is moved; 0: it does not

    def run(self, device: str = "meta", rows: int = ROWS) -> tuple[list[Any], Any]:
        """(arguments, results) of the launcher."""
        arguments = self.arguments(Maker(device), rows)
        return arguments, self.launcher(*arguments)

    @property
    def launcher(self) -> Callable[..., Any]:
        """Past its registration."""
        return getattr(self.launch, "__wrapped__", self.launch)


def _module(name: str) -> Any:
    # `from puna.kernels import rope` is the function, not the file.
    return import_module(f"puna.kernels.{name}")


def cases() -> list[Case]:
    return [*_norms(), *_ropes(), *_swiglus(), *_attention(), *_linear(), *_samples(), _gae()]


def _norms() -> list[Case]:
    norm = _module("rms_norm")

    def forward(m: Maker, n: int, added: bool) -> list[Any]:
        return [m.bf16(n, C), m.bf16(n, C) if added else None, m.bf16(C), 1e-5, True]

    def backward(m: Maker, n: int, added: bool) -> list[Any]:
        d_sum = m.bf16(n, C) if added else None
        return [m.bf16(n, C), m.bf16(C), m.fp32(n), m.bf16(n, C), d_sum]

    return [
        Case(name + way, launch, partial(make, added=name != "rms_norm"), counted)
        for name in ("rms_norm", "add_rms_norm")
        for way, launch, make, counted in (
            ("", norm.rms_norm_forward, forward, 64),
            (" backward", norm.rms_norm_backward, backward, 1024),
        )
    ]


def _ropes() -> list[Case]:
    def inputs(m: Maker, n: int, kv_heads: int, interleaved: bool, back: bool) -> list[Any]:
        batch = max(1, n // m.length)
        tokens, known = n // batch, min(n, 4096)
        q, k = m.bf16(batch, tokens, H, D), m.bf16(batch, tokens, kv_heads, D)
        tables = m.fp32(known, D // 2), m.fp32(known, D // 2)
        return [q, k, *tables, m.integers(known, batch, tokens), interleaved, back]

    return [
        Case(
            "rope" + name + (" backward" if back else ""),
            _module("rope").rope_turn,
            partial(inputs, kv_heads=kv, interleaved="inter" in name, back=back),
            16,
        )
        for name, kv in (("", H), (" interleaved", H), (" grouped", 8))
        for back in (False, True)
    ]


def _swiglus() -> list[Case]:
    swiglu = _module("swiglu")

    def inputs(m: Maker, n: int, count: int) -> list[Any]:
        return [m.bf16(n, F) for _ in range(count)]

    return [
        Case("swiglu", swiglu.swiglu_forward, partial(inputs, count=2), 64),
        Case("swiglu backward", swiglu.swiglu_backward, partial(inputs, count=3), 64),
    ]


def _attention() -> list[Case]:
    forward = _module("attention.forward").attention_forward
    backward = _module("attention.backward").attention_backward
    decode = _module("decode_attention").decode_attention_forward

    def inputs(m: Maker, n: int, kv: int, packed: bool) -> list[Any]:
        shape = n // m.length, m.length
        cuts = m.cuts(n, 512) if packed else None
        return [m.bf16(*shape, H, D), m.bf16(*shape, kv, D), m.bf16(*shape, kv, D), cuts, D**-0.5]

    def upstream(m: Maker, n: int, kv: int, packed: bool) -> list[Any]:
        q, k, v, cuts, scale = inputs(m, n, kv, packed)
        return [m.bf16(*q.shape), q, k, v, m.bf16(*q.shape), m.fp32(H, n), cuts, scale]

    def cached(m: Maker, n: int, kv: int) -> list[Any]:
        batch, slots = n // 512, 2 * m.length
        caches = m.bf16(batch, slots, kv, D), m.bf16(batch, slots, kv, D)
        return [m.bf16(batch, 1, H, D), *caches, m.lengths(slots, batch), D**-0.5]

    found = [
        Case("attention" + kind + way, launch, partial(make, kv=kv, packed="packed" in kind))
        for kind, kv in (("", H), (" grouped", 8), (" packed", H))
        for way, launch, make in (("", forward, inputs), (" backward", backward, upstream))
    ]
    return found + [
        Case("decode_attention" + kind, decode, partial(cached, kv=kv))
        for kind, kv in (("", H), (" grouped", 8))
    ]


def _linear() -> list[Case]:
    sums, softmax = _module("linear_loss.cross_entropy_sum"), _module("linear_loss.softmax")

    def inputs(m: Maker, n: int) -> list[Any]:
        return [m.bf16(n, C), m.bf16(V, C), m.integers(V, n)]

    def summed(m: Maker, n: int) -> list[Any]:
        return [*inputs(m, n), m.fp32(n), None, 0.0, True, True]

    def forward(m: Maker, n: int, entropy: bool) -> list[Any]:
        return [*inputs(m, n), None, 1.0, entropy]

    def backward(m: Maker, n: int, entropy: bool) -> list[Any]:
        factors = m.fp32(n), m.fp32(n) if entropy else None, m.fp32(n)
        return [*inputs(m, n), None, m.fp32(2, n), *factors, 1.0, True, True]

    scaled = Case(
        "linear_cross_entropy backward", sums._scale, lambda m, n: [m.bf16(n, C), m.fp32()]
    )
    return [
        Case("linear_cross_entropy", sums.linear_cross_entropy_summed, summed),
        scaled,
        *(
            Case("linear_logprobs" + name + way, launch, partial(make, entropy=bool(name)))
            for name in ("", " entropy")
            for way, launch, make in (
                ("", softmax.linear_softmax_forward, forward),
                (" backward", softmax.linear_softmax_backward, backward),
            )
        ),
    ]


def _samples() -> list[Case]:
    draw = _module("sample").sample_draw

    def inputs(m: Maker, n: int, width: int, options: tuple) -> list[Any]:
        rows = min(n, 64)
        return [m.bf16(rows, width), m.integers(99, rows), *options]

    return [
        Case(f"sample {name}", draw, partial(inputs, width=width, options=options), counted)
        for name, width, options, counted in (
            ("greedy", V, (0.0, 0, 1.0), 2),
            ("all", V, (0.8, 0, 1.0), 2),
            ("top-k, top-p", V, (0.8, 50, 0.9), 2),
            ("top-k, top-p of 128256", 128256, (0.8, 50, 0.9), 0),
        )
    ]


def _gae() -> Case:
    def inputs(m: Maker, n: int) -> list[Any]:
        shape = n // 16, 1024
        return [m.fp32(*shape), m.fp32(*shape), m.lengths(1024, n // 16), 1.0, 0.95]

    return Case("gae", _module("gae").gae_scan, inputs, 16)


def kernels() -> set[str]:
    """The names of all kernels of kernels/."""
    folder = Path(import_module("puna.kernels").__path__[0])
    files = [path for path in folder.rglob("*.py") if path.stem != "__init__"]
    names = [".".join(path.relative_to(folder).with_suffix("").parts) for path in files]
    found = {name: value for file in names for name, value in vars(_module(file)).items()}
    return {
        n for n, value in found.items() if n.endswith("_kernel") and hasattr(value, "arg_names")
    }
