"""Training speed: one step of forward, backward, clipping and AdamW, on random tokens.

The steps are the same for every provider, with the same weights, batch and optimizer. Before
anything is timed, three steps of each must give the same losses: then its forward, its
gradients and its update are right. On the CPU all share a process that keeps the memory it frees,
as Puna's trainers do; in a process of its own a peer is slower. `error` is the largest relative
difference of those losses; `peak_mb` is, on the CPU, all that a fresh process needs to train (see
step_memory.py). The limit is what the same matrix products take by themselves in the same rounds.

On a GPU parameters and optimizer are fp32 and products bf16, rows are as long as Llama 2's, and
"puna-recompute" is Puna with full activation checkpointing. The limit is then what the measured
matrix-product rate allows by PaLM's count: 6 N + 12 L d S FLOPs a token for N multiplied
parameters, L blocks of width d and rows of S tokens, recomputation not counted. So "of limit" is
the MFU, of a rate that this GPU was seen to reach.
"""

import copy

import torch
from torch import Tensor

from puna.benchmarks import machine
from puna.benchmarks.models import steps
from puna.benchmarks.models.ceilings import ceiling
from puna.benchmarks.models.shapes import DTYPES, Models, multiplied_parameters
from puna.benchmarks.models.step_memory import fresh_peak_mb
from puna.benchmarks.models.steps import Step
from puna.benchmarks.rows import Row, Work, rows
from puna.benchmarks.timing import interleaved, peak_mb
from puna.core.config import ModelConfig
from puna.core.errors import UserError
from puna.core.terminal import say

TOKENS, GPU_TOKENS, GPU_BATCH = 256, 4096, 2
BATCH = {"15m": 8, "demo": 16}  # rows on a CPU; of larger shapes one
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def bench_train(
    models: Models, rounds: int, dtype: str, *, quick: bool = False, recompute: bool = False
) -> list[Row]:
    """Rows of one shape. RuntimeError where the providers disagree: nothing is timed then.

    The models are in fp32 and train with products in `dtype`. `quick`: without what compiles for a
    minute, and without fresh processes for the memory. `recompute`, on a GPU: "puna-recompute"
    alone, so that twice as many blocks fit; its losses have no others to agree with.
    """
    batch, row_tokens = size_of_step(models)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, row_tokens)
    tokens = torch.randint(models.config.vocab_size, shape, generator=generator).to(models.device)
    if recompute:
        step = steps.puna_step(models.puna, tokens, DTYPES[dtype], checkpointing="full")
        work = {"puna-recompute": step}
    else:
        work = provided(models, tokens, dtype, compiled=not quick)
    errors = verify(work, TOLERANCE[dtype])
    fresh = not (quick or models.gpu or dtype != "fp32")
    peaks = {name: peak(models, name, step, fresh) for name, step in work.items()}
    if models.gpu or dtype != "fp32":
        counted = flops(models.config, row_tokens) / 1e9
        parameters = 6 * multiplied_parameters(models.config) / 1e9
        say(
            f"train, {models.shape}: {counted:.3g} GFLOPs a token by 6 N + 12 L d S (recomputation "
            f"not counted), {parameters:.3g} by 6 N alone"
        )
        rate = machine.matmul_rate(models.device, DTYPES[dtype], dry=models.shape.tiny)
        limit = rate / flops(models.config, row_tokens)
        timings = interleaved(work, rounds, models.device)
    else:
        best = ceiling(models.config, batch, row_tokens, models.device)
        timings = interleaved({**work, "ceiling": best.run}, rounds, models.device)
        limit = tokens.numel() / (timings.pop("ceiling").median * (1 + best.attention))
    done = Work("train", str(models.shape), batch, tokens.numel(), limit, dtype)
    return rows(done, timings, errors, peaks)


def size_of_step(models: Models) -> tuple[int, int]:
    """(rows, tokens a row)."""
    if models.gpu:
        return GPU_BATCH, min(GPU_TOKENS, models.config.context)
    return BATCH.get(models.shape.size, 1), min(TOKENS, models.config.context)


def flops(config: ModelConfig, row_tokens: int) -> float:
    """Of a token's forward and backward pass, as PaLM counts them (appendix B there)."""
    attention = 12 * config.n_layers * config.dim * row_tokens
    return 6 * multiplied_parameters(config) + attention


def provided(models: Models, tokens: Tensor, name: str, *, compiled: bool) -> dict[str, Step]:
    """Each provider's step from the same weights, which it will move."""
    dtype = None if name == "fp32" else DTYPES[name]
    found = {}
    if models.gpu:
        again = copy.deepcopy(models.puna)
        found["puna-recompute"] = steps.puna_step(again, tokens, dtype, checkpointing="full")
    found = {"puna": steps.puna_step(models.puna, tokens, dtype), **found}
    if models.transformers is not None:
        found["transformers"] = steps.transformers_step(models.transformers, tokens, dtype)
        if compiled and steps.compiles(models.device):
            peer = copy.deepcopy(models.transformers)
            found["transformers-compiled"] = steps.compiled_step(peer, tokens, dtype)
    return found


def peak(models: Models, provider: str, step: Step, fresh: bool) -> float | None:
    """Megabytes: of a fresh process, or of one step here."""
    if not fresh:
        return peak_mb(step, models.device)
    return fresh_peak_mb(provider, models.shape, *size_of_step(models))


def verify(work: dict[str, Step], tolerance: float) -> dict[str, float | None]:
    """Largest relative difference of each provider's first three losses from Puna's; None of one
    that is alone, whose losses must be numbers."""
    losses = {name: [step() for _ in range(3)] for name, step in work.items()}
    first = next(iter(losses))
    errors = {
        name: max(abs(a - b) / abs(b) for a, b in zip(found, losses[first], strict=True))
        for name, found in losses.items()
    }
    for name, error in errors.items():
        if not error <= tolerance:
            raise UserError(
                f"nothing was timed: {name} trains to other losses than {first} "
                f"({losses[name]} against {losses[first]}); run `make test`"
            )
    return {**errors} if len(errors) > 1 else {first: None}
