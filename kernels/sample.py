"""Draw one token a row from logits: temperature, top-k, top-p, and the token's log-prob.

Each row has its own 64-bit seed; the draw is a counter-based random number of that seed
alone, so it does not depend on the batch it is in. One uniform number picks the token by
inverting the cumulative distribution of the tokens that top-k and top-p keep: in the order of
the vocabulary where nothing is cut, from the largest logit down (equals by index) otherwise.
top-p keeps the most likely tokens while the mass before a token is at most p (Meta's rule), of the
mass that top-k has left (transformers' order).

The Triton kernel reads a row once and holds it in registers (up to 32768 logits; more are read
again in every pass). It does not sort: the smallest kept logit and the drawn one are found by
bisection over the bits of a logit, each step a sum over the row. Masses are integers, so that
sums are exact in any order: a token's weight is exp(logit - largest) in units of 2^-44, and what
is lighter than that is never drawn.
"""

import torch
from torch import Tensor

from .backend import choose, jit, on_device, registered, tl, triton, visible

WIDEST_HELD = 32768  # a row of so many logits is held in registers,
LARGEST_TILE = 8192  # in tiles: one of 32768 spills, because a weight takes two registers
WIDEST = 1 << 18  # the sum of so many weights fits an int64

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_WHOLE = 1 << 60  # top_p goes to the kernel as a fraction of this: a float would go as fp32

COLDEST, HOTTEST = 1e-30, 1e30  # temperatures beyond leave fp32, and their inverses do


class NoDistribution(ValueError):
    """There is nothing to draw from after some row: its logits hold NaN or inf, or all are -inf."""

    def __init__(self, row: int):
        super().__init__(f"row {row} of logits has NaN or inf in it, or nothing above -inf")
        self.row = row


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's step on int64 (...,): add the golden gamma, then its finaliser."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's >> on int64 drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seeds: Tensor) -> Tensor:
    """One fp64 number in [0, 1) for each int64 seed: the top 53 bits of its hash."""
    return _shift(mix64(seeds), 11).double() * 2.0**-53


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw from `logits` (B, V) with `seeds` (B,) int64; returns (tokens, logprobs), both (B,).

    Log-probs are fp32 (fp64 of fp64 logits), of the tempered but untruncated distribution, without
    a gradient.
    temperature 0 is greedy (its log-probs are those at temperature 1). top_k 0 and top_p 1
    switch truncation off; together top_p counts the mass that top_k leaves. Raises ValueError for
    shapes that do not fit and settings outside their range, and NoDistribution, a ValueError, for
    NaN (in plain eager calls on the CPU, or under PUNA_DEBUG=1; elsewhere the log-prob is NaN).
    """
    _check(logits, temperature, top_k, top_p, seeds)
    top_k = min(int(top_k), logits.shape[1])
    draw = sample_draw if choose(logits) == "triton" else _reference
    tokens, logprobs = draw(logits.detach(), seeds, temperature, top_k, top_p)
    if visible(logprobs) and logprobs.isnan().any():
        raise NoDistribution(int(logprobs.isnan().int().argmax()))
    return tokens, logprobs


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError for what nothing can be drawn with, on any back end."""
    # Tensors are no settings: a device would have to be waited for.
    if isinstance(temperature, Tensor) or not (
        temperature == 0 or COLDEST <= temperature <= HOTTEST
    ):
        raise ValueError(
            f"temperature is {temperature!r}; it must be 0 (greedy) or from {COLDEST} to {HOTTEST}"
        )
    if isinstance(top_k, Tensor) or not (top_k >= 0 and top_k % 1 == 0):
        raise ValueError(f"top_k is {top_k!r}; it must be 0 (off) or a whole number above")
    if isinstance(top_p, Tensor) or not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}; it must be above 0 and at most 1 (off)")


def _check(logits: Tensor, temperature: float, top_k: int, top_p: float, seeds: Tensor) -> None:
    if logits.dim() != 2 or seeds.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and seeds {tuple(seeds.shape)} do not fit (B, V), (B,)"
        )
    if logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits are {tuple(logits.shape)} of {logits.dtype}, expected floats over at least "
            "one token"
        )
    if seeds.dtype != torch.int64 or seeds.device != logits.device:
        raise ValueError(
            f"seeds are {seeds.dtype} on {seeds.device}, expected int64 on {logits.device}"
        )
    check_settings(temperature, top_k, top_p)


# Reference


def _reference(
    logits: Tensor, seeds: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    raw = wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature not in (0, 1):
        # The largest first: rounding then costs the likely tokens nothing.
        wide = (raw - raw.amax(-1, keepdim=True)).div_(temperature)
    logp = torch.log_softmax(wide, -1)
    if temperature == 0:
        tokens = logp.argmax(-1)
    elif top_k == 0 and top_p == 1.0:
        # Not logp.exp(): on CPUs torch's softmax is several times faster than its exp.
        tokens = _invert(torch.softmax(wide, -1), uniform(seeds))
    else:
        tokens = _draw(raw, temperature, top_k, top_p, uniform(seeds))
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, u: Tensor) -> Tensor:
    """Logits are ordered, not probabilities: rounded, those have ties that logits have not."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    weights = (ordered - ordered[:, :1]).div_(temperature).exp_()
    if top_k:
        weights[:, top_k:] = 0
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    gone = cumulative - weights > top_p * cumulative[:, -1:]
    return index.gather(1, _invert(weights.masked_fill_(gone, 0), u)[:, None]).squeeze(1)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds u * total; never one of weight zero."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    tokens = torch.searchsorted(cumulative, u[:, None] * total, right=True)
    # u * total may round up to the total; the first place that reaches it has a weight.
    tokens = torch.minimum(tokens, torch.searchsorted(cumulative, total))
    return tokens.clamp_(max=weights.shape[1] - 1).squeeze(1)  # past the end if all are NaN


# Triton


@jit
def _uniform_bits(seed):
    """SplitMix64 of the seed, its top 53 bits: the reference's uniform number times 2^64."""
    x = seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 11) << 11


@jit
def _share(total, bits):
    """total * bits / 2^64, rounded down."""
    return tl.umulhi(total.to(tl.uint64), bits).to(tl.int64)


@jit
def _weights(x, largest, scale):
    """exp((x - largest) / temperature) in units of 2^-44."""
    return (tl.exp2((x - largest) * scale) * 17592186044416.0).to(tl.int64)


@jit
def _load(X, start, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Logits start.. of a row in fp32, (ROWS, COLUMNS); -inf past its end."""
    place = start + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(X + place, mask=place < width, other=-float("inf")).to(tl.float32)


@jit
def _mass(
    X, width, held, floor, largest, scale, count,
    STRICT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The mass, or the number, of the logits from `floor` up (above it where STRICT)."""
    mass = tl.full((), 0, tl.int64)
    for start in range(0, 1 if TILES else width, ROWS * COLUMNS):
        for i in tl.static_range(max(TILES, 1)):
            x = held[i] if TILES else _load(X, start, width, ROWS, COLUMNS)
            inside = x > floor if STRICT else x >= floor
            if count:
                mass += tl.sum(inside.to(tl.int32))
            else:
                # The bound goes in before the weight: weights that no bound had touched would
                # be taken out of the bisection's loop, held in two registers each, and spilled.
                x = tl.where(inside, x, -float("inf"))
                mass += tl.sum(_weights(x, largest, scale))
    return mass


@jit
def _find(
    X, width, held, threshold, largest, scale, count,
    BITS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest logit from which on the mass (or number) exceeds `threshold`; inf if none."""
    key = tl.full((), 0, tl.uint32)  # a logit's place in the order of all fp32, from the top bit
    bit = tl.full((), 0x80000000, tl.uint32)
    floor = tl.full((), float("inf"), tl.float32)
    for _ in range(BITS):
        trial = key | bit
        place = tl.where(trial < 0x80000000, trial ^ 0xFFFFFFFF, trial ^ 0x80000000)
        value = place.to(tl.float32, bitcast=True)
        mass = _mass(X, width, held, value, largest, scale, count, False, TILES, ROWS, COLUMNS)
        key = tl.where(mass > threshold, trial, key)
        floor = tl.where(mass > threshold, value, floor)
        bit = bit >> 1
    found = tl.full((), float("inf"), tl.float32)
    for start in range(0, 1 if TILES else width, ROWS * COLUMNS):
        for i in tl.static_range(max(TILES, 1)):
            x = held[i] if TILES else _load(X, start, width, ROWS, COLUMNS)
            found = tl.minimum(found, tl.min(tl.where(x >= floor, x, float("inf"))))
    return found


@jit
def _amounts(x, only, largest, scale, EQUAL: tl.constexpr):
    if EQUAL:
        return (x == only).to(tl.int32)
    else:
        return _weights(x, largest, scale)


@jit
def _pick(
    X, width, held, threshold, only, largest, scale, EQUAL: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first place where the running mass passes `threshold`, and its logit; with EQUAL, the
    running number of logits equal to `only`."""
    seen = tl.full((), 0, tl.int64)
    before = seen
    base = tl.full((), 0, tl.int32)
    at = tl.full((ROWS, COLUMNS), -float("inf"), tl.float32)  # the tile where it passes
    for start in range(0, 1 if TILES else width, ROWS * COLUMNS):
        for i in tl.static_range(max(TILES, 1)):
            x = held[i] if TILES else _load(X, start, width, ROWS, COLUMNS)
            amount = tl.sum(_amounts(x, only, largest, scale, EQUAL))
            here = (seen <= threshold) & (threshold < seen + amount)
            base = tl.where(here, start + i * ROWS * COLUMNS, base)
            before = tl.where(here, seen, before)
            at = tl.where(here, x, at)
            seen += amount
    threshold -= before
    rows = tl.arange(0, ROWS)
    sums = tl.sum(_amounts(at, only, largest, scale, EQUAL), 1)
    row = tl.sum((tl.cumsum(sums, 0) <= threshold).to(tl.int32))
    threshold -= tl.sum(tl.where(rows < row, sums, 0))
    line = tl.max(tl.where((rows == row)[:, None], at, -float("inf")), 0)
    inside = _amounts(line, only, largest, scale, EQUAL)
    column = tl.sum((tl.cumsum(inside, 0) <= threshold).to(tl.int32))
    logit = tl.max(tl.where(tl.arange(0, COLUMNS) == column, line, -float("inf")))
    return base + row * COLUMNS + column, logit


@jit(do_not_specialize=["top_k", "top_p"])
def sample_draw_kernel(
    # pointers
    LOGITS, SEEDS, TOKENS, LOGPROBS,
    # sizes
    width, top_k, top_p, cold,
    # stride of a row
    stride,
    # compile-time settings
    GREEDY: tl.constexpr, TRUNCATED: tl.constexpr, BITS: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`cold` is 1 / temperature, `top_p` comes in units of 2^-60; of a logit's bits as fp32 the
    first BITS can differ."""
    scale = cold * 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    X = LOGITS + row * stride
    held = ()
    for i in tl.static_range(TILES):
        held = held + (_load(X, i * ROWS * COLUMNS, width, ROWS, COLUMNS),)  # type: ignore[assignment]
    largest = tl.full((), -float("inf"), tl.float32)
    for start in range(0, 1 if TILES else width, ROWS * COLUMNS):
        for i in tl.static_range(max(TILES, 1)):
            x = held[i] if TILES else _load(X, start, width, ROWS, COLUMNS)
            largest = tl.maximum(largest, tl.max(tl.where(x == x, x, float("inf"))))
    total = _mass(X, width, held, -float("inf"), largest, scale, False, False, TILES, ROWS, COLUMNS)
    # NaN if a logit is NaN or inf
    norm = tl.log(total.to(tl.float32) * 5.684341886080802e-14) + (largest - largest)
    if GREEDY:
        token, logit = _pick(X, width, held, 0, largest, largest, scale, True, TILES, ROWS, COLUMNS)
    else:
        only = largest
        if TRUNCATED:
            share = tl.full((), top_p, tl.int64).to(tl.float64) * 8.673617379884035e-19
            threshold = total
            kept = total
            for search in range(3):  # for the k-th logit, the last that top-p keeps, the drawn
                needed = True
                if search == 0:
                    needed = (top_k > 0) & (top_k < width)
                    threshold = tl.full((), top_k, tl.int64) - 1
                elif search == 1:
                    # fp64, as in the reference: the product decides whether an equal is still kept
                    limit = (kept.to(tl.float64) * share).to(tl.int64)
                    threshold = tl.where(share < 1.0, limit, kept)
                    needed = threshold < kept
                else:
                    threshold = _share(kept, _uniform_bits(tl.load(SEEDS + row)))
                if needed:
                    only = _find(
                        X, width, held, threshold, largest, scale, search == 0,
                        BITS, TILES, ROWS, COLUMNS,
                    )  # fmt: skip
                    above = _mass(
                        X, width, held, only, largest, scale, False, True, TILES, ROWS, COLUMNS
                    )
                    weight = tl.maximum(_weights(only, largest, scale), 1)
                    if search == 0:
                        number = _mass(
                            X, width, held, only, largest, scale, True, True, TILES, ROWS, COLUMNS
                        )
                        if only < float("inf"):  # else fewer than k logits are above -inf
                            kept = above + (top_k - number) * weight
                    elif search == 1:
                        last = (threshold - above) // weight + 1
                        kept = tl.minimum(kept, above + last * weight)
                    else:
                        threshold = (threshold - above) // weight
        else:
            threshold = _share(total, _uniform_bits(tl.load(SEEDS + row)))
        token, logit = _pick(
            X, width, held, threshold, only, largest, scale, TRUNCATED, TILES, ROWS, COLUMNS
        )
    logprob = (logit - largest) * cold - norm
    tl.store(TOKENS + row, tl.minimum(token, width - 1).to(tl.int64))  # NaN pick no place
    tl.store(LOGPROBS + row, tl.where(logprob > 0.0, 0.0, logprob))


def tiles(width: int) -> tuple[int, int, int, int]:
    """(tiles that a program holds, rows and columns of a tile, warps) for `width` logits.

    No tile is held where the registers cannot take the row: then each pass loads it.
    """
    if width > WIDEST_HELD:
        return 0, LARGEST_TILE // 512, 256, 8
    block = min(LARGEST_TILE, triton.next_power_of_2(max(width, 256)))
    return triton.cdiv(width, block), block // 256, 256, min(16, max(4, block // 512))


# Bits of an fp32 that tell values of a narrower type apart
_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}


def _fake(logits, seeds, temperature, top_k, top_p):
    made = logits.new_empty(logits.shape[0], dtype=torch.int64)
    return made, made.new_empty(made.shape, dtype=torch.float32)


@registered(_fake)
def sample_draw(
    logits: Tensor, seeds: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """(tokens (B,) int64, log-probs (B,) fp32)."""
    tokens, logprobs = _fake(logits, seeds, temperature, top_k, top_p)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if logits.shape[1] > WIDEST:
        raise ValueError(f"logits are {logits.shape[1]} wide; the triton back end takes {WIDEST}")
    held, rows, columns, warps = tiles(logits.shape[1])
    if logits.shape[0]:
        with on_device(logits):
            sample_draw_kernel[(logits.shape[0],)](
                # pointers
                logits, seeds.contiguous(), tokens, logprobs,
                # sizes
                logits.shape[1], top_k, int(top_p * _WHOLE), 1 / (temperature or 1.0),
                # strides
                logits.stride(0),
                # settings
                GREEDY=temperature == 0, TRUNCATED=top_k > 0 or top_p < 1,
                BITS=_BITS[logits.dtype], TILES=held, ROWS=rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return tokens, logprobs
