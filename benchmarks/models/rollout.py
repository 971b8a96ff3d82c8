"""Rollout speed: many prompts whose answers end at different places, as in RLHF.

Answer lengths are fixed in advance from a geometric distribution, so that every provider writes
as many tokens. A slot has room for the longest of them; of 7B on a GPU of 80 GB some 60 fit, where
256 are asked for. "puna" refills a slot as its answer ends; "puna-no-refill" is the same engine, 32
prompts at a time; "puna-pytorch" is generation without the native engine, which refills slots at
every eighth step. Were a step's time the same for one row as for many, refilling alone would win
`ideal_gain`; on a CPU it nearly grows with the rows.
"""

from functools import partial

import torch

from puna.benchmarks.models.generate import PROMPT, limit, side_by_side
from puna.benchmarks.models.shapes import DTYPES, Models
from puna.benchmarks.rows import Row, Work, rows
from puna.benchmarks.timing import interleaved, peak_mb
from puna.core.errors import UserError
from puna.core.generation.generate import complete
from puna.core.generation.sampling import Sampler, row_keys
from puna.core.native.loader import extension
from puna.core.ops import use_backend

PROMPTS, SLOTS, MEAN = 512, 32, 48  # the longest of 32 answers is about four times the mean
GPU_SLOTS, GPU_MEAN = 256, 256


def answer_lengths(count: int, most: int, mean: int, seed: int = 0) -> list[int]:
    """`count` draws from a geometric distribution, cut at `most`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(count).geometric_(1 / mean, generator=generator)
    return [min(int(length), most) for length in drawn]


def ideal_gain(lengths: list[int], slots: int) -> float:
    """Steps of static batches over the steps that full batches would need."""
    batches = [lengths[i : i + slots] for i in range(0, len(lengths), slots)]
    return sum(map(max, batches)) * slots / sum(lengths)


def bench_rollout(models: Models, rounds: int, prompts: int = 0) -> list[Row]:
    """Rows of one shape, of so many prompts (0: PROMPTS); none on a CPU where the native engine is
    not built."""
    if not models.gpu and models.dtype == "fp32" and extension() is None:
        return []
    count = prompts or PROMPTS
    slots, mean = (GPU_SLOTS, GPU_MEAN) if models.gpu else (SLOTS, MEAN)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(models.config.vocab_size, (count, PROMPT), generator=generator)
    lengths = answer_lengths(count, models.config.context - PROMPT, mean)
    ids = drawn.tolist()
    # Each slot has room for the longest answer.
    slots, cache_bytes = side_by_side(models.puna, slots, PROMPT + max(lengths))
    gain = ideal_gain(lengths, slots)
    print(f"rollout, {models.shape}: full slots could at best win {gain:.1f} times")
    ways: dict[str, tuple[str, int]] = {
        "puna": ("native", count),
        "puna-no-refill": ("native", slots),
        "puna-pytorch": ("reference", count),
    }
    if models.gpu or models.dtype != "fp32":
        ways = {"puna": ("auto", count), "puna-no-refill": ("auto", slots)}
    work = {
        name: partial(sample, models, ids, lengths, *way, slots, cache_bytes)
        for name, way in ways.items()
    }
    bytes_each = DTYPES[models.dtype].itemsize
    bound = limit(models.config, models.ceilings, slots, PROMPT + mean, bytes_each, bytes_each)
    done = Work("rollout", str(models.shape), slots, sum(lengths), bound, models.dtype)
    return rows(
        done,
        interleaved(work, rounds, models.device),
        dict.fromkeys(work, 0.0),
        {name: peak_mb(call, models.device) for name, call in work.items()},
    )


@torch.inference_mode()
def sample(
    models: Models,
    prompts: list[list[int]],
    lengths: list[int],
    backend: str,
    at_once: int,
    slots: int,
    cache_bytes: int,
) -> None:
    """Answers at temperature 1, `slots` side by side; of `at_once` prompts before the next are
    begun. RuntimeError unless they are as long as asked."""
    numbers = torch.arange(len(prompts))
    keys = row_keys(0, 0, numbers, torch.zeros_like(numbers))
    written: list[int] = []
    for start in range(0, len(prompts), at_once):
        some = slice(start, start + at_once)
        with use_backend(backend):
            found = complete(
                models.puna,
                prompts[some],
                keys[some],
                lengths[some],
                Sampler(),
                None,
                slots,
                cache_bytes,
            )
        written += [len(completion.tokens) for completion in found]
    if written != lengths:
        raise UserError(f"{backend} wrote too little; run `make test`")
