"""How fast a training step could be at best: its own matrix products and nothing else."""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from puna.benchmarks.timing import best_seconds
from puna.core.config import ModelConfig
from puna.core.native import linear

CHUNKS = (256, 512, 1024)  # rows of the head's products at once, besides all of them


class Linears(NamedTuple):
    """Layers with the same input, which a program may run one by one or joined."""

    outputs: tuple[int, ...]  # the width of each
    inputs: int
    times: int  # a step


class Product(NamedTuple):
    """One matrix product in the fastest way found."""

    seconds: float
    call: Callable[[], object]


class Products(NamedTuple):
    """A linear layer's three."""

    forward: Product
    d_input: Product
    d_weight: Product


class Ceiling(NamedTuple):
    """A step's matrix products, to be timed beside the step: neighbours who take a fifth of a
    machine take it from both."""

    products: list[tuple[int, Product]]  # how often, and what
    attention: float  # the time of attention's products over that of the others

    def run(self) -> None:
        for times, product in self.products:
            for _ in range(times):
                product.call()


def ceiling(config: ModelConfig, batch: int, tokens: int, device: torch.device) -> Ceiling:
    """All matrix products of a training step of batch * tokens tokens in fp32.

    Each distinct product is tried alone at its own size: forward, d input and d weight of every
    linear layer, with q, k, v (and gate, up) one by one or joined, and the head's whole or in
    chunks, whichever is faster. Causal attention's six (scores and values, each once forward and
    twice backward, halved by the mask) count with their FLOPs at the best rate that any of the
    others reached. Nothing else of the step is in it.
    """
    measured = functools.cache(functools.partial(products, device=device))
    rows = batch * tokens
    chosen = head_products(config, rows, device)
    rate = 6 * rows * config.vocab_size * config.dim / seconds_of(chosen)
    for outputs, inputs, times in block_linears(config):
        joined = [(times, each) for each in measured(rows, sum(outputs), inputs)]
        apart = [(times, each) for width in outputs for each in measured(rows, width, inputs)]
        faster = min(joined, apart, key=seconds_of)
        rate = max(rate, 6 * rows * sum(outputs) * inputs * times / seconds_of(faster))
        chosen += faster
    attention = 6 * config.n_layers * rows * tokens * config.dim / rate
    return Ceiling(chosen, attention / seconds_of(chosen))


def seconds_of(products: list[tuple[int, Product]]) -> float:
    return sum(times * product.seconds for times, product in products)


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


def head_products(
    config: ModelConfig, rows: int, device: torch.device
) -> list[tuple[int, Product]]:
    """The head's three products, each in the faster of whole and chunks."""
    found = []
    for chunk in {min(chunk, rows) for chunk in (*CHUNKS, rows)}:
        measured = products(chunk, config.vocab_size, config.dim, device=device)
        found.append([(-(-rows // chunk), each) for each in measured])
    return [min(ways, key=lambda way: seconds_of([way])) for ways in zip(*found, strict=True)]


def products(rows: int, outputs: int, inputs: int, *, device: torch.device) -> Products:
    """The products of a layer (outputs, inputs) on (rows, inputs), by PyTorch's library or by
    ours, whichever is faster."""
    x = torch.randn(rows, inputs, device=device)
    weight = torch.randn(outputs, inputs, device=device)
    d_y = torch.randn(rows, outputs, device=device)
    y, d_x, d_weight = (torch.empty_like(each) for each in (d_y, x, weight))
    wanted = ((x, weight.T, y), (d_y, weight, d_x), (d_y.T, x, d_weight))
    multiply: list[Callable[..., Tensor]] = [lambda a, b, out: torch.mm(a, b, out=out)]
    if linear.fits(x, weight):
        multiply.append(linear.matmul)
    found = []
    for each in wanted:
        calls = [functools.partial(by, *each) for by in multiply]
        found.append(
            min((Product(seconds(call, device), call) for call in calls), key=itemgetter(0))
        )
    return Products(*found)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of a fifth of a second, or of 5 where one takes tenths."""
    once = best_seconds(call, device, rounds=2)
    return min(once, best_seconds(call, device, max(3, min(20, int(0.2 / once)))))
