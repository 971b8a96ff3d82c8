"""The operations of kernels/, each with its inputs, its peers and the least work it can be.

A memory-bound operation must read its inputs and write its results once, forward and backward;
one bound by matrix products must make those. Rates and shares are of that work, whatever a
provider does besides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from puna import kernels
from puna.benchmarks.kernels import peers as peers
from puna.benchmarks.kernels.opponents import peers_of
from puna.benchmarks.kernels.peers import EPS, Function
from puna.core import ops
from puna.core.native.loader import extension
from puna.kernels.sample import uniform

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    operation: str  # a name of puna.kernels
    shape: str
    rows: int
    dtype: torch.dtype
    make: Callable[[], list[Tensor]]  # the inputs, on the CPU or the device
    ours: Function
    eager: Function
    forward: float  # bytes moved; FLOPs where `products`
    both: float = 0.0  # forward and backward; 0: there is no gradient
    products: bool = False
    differentiable: tuple[int, ...] = ()  # which inputs get a gradient
    peers: dict[str, Function] = field(default_factory=dict)
    native: Function | None = None  # core's, in the compiled extension
    exact: Function | None = None  # `eager` in less memory, for fp64
    by_row: Function | None = None  # the rows whose mean `eager` returns
    compiled: bool = True  # torch.compile gets `eager` too
    # (what a provider found, what would be right) from outputs, exact outputs, fp64 inputs
    compare: Callable[[list[Tensor], list[Tensor], list[Tensor]], Pairs] | None = None


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    dtype: torch.dtype
    rows: int
    widths: tuple[int, ...]  # of norm, rope and swiglu
    sequences: int  # that rope's and attention's rows are cut into
    tokens: int  # of an attention sequence
    heads: tuple[tuple[int, int], ...]  # query and key/value heads of attention
    head_dim: int
    decoded: int  # sequences decoded at once, over caches of `tokens`
    dim: int
    vocabularies: tuple[int, ...]
    drawn: int  # rows that `sample` draws from at once
    rollouts: tuple[int, int]  # sequences and tokens of `gae`
    further_dims: tuple[int, ...] = ()  # of the head, with the first vocabulary
    long: int = 0  # tokens of one longer sequence of attention, for the first two heads


# Llama 2 7B's, whose come first, 13B's and 70B's (of heads 70B's, which share keys, before 13B's);
# the second vocabulary is Llama 3's.
GPU = Sizes(
    dtype=torch.bfloat16, rows=8192, widths=(4096, 11008, 5120, 13824, 8192, 28672), sequences=2,
    tokens=4096, heads=((32, 32), (64, 8), (40, 40)), head_dim=128, decoded=16, dim=4096,
    further_dims=(5120, 8192), vocabularies=(32000, 128256), drawn=256, rollouts=(512, 1024),
    long=16384,
)  # fmt: skip
CPU = Sizes(
    dtype=torch.float32, rows=1024, widths=(288, 768), sequences=4, tokens=256,
    heads=((6, 6), (6, 2)), head_dim=48, decoded=16, dim=288, vocabularies=(8192,),
    drawn=32, rollouts=(64, 128),
)  # fmt: skip
# A GPU's, small: whether all of it runs.
DRY = Sizes(
    dtype=torch.bfloat16, rows=32, widths=(64, 96), sequences=2, tokens=16, heads=((4, 4), (4, 1)),
    head_dim=16, decoded=3, dim=32, vocabularies=(64, 96), drawn=4, rollouts=(3, 8),
    further_dims=(48,), long=24,
)  # fmt: skip


def cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """Every operation of puna.kernels that does work, at `sizes`; of each the shapes that a GPU is
    judged by (benchmarks/gpu/bars.py) before others, since time may end."""
    found = []
    for width in sizes.widths:
        found += [*norms(sizes, device, width), rope(sizes, device, width)]
        found.append(swiglu(sizes, device, width))
    first, further = sizes.heads[:2], sizes.heads[2:]
    found += attentions(sizes, device, first)
    if sizes.long:
        longer = replace(sizes, sequences=1, tokens=sizes.long)
        for heads in first:
            # By heads, and not compiled: the scores of all at once are 17 GB, and 34 in fp32.
            whole = attention(longer, device, *heads)
            found.append(replace(whole, eager=peers.attention_by_heads, compiled=False))
    found += attentions(sizes, device, further)
    for vocabulary in sizes.vocabularies:
        for operation in ("linear_cross_entropy", "linear_logprobs"):
            found.append(linear(operation, sizes, device, vocabulary))
    for dim in sizes.further_dims:
        wider = replace(sizes, dim=dim)
        for operation in ("linear_cross_entropy", "linear_logprobs"):
            found.append(linear(operation, wider, device, sizes.vocabularies[0]))
    for top_p in (1.0, 0.9):
        found.append(sample(sizes, device, top_p))
    return [*found, gae(sizes, device)]


def attentions(
    sizes: Sizes, device: torch.device, heads: tuple[tuple[int, int], ...]
) -> list[Case]:
    return [make(sizes, device, *each) for each in heads for make in (attention, decode_attention)]


def _drawn(*shapes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes]


def _native(function: Function, device: torch.device) -> Function | None:
    return function if device.type == "cpu" and extension() is not None else None


def norms(sizes: Sizes, device: torch.device, width: int) -> list[Case]:
    rows, dtype = sizes.rows, sizes.dtype
    block = rows * width * dtype.itemsize

    def make(blocks: int) -> list[Tensor]:
        return _drawn(*[(rows, width)] * blocks, (width,), device=device, dtype=dtype)

    return [
        Case(
            "rms_norm", f"{rows}x{width}", rows, dtype, lambda: make(1),
            ours=lambda x, w: (kernels.rms_norm(x, w, eps=EPS),), eager=peers.rms_norm,
            forward=2 * block, both=5 * block, differentiable=(0, 1),
            peers=peers_of("rms_norm", device),
            native=_native(lambda x, w: (ops.rms_norm(x, w, eps=EPS),), device),
        ),
        Case(
            "add_rms_norm", f"{rows}x{width}", rows, dtype, lambda: make(2),
            ours=lambda x, r, w: kernels.add_rms_norm(x, r, w, eps=EPS), eager=peers.add_rms_norm,
            forward=4 * block, both=8 * block, differentiable=(0, 1, 2),
            peers=peers_of("add_rms_norm", device),
        ),
    ]  # fmt: skip


def rope(sizes: Sizes, device: torch.device, width: int) -> Case:
    """As many heads as make up `width`, of q and of k."""
    tokens, heads = sizes.rows // sizes.sequences, width // sizes.head_dim
    shape = (sizes.sequences, tokens, heads, sizes.head_dim)
    block = 2 * sizes.rows * width * sizes.dtype.itemsize

    def make() -> list[Tensor]:
        tables = kernels.rope_tables(tokens, sizes.head_dim, device=device)
        return [*_drawn(shape, shape, device=device, dtype=sizes.dtype), *tables]

    return Case(
        "rope", f"{sizes.rows}x{width}", sizes.rows, sizes.dtype, make,
        ours=kernels.rope, eager=peers.rope, forward=2 * block, both=4 * block,
        differentiable=(0, 1), peers=peers_of("rope", device), native=_native(ops.rope, device),
    )  # fmt: skip


def swiglu(sizes: Sizes, device: torch.device, width: int) -> Case:
    shape = (sizes.rows, width)
    block = sizes.rows * width * sizes.dtype.itemsize
    return Case(
        "swiglu", f"{sizes.rows}x{width}", sizes.rows, sizes.dtype,
        lambda: _drawn(shape, shape, device=device, dtype=sizes.dtype),
        ours=lambda gate, up: (kernels.swiglu(gate, up),), eager=peers.swiglu,
        forward=3 * block, both=8 * block, differentiable=(0, 1), peers=peers_of("swiglu", device),
        native=_native(lambda gate, up: (ops.swiglu(gate, up),), device),
    )  # fmt: skip


def attention(sizes: Sizes, device: torch.device, heads: int, kv_heads: int) -> Case:
    batch, tokens, size = sizes.sequences, sizes.tokens, sizes.head_dim
    q, kv = (batch, tokens, heads, size), (batch, tokens, kv_heads, size)
    # Two products over the pairs that the mask leaves; the backward makes five.
    product = 2 * batch * heads * size * tokens * (tokens + 1) / 2
    return Case(
        "attention", f"{batch}x{tokens} {heads}/{kv_heads}x{size}", batch * tokens, sizes.dtype,
        lambda: _drawn(q, kv, kv, device=device, dtype=sizes.dtype),
        ours=lambda q, k, v: (kernels.attention(q, k, v),), eager=peers.attention,
        exact=peers.attention_by_heads, peers={"sdpa": peers.sdpa, **peers_of("attention", device)},
        forward=2 * product, both=7 * product, products=True, differentiable=(0, 1, 2),
    )  # fmt: skip


def decode_attention(sizes: Sizes, device: torch.device, heads: int, kv_heads: int) -> Case:
    """One query a row, over caches filled from a half to the whole."""
    batch, tokens, size = sizes.decoded, sizes.tokens, sizes.head_dim
    q, cache = (batch, 1, heads, size), (batch, tokens, kv_heads, size)
    lengths = torch.linspace(tokens // 2, tokens, batch).long()
    read = 2 * int(lengths.sum()) * kv_heads * size + 2 * batch * heads * size

    def make() -> list[Tensor]:
        drawn = _drawn(q, cache, cache, device=device, dtype=sizes.dtype)
        return [*drawn, lengths.to(device)]

    return Case(
        "decode_attention", f"{batch}x{tokens} {heads}/{kv_heads}x{size}", batch, sizes.dtype,
        make, ours=lambda q, k, v, n: (kernels.decode_attention(q, k, v, n),),
        eager=peers.decode_attention,
        peers={"sdpa": peers.decode_sdpa, **peers_of("decode_attention", device)},
        forward=read * sizes.dtype.itemsize,
    )  # fmt: skip


def linear(operation: str, sizes: Sizes, device: torch.device, vocabulary: int) -> Case:
    """The two losses of a linear head. Log-probs' upstream gradients are known only in the
    backward, which needs the logits again: four products for the loss's three."""
    rows, dim = sizes.rows, sizes.dim
    product = 2.0 * rows * dim * vocabulary
    loss = operation == "linear_cross_entropy"

    def make() -> list[Tensor]:
        hidden, weight = _drawn((rows, dim), (vocabulary, dim), device=device, dtype=sizes.dtype)
        generator = torch.Generator(device).manual_seed(1)
        targets = torch.randint(vocabulary, (rows,), device=device, generator=generator)
        return [hidden, weight * dim**-0.5, targets]

    def cross_entropy(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (kernels.linear_cross_entropy(*inputs),)

    def native_loss(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(*inputs),)

    eager = peers.linear_cross_entropy if loss else peers.linear_logprobs
    return Case(
        operation, f"{rows}x{dim}x{vocabulary}", rows, sizes.dtype, make,
        ours=cross_entropy if loss else kernels.linear_logprobs, eager=eager,
        exact=peers.by_rows(eager), by_row=peers.losses if loss else None,
        peers=peers_of(operation, device),
        native=_native(native_loss if loss else ops.linear_logprobs, device),
        forward=product, both=(3 if loss else 4) * product, products=True, differentiable=(0, 1),
    )  # fmt: skip


def sample(sizes: Sizes, device: torch.device, top_p: float) -> Case:
    """fp32, as the model's logits are. The random numbers of the plain version are given to it."""
    shape = (sizes.drawn, sizes.vocabularies[0])

    def make() -> list[Tensor]:
        seeds = torch.arange(sizes.drawn, device=device)
        (logits,) = _drawn(shape, device=device, dtype=torch.float32)
        return [3 * logits, seeds, uniform(seeds)]

    def ours(logits: Tensor, seeds: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return kernels.sample(logits, top_p=top_p, seeds=seeds)

    def eager(logits: Tensor, _: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
        if top_p == 1.0:
            return peers.sample(logits, draws)
        return peers.sample_top_p(logits, draws, top_p)

    def compare(found: list[Tensor], _: list[Tensor], inputs: list[Tensor]) -> Pairs:
        return draws_and_logprobs(found, inputs[0], inputs[2], top_p)

    return Case(
        "sample", f"{shape[0]}x{shape[1]} top-p {top_p:g}", shape[0], torch.float32, make,
        ours=ours, eager=eager, forward=4.0 * shape[0] * shape[1], compare=compare,
    )  # fmt: skip


def draws_and_logprobs(found: list[Tensor], logits: Tensor, draws: Tensor, top_p: float) -> Pairs:
    """A token is right if the random number lies between the masses before and after it, and is
    as far off as the number must move to lie there. Log-probs are those of the token drawn."""
    tokens, logprobs = found
    logp = torch.log_softmax(logits, -1)
    if top_p == 1.0:
        order = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    else:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = logp.exp().gather(1, order)
    after = ordered.cumsum(-1)
    kept = ordered.masked_fill(after - ordered > top_p, 0).cumsum(-1)
    kept = kept / kept[:, -1:]
    place = (order == tokens[:, None]).int().argmax(-1, keepdim=True)
    high = kept.gather(1, place)[:, 0]
    low = kept.gather(1, (place - 1).clamp_min(0))[:, 0].where(place[:, 0] > 0, 0.0)
    nearest = draws.double().clamp(low, high)
    return [(nearest, draws.double()), (logprobs, logp.gather(1, tokens[:, None])[:, 0])]


def gae(sizes: Sizes, device: torch.device) -> Case:
    """Of ragged lengths, fp32. A loop over a thousand columns is nothing for torch.compile."""
    rows, steps = shape = sizes.rollouts

    def make() -> list[Tensor]:
        lengths = torch.linspace(1, steps, rows).long().to(device)
        return [*_drawn(shape, shape, device=device, dtype=torch.float32), lengths]

    return Case(
        "gae", f"{rows}x{steps}", rows, torch.float32, make,
        ours=kernels.gae, eager=peers.gae, forward=16.0 * rows * steps, compiled=False,
    )  # fmt: skip
