"""Rollout speed: many prompts whose answers end at different places, as in RLHF.

Answer lengths are fixed in advance from a geometric distribution, so that every provider writes
as many tokens. "puna" refills a slot as its answer ends; "puna-no-refill" is the same engine, 32
prompts at a time; "puna-pytorch" is generation without the native engine, which refills slots at
every eighth step. Were a step's time the same for one row as for many, refilling alone would win
`ideal_gain`; on a CPU it nearly grows with the rows.
"""

import torch

from puna.benchmarks.models.generate import PROMPT, limit
from puna.benchmarks.models.shapes import Models
from puna.benchmarks.rows import Row, Work, rows
from puna.benchmarks.timing import interleaved, peak_mb
from puna.core.errors import UserError
from puna.core.generation.generate import complete
from puna.core.generation.sampling import Sampler, row_keys
from puna.core.native.loader import extension
from puna.core.ops import use_backend

PROMPTS, SLOTS, MEAN = 512, 32, 48  # the longest of 32 answers is about four times the mean


def answer_lengths(count: int, most: int, seed: int = 0) -> list[int]:
    """`count` draws from a geometric distribution with mean `MEAN`, cut at `most`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(count).geometric_(1 / MEAN, generator=generator)
    return [min(int(length), most) for length in drawn]


def ideal_gain(lengths: list[int]) -> float:
    """Steps of static batches over the steps that full batches would need."""
    batches = [lengths[i : i + SLOTS] for i in range(0, len(lengths), SLOTS)]
    return sum(map(max, batches)) * SLOTS / sum(lengths)


def bench_rollout(models: Models, rounds: int) -> list[Row]:
    """Rows of one shape; none on a GPU, or where the native engine is not built."""
    if models.device.type != "cpu" or extension() is None:
        return []
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(models.config.vocab_size, (PROMPTS, PROMPT), generator=generator)
    lengths = answer_lengths(PROMPTS, models.config.context - PROMPT)
    ids = prompts.tolist()
    print(f"rollout, {models.shape}: full slots could at best win {ideal_gain(lengths):.1f} times")
    work = {
        "puna": lambda: sample(models, ids, lengths, "native", PROMPTS),
        "puna-no-refill": lambda: sample(models, ids, lengths, "native", SLOTS),
        "puna-pytorch": lambda: sample(models, ids, lengths, "reference", PROMPTS),
    }
    bound = limit(models.config, models.ceilings, SLOTS, PROMPT + MEAN)
    return rows(
        Work("rollout", models.shape, SLOTS, sum(lengths), bound),
        interleaved(work, rounds, models.device),
        dict.fromkeys(work, 0.0),
        {name: peak_mb(call, models.device) for name, call in work.items()},
    )


@torch.inference_mode()
def sample(
    models: Models, prompts: list[list[int]], lengths: list[int], backend: str, at_once: int
) -> None:
    """Answers at temperature 1, `SLOTS` side by side; of `at_once` prompts before the next are
    begun. RuntimeError unless they are as long as asked."""
    numbers = torch.arange(len(prompts))
    keys = row_keys(0, 0, numbers, torch.zeros_like(numbers))
    written: list[int] = []
    for start in range(0, len(prompts), at_once):
        some = slice(start, start + at_once)
        with use_backend(backend):
            found = complete(
                models.puna, prompts[some], keys[some], lengths[some], Sampler(), None, SLOTS
            )
        written += [len(completion.tokens) for completion in found]
    if written != lengths:
        raise UserError(f"{backend} wrote too little; run `make test`")
