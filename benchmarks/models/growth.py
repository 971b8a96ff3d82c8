"""How cost grows: a training step over batch, context, vocabulary, width and depth, sampling over
K answers to each prompt; all else stays as it is.

Every point is timed alone, on random weights. `exponents` fits seconds = a x^e to the points of an
axis by least squares in logarithms. Where memory ends is where a point did not fit, or else where
the line through the memory of the points that did (for the width: over its square) meets what the
machine has.
"""

import gc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from puna.benchmarks import budget
from puna.benchmarks.machine import matmul_rate, read_rate
from puna.benchmarks.models.generate import limit, side_by_side
from puna.benchmarks.models.shapes import (
    DTYPES,
    Ceilings,
    multiplied_parameters,
)
from puna.benchmarks.models.steps import puna_step
from puna.benchmarks.models.train import flops
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import interleaved, peak_mb
from puna.core.checkpoint.source import fresh, in_memory
from puna.core.config import SIZES, ModelConfig, ffn_width, parameter_count
from puna.core.generation.generate import generate

TRAINED = 16  # bytes a parameter: fp32 with its gradient and AdamW's state
# Student's t: 95% of it lies within, by degrees of freedom
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


class Plan(NamedTuple):
    """Where every axis begins, and its points."""

    base: ModelConfig
    rows: int
    tokens: int  # a row
    axes: Mapping[str, Sequence[int]]
    prompts: int = 4  # that are answered K times
    new: int = 32  # tokens of an answer


CPU = Plan(
    SIZES["mini"], 2, 64,
    {"batch": (1, 2, 4, 8, 16), "context": (64, 128, 256, 512, 1024),
     "vocabulary": (1024, 2048, 4096, 8192, 16384), "width": (64, 128, 256, 512),
     "depth": (2, 4, 8, 16), "K": (1, 2, 4, 8, 16)},
)  # fmt: skip
GPU = Plan(
    replace(SIZES["7b"], n_layers=2), 2, 1024,
    {"batch": (1, 2, 4, 8, 16, 32, 64, 128), "context": (1024, 2048, 4096, 8192, 16384, 32768),
     "vocabulary": (8000, 16000, 32000, 64000, 128000), "width": (1024, 2048, 4096, 8192),
     "depth": (1, 2, 4, 8, 16, 32), "K": (1, 4, 16, 64)},
    prompts=16, new=128,
)  # fmt: skip
DRY = Plan(
    ModelConfig(32, 2, 2, 1, 48, 64, context=64), 2, 8,
    {"batch": (1, 2), "context": (8, 16), "vocabulary": (64, 128), "width": (32, 64),
     "depth": (1, 2), "K": (1, 2)},
    prompts=2, new=4,
)  # fmt: skip


class Fit(NamedTuple):
    """seconds = a x^exponent, and what is known of the exponent with 95% confidence."""

    exponent: float
    low: float
    high: float


def bench_growth(
    plan: Plan, device: torch.device, dtype: str, rounds: int, *, dry: bool = False
) -> Iterator[list[Row]]:
    """The rows of one axis after the other, as long as there is time (`budget`)."""
    rate = matmul_rate(device, DTYPES[dtype], dry=dry)
    for along, points in plan.axes.items():
        found = []
        for x in points:
            if budget.is_spent():
                break
            try:
                found.append(measured(plan, along, x, device, dtype, rounds, rate))
            except torch.OutOfMemoryError:
                if found:
                    found[-1]["ends"] = x
                break
            finally:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        yield found


def measured(
    plan: Plan,
    along: str,
    x: int,
    device: torch.device,
    dtype: str,
    rounds: int,
    rate: float,
) -> Row:
    """One point of an axis."""
    config = at(plan, along, x)
    held_in = DTYPES[dtype] if along == "K" else torch.float32
    model = in_memory(fresh(config, 0, device=device), device, held_in)
    generator = torch.Generator().manual_seed(0)
    if along == "K":
        ids = torch.randint(config.vocab_size, (plan.prompts, 8), generator=generator).tolist()
        prompts, new = [prompt for prompt in ids for _ in range(x)], plan.new
        at_once, cache = side_by_side(model, len(prompts), 8 + new)

        def call() -> object:
            return generate(model, prompts, max_new_tokens=new, eos_id=None, cache_bytes=cache)

        size = DTYPES[dtype].itemsize
        ceilings = Ceilings(rate, read_rate(device, size * multiplied_parameters(config)))
        rows, tokens, held = len(prompts), len(prompts) * plan.new, size
        bound = limit(config, ceilings, at_once, 8 + plan.new / 2, size, size)
        name = "sample by K"
    else:
        rows = x if along == "batch" else 1 if along == "context" else plan.rows
        length = x if along == "context" else plan.tokens
        drawn = torch.randint(config.vocab_size, (rows, length), generator=generator).to(device)
        kind = None if dtype == "fp32" else DTYPES[dtype]
        call = puna_step(model, drawn, kind)
        tokens, held, bound = rows * length, TRAINED, rate / flops(config, length)
        name = f"train by {along}"
    peak = peak_mb(call, device)
    timing = interleaved({"puna": call}, rounds, device)["puna"]
    work = Work("growth", f"{along} {x}", rows, tokens, bound, dtype, name)
    found = row(work, "puna", timing, None, peak)
    found["along"], found["x"] = along, x
    if peak is not None:
        found["needs_mb"] = held * parameter_count(config) / 1e6 + peak
    return found


def at(plan: Plan, along: str, x: int) -> ModelConfig:
    """The model at a point of an axis."""
    base = plan.base
    if along == "context":
        return replace(base, context=max(x, base.context))
    if along == "vocabulary":
        return replace(base, vocab_size=x)
    if along == "depth":
        return replace(base, n_layers=x)
    if along == "width":
        heads = max(1, x // base.head_dim)
        shared = max(1, heads * base.n_kv_heads // base.n_heads)
        return replace(base, dim=x, n_heads=heads, n_kv_heads=shared, ffn_dim=ffn_width(x, 16))
    return base


def exponents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each axis that has points: the fit, and where memory ends."""
    axes: dict[tuple[str, str], list[Row]] = {}
    for each in rows:
        if each["bench"] == "fsdp" and each["provider"] == "puna":
            axes.setdefault((f"{each['operation']} by ranks", each["shape"]), []).append(each)
        elif each["bench"] == "growth":
            axes.setdefault((each["operation"], ""), []).append(each)
    found: list[dict[str, Any]] = []
    for (what, shape), points in axes.items():
        xs = [float(each["x"] if "x" in each else each["ranks"]) for each in points]
        fit = fitted(xs, [each["seconds"] for each in points])
        if fit is None:
            continue
        row = {"what": f"{what}, {shape}" if shape else what, **fit._asdict()}
        found.append(row | memory_end(points))
    return found


def fitted(xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """The exponent by least squares in logarithms, with its 95% interval; None for fewer than three
    points, which say nothing of how well they fit."""
    if len(set(xs)) < 3:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    slope, offset = line(logs)
    mean = sum(x for x, _ in logs) / len(logs)
    rest = sum((y - slope * x - offset) ** 2 for x, y in logs)
    freedom = len(logs) - 2
    error = math.sqrt(rest / freedom / sum((x - mean) ** 2 for x, _ in logs))
    reach = error * QUANTILES[min(freedom, len(QUANTILES)) - 1]
    return Fit(slope, slope - reach, slope + reach)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope, offset) by least squares."""
    x_mean, y_mean = (sum(each) / len(points) for each in zip(*points, strict=True))
    square = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / square
    return slope, y_mean - slope * x_mean


def memory_end(points: Sequence[Row]) -> dict[str, Any]:
    """{"fits", "ends"} where a point did not fit, {"about"} where that is extrapolated, or {}."""
    if "ends" in points[-1]:
        return {"fits": points[-1]["x"], "ends": points[-1]["ends"]}
    power = 2 if points[0].get("along") == "width" else 1
    needs = [(each["x"] ** power, each["needs_mb"]) for each in points if "needs_mb" in each]
    if len(needs) < 2:
        return {}
    slope, offset = line(needs)
    room = memory_mb() - offset
    return {"about": round((room / slope) ** (1 / power))} if slope > 0 and room > 0 else {}


def memory_mb() -> float:
    """What a model can have: a GPU's memory, or the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 1e6
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6


def said(fit: Mapping[str, Any]) -> str:
    """A fit in a sentence."""
    text = f"{fit['what']}: grows with exponent {fit['exponent']:.2f}"
    text += f" ({fit['low']:.2f} to {fit['high']:.2f})"
    if "ends" in fit:
        return f"{text}; memory ends between {fit['fits']:,} and {fit['ends']:,}"
    return f"{text}; memory ends at about {fit['about']:,}" if "about" in fit else text
