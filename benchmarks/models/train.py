"""Training speed: one step of forward, backward, clipping and AdamW, on random tokens.

The steps are the same for every provider, with the same weights, batch and optimizer. Before
anything is timed, three steps of each must give the same losses: then its forward, its
gradients and its update are right. On the CPU all share a process that keeps the memory it frees,
as Puna's trainers do; in a process of its own a peer is slower. `error` is the largest relative
difference of those losses; `peak_mb` is, on the CPU, all that a fresh process needs to train (see
step_memory.py). The limit is what the same matrix products take by themselves in the same rounds.
"""

import copy

import torch
from torch import Tensor

from puna.benchmarks.models import steps
from puna.benchmarks.models.ceilings import ceiling
from puna.benchmarks.models.shapes import Models
from puna.benchmarks.models.step_memory import fresh_peak_mb
from puna.benchmarks.models.steps import Step
from puna.benchmarks.rows import Row, Work, rows
from puna.benchmarks.timing import interleaved, peak_mb
from puna.core.errors import UserError

TOKENS = 256
BATCH = {"15m": 8, "demo": 16}
TOLERANCE = 1e-4


def bench_train(models: Models, rounds: int) -> list[Row]:
    """Rows of one shape. RuntimeError where the providers disagree: nothing is timed then."""
    batch = BATCH[models.shape]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, TOKENS)
    tokens = torch.randint(models.config.vocab_size, shape, generator=generator).to(models.device)
    work = provided(models, tokens)
    errors = verify(work)
    peaks = {name: peak(models, name, step) for name, step in work.items()}
    best = ceiling(models.config, batch, TOKENS, models.device)
    timings = interleaved({**work, "ceiling": best.run}, rounds, models.device)
    limit = tokens.numel() / (timings.pop("ceiling").median * (1 + best.attention))
    return rows(Work("train", models.shape, batch, tokens.numel(), limit), timings, errors, peaks)


def provided(models: Models, tokens: Tensor) -> dict[str, Step]:
    """Each provider's step from the same weights, which it will move."""
    found = {"puna": steps.puna_step(models.puna, tokens)}
    if models.transformers is not None:
        found["transformers"] = steps.transformers_step(models.transformers, tokens)
        if steps.compiles(models.device):
            peer = copy.deepcopy(models.transformers)
            found["transformers-compiled"] = steps.compiled_step(peer, tokens)
    return found


def peak(models: Models, provider: str, step: Step) -> float | None:
    """Megabytes: of a fresh process on the CPU, of one step here on a GPU."""
    if models.device.type == "cpu":
        return fresh_peak_mb(provider, models.shape, BATCH[models.shape], TOKENS)
    return peak_mb(step, models.device)


def verify(work: dict[str, Step]) -> dict[str, float]:
    """Largest relative difference of each provider's first three losses from Puna's."""
    losses = {name: [step() for _ in range(3)] for name, step in work.items()}
    errors = {
        name: max(abs(a - b) / abs(b) for a, b in zip(found, losses["puna"], strict=True))
        for name, found in losses.items()
    }
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise UserError(
                f"nothing was timed: {name} trains to other losses than puna "
                f"({losses[name]} against {losses['puna']}); run `make test`"
            )
    return errors
