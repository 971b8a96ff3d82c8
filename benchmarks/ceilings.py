"""How fast a training step could be at best: its own matrix products, measured one by one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from puna.benchmarks.timing import best_seconds
from puna.core import native_linear
from puna.core.config import ModelConfig

CHUNKS = (256, 512, 1024)  # rows of the head's products at once, besides all of them


class Linears(NamedTuple):
    """Layers with the same input, which a program may run one by one or joined."""

    outputs: tuple[int, ...]  # the width of each
    inputs: int
    times: int  # a step


class Products(NamedTuple):
    """Seconds of a linear layer's three matrix products."""

    forward: float
    d_input: float
    d_weight: float


def products_seconds(config: ModelConfig, batch: int, tokens: int, device: torch.device) -> float:
    """Seconds of all matrix products of a training step of batch * tokens tokens in fp32.

    Each distinct product runs alone at its own size and counts with its best time: forward, d
    input and d weight of every linear layer, with q, k, v (and gate, up) one by one or joined,
    and the head's whole or in chunks, whichever is faster. Causal attention's six (scores and
    values, each once forward and twice backward, halved by the mask) count with their FLOPs at
    the best rate that any of the others reached. Nothing else of the step is in it.
    """
    measured = functools.cache(functools.partial(products, device=device))
    rows, seconds, rate = batch * tokens, 0.0, 0.0
    for outputs, inputs, times in block_linears(config):
        joined = sum(measured(rows, sum(outputs), inputs))
        apart = sum(sum(measured(rows, width, inputs)) for width in outputs)
        seconds += times * min(joined, apart)
        rate = max(rate, 6 * rows * sum(outputs) * inputs / min(joined, apart))
    head = head_seconds(config, rows, device)
    rate = max(rate, 6 * rows * config.vocab_size * config.dim / head)
    attention = 6 * config.n_layers * rows * tokens * config.dim
    return seconds + head + attention / rate


def block_linears(config: ModelConfig) -> list[Linears]:
    """The linear layers of the blocks, by input."""
    dim, ffn_dim, layers = config.dim, config.ffn_dim, config.n_layers
    kv_dim = config.n_kv_heads * config.head_dim
    return [
        Linears((dim, kv_dim, kv_dim), dim, layers),
        Linears((dim,), dim, layers),
        Linears((ffn_dim, ffn_dim), dim, layers),
        Linears((dim,), ffn_dim, layers),
    ]


def head_seconds(config: ModelConfig, rows: int, device: torch.device) -> float:
    """Seconds of the head's three products, each in the faster of whole and chunks."""
    found = []
    for chunk in {min(chunk, rows) for chunk in (*CHUNKS, rows)}:
        seconds = products(chunk, config.vocab_size, config.dim, device=device)
        found.append([rows / chunk * each for each in seconds])
    return sum(map(min, zip(*found, strict=True)))


def products(rows: int, outputs: int, inputs: int, *, device: torch.device) -> Products:
    """Best seconds of the products of a layer (outputs, inputs) on (rows, inputs), by PyTorch's
    library or by ours, whichever is faster."""
    x = torch.randn(rows, inputs, device=device)
    weight = torch.randn(outputs, inputs, device=device)
    d_y = torch.randn(rows, outputs, device=device)
    y, d_x, d_weight = (torch.empty_like(each) for each in (d_y, x, weight))
    wanted = ((x, weight.T, y), (d_y, weight, d_x), (d_y.T, x, d_weight))
    multiply: list[Callable[..., Tensor]] = [lambda a, b, out: torch.mm(a, b, out=out)]
    if native_linear.fits(x, weight):
        multiply.append(native_linear.matmul)
    return Products(
        *(min(seconds(functools.partial(by, *each), device) for by in multiply) for each in wanted)
    )


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of a fifth of a second, or of 5 where one takes tenths."""
    once = best_seconds(call, device, rounds=2)
    return min(once, best_seconds(call, device, max(3, min(20, int(0.2 / once)))))
