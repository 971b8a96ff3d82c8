"""The one training loop: batches in, optimizer steps, metrics, checkpoints, exact resume.

A stage brings two functions: `batch_at(step)`, this rank's micro-batches of a step, a pure
function of the step, so that the data position *is* the step; and an Objective. The gradient of
a step is that of (sum of all losses) / (sum of all weights), over micro-batches and ranks alike,
so neither changes the result.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from puna.core import parallel
from puna.core.checkpoint.source import Source
from puna.core.device import device_of_name
from puna.core.errors import UserError
from puna.core.generation.kv_cache import CACHE_BYTES
from puna.core.model import Transformer
from puna.core.native.loader import keep_freed_memory
from puna.core.offload import at_hand, offload
from puna.trainers.train.advice import ANEW, advice
from puna.trainers.train.interrupts import stop_requests
from puna.trainers.train.kinds import FIXED, FREE
from puna.trainers.train.layout import Parallel
from puna.trainers.train.precision import compute_dtype
from puna.trainers.train.progress import meter
from puna.trainers.train.ranges import (
    Above,
    AtLeast,
    Batch,
    Below,
    Count,
    CountOrZero,
    Options,
    Rate,
    Seed,
    Share,
    Weight,
)
from puna.trainers.train.run import Run, Trained


@dataclass(kw_only=True)
class FolderConfig(Options):
    """Options of whatever runs models and writes into a folder of its own."""

    out: Path
    """the run folder; an interrupted run in it is continued"""
    seed: Annotated[Seed, FIXED] = 0
    """seed of everything random: order of the data, fresh weights, sampled tokens"""
    device: Annotated[str, FREE] = "auto"
    """auto takes a GPU where there is one"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """of the matrix products; all else, parameters and optimizer, is fp32"""
    timeout: Annotated[float, Above(0), FREE] = 1800.0
    """seconds that ranks wait for each other, in a step or while one of them saves (until all have
    started, torchrun waits: --rdzv-conf timeout=900)"""


@dataclass(kw_only=True)
class DrawingConfig(Options):
    """How answers are drawn: none of it changes what is drawn."""

    generation_batch: Annotated[Batch, FREE] = 256
    """answers sampled side by side, at most"""
    cache_gb: Annotated[float, Above(0), FREE] = CACHE_BYTES / 1e9
    """of a device's memory for their keys and values (10^9 bytes): fewer stand side by side where
    so many do not fit"""
    sampling_tp: Annotated[Count, FREE] = 1
    """neighbouring ranks, of one node, that share one copy of the model while it samples (paper: a
    node); 1 gathers it whole on every rank"""

    def limits(self) -> dict[str, Any]:
        """Of what stands side by side, as `generate` takes them."""
        return {"batch_size": self.generation_batch, "cache_bytes": int(self.cache_gb * 1e9)}


@dataclass(kw_only=True)
class TrainConfig(FolderConfig):
    """Options that every stage shares; optimizer defaults are the paper's (section 2.2)."""

    lr: Rate = 3e-4
    """peak learning rate"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """of the learning rate after the warm-up: down along a cosine, or constant"""
    min_lr: Share = 0.1
    """where the cosine ends, as a share of the peak (paper: 10%)"""
    warmup_steps: CountOrZero = 0
    """steps of linear warm-up"""
    weight_decay: Weight = 0.1
    """AdamW's, on matrices only"""
    beta1: Annotated[float, AtLeast(0), Below(1)] = 0.9
    beta2: Annotated[float, AtLeast(0), Below(1)] = 0.95
    eps: Annotated[float, Above(0), AtLeast(1e-30)] = 1e-5
    clip: Rate = 1.0
    """largest gradient norm"""
    save_every: Annotated[Count, FREE] = 500
    """steps between checkpoints"""
    keep: Annotated[Count, FREE] = 2
    """newest checkpoints to keep"""
    model_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """what the finished model's weights are written in (checkpoints: fp32); what trains on from it
    begins with the rounded ones"""
    amend: Annotated[bool, FREE] = False
    """go on with an interrupted or finished run under other options, or on other data, from here"""
    resume: Annotated[Literal["newest", "previous"], FREE] = "newest"
    """previous: where the newest checkpoint is damaged, set it aside and take the one before it"""
    log: Annotated[Literal["none", "tensorboard", "trackio", "wandb"], FREE] = "none"
    """where else to show the metrics, by a package of its own: pip install "puna[tensorboard]" """
    plan: Annotated[bool, FREE] = True
    """refuse, before loading, what cannot fit the GPUs by the arithmetic of `puna plan`"""
    parallel: Annotated[Parallel, FREE] = field(default_factory=Parallel)
    """how the model is shared out over the ranks"""


@dataclass(kw_only=True)
class RowsConfig(TrainConfig):
    """Options of the stages that train on batches of rows."""

    batch: Batch = 64
    """rows in a step, all processes together"""
    micro_batch: Annotated[Batch, FREE] = 8
    """rows in one forward pass"""


@dataclass(kw_only=True)
class HeldOutConfig(RowsConfig):
    """Options of those that hold rows out."""

    eval_every: Annotated[Count, FREE] = 100
    """steps between looks at held-out data"""


class Objective(NamedTuple):
    """What to minimise: the sum of `loss` over the sum of `weight`."""

    loss: Callable[[Transformer, Any], tuple[Tensor, dict[str, Tensor]]]
    """(model, batch) -> (summed loss, further sums to log per weight, by name)"""
    weight: Callable[[Any], float]
    """batch -> what its summed loss is divided by: loss tokens, pairs"""
    tokens: Callable[[Any], int]
    """batch -> tokens of the rows that count, for the rate"""


def device_of(config: FolderConfig) -> torch.device:
    """The device asked for; ValueError where it is not there."""
    return device_of_name(config.device)


def load(source: Source, config: FolderConfig, *, frozen: bool = False, tp: int = 1) -> Transformer:
    """The model on the device asked for; shared out as configured, applied from outside. What is
    `frozen` is held in the dtype it computes in, over all ranks, of which `tp` work on the same
    rows."""
    device, lm = device_of(config), source.head == "lm"
    layout = config.parallel if isinstance(config, TrainConfig) else Parallel()
    if frozen:
        layout = Parallel(tp=tp, compile=layout.compile)
    if device.type == "cpu":
        keep_freed_memory()
    return parallel.load(
        source,
        device,
        frozen=frozen,
        compute_dtype=compute_dtype(config),
        checkpointing=layout.checkpointing,
        compile=layout.compile,
        replicate=layout.replicate,
        tp=layout.tp,
        sampling_tp=config.sampling_tp if isinstance(config, DrawingConfig) and lm else 1,
    )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; no weight decay on one-dimensional ones. With `offload` its
    moments are on the host but for its steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.parallel.offload:
        offload(optimizer)
    return optimizer


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of 0-based `step` of `steps`: linear warm-up, then cosine or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, steps - 1 - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_optimizer(network: Trained, rate: float, clip: float) -> float:
    """Clip, step, clear; returns the gradient norm before clipping."""
    norm = parallel.clip_gradients(network.model, clip)
    if math.isfinite(norm):
        set_learning_rate(network.optimizer, rate)
        with at_hand(network.optimizer):
            network.optimizer.step()
    network.optimizer.zero_grad(set_to_none=True)
    return norm


def backward(model: Transformer, batches: Sequence[Any], objective: Objective) -> dict[str, float]:
    """Accumulate the gradient of one step; returns its loss and other means over all ranks."""
    device = model.device
    weight = torch.tensor([sum(objective.weight(b) for b in batches)], dtype=torch.float64)
    total = max(float(parallel.all_sum(weight.to(device))), 1e-12)
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        parallel.begin_pass(model, is_last=number == len(batches))
        loss, extras = objective.loss(model, batch)
        (loss / total).backward()
        for name, value in {"loss": loss, **extras}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    stacked = parallel.all_sum(torch.stack(list(sums.values())))
    return dict(zip(sums, (stacked / total).tolist(), strict=True))


def fit(
    title: str,
    run: Run,
    network: Trained,
    batch_at: Callable[[int], Sequence[Any]],
    steps: int,
    objective: Objective,
    config: TrainConfig,
    evaluate: Callable[[Transformer], dict[str, float]] | None = None,
    eval_every: int = 0,
) -> Path:
    """Train for `steps` steps, from the run's newest checkpoint on; returns the model's folder.

    Every step is a row of metrics.jsonl, with `evaluate`'s numbers every `eval_every`; row 0 holds
    those of the untrained model.

    Raises UserError, naming the step and the last good checkpoint, where the loss or the gradient
    is not finite. Ctrl-C, SIGTERM and SIGHUP save a checkpoint (in the last step the
    model), then end the run (SystemExit).
    """
    check_left(run, steps, "steps")
    step = run.resume_step()
    run.restore_optimizers({"model": network})
    progress_bar = meter(title, steps, start=step, show=parallel.is_main())
    with progress_bar as progress, stop_requests(run.path) as stop:
        if evaluate and step == 0:
            run.log(0, **evaluated(network.model, evaluate))
        while step < steps:
            if stop():
                run.save(step, {"model": network}, keep=config.keep)
                run.settle()
                raise SystemExit(f"stopped at step {step}; the same command continues {run.path}")
            rate = learning_rate(step, steps, config)
            batches = batch_at(step)
            means = backward(network.model, batches, objective)
            norm = step_optimizer(network, rate, config.clip)
            check_finite(run, step + 1, loss=means["loss"], gradient=norm)
            step += 1
            tokens = parallel.counted(sum(objective.tokens(b) for b in batches), network.model)
            row = {**means, "lr": rate, "grad_norm": norm, "tokens": tokens}
            if evaluate and (step % eval_every == 0 or step == steps):
                row.update(evaluated(network.model, evaluate))
            run.log(step, **row)
            progress.advance(tokens, f"loss {means['loss']:.3f}")
            if step % config.save_every == 0 and step < steps:
                run.save(step, {"model": network}, keep=config.keep)
        return run.finish(network.model)


def check_left(run: Run, steps: int, what: str) -> None:
    """ValueError where a run has done more than it is asked for: nothing of that can be undone."""
    if run.step > steps:
        raise ValueError(
            f"{run.path} has done {run.step:,} {what}, and with these options it has {steps:,}; "
            "ask for more, or give another --out"
        )


def check_finite(run: Run, step: int, **values: float) -> None:
    """UserError where a value is not finite, before anything of this step is kept."""
    for name, value in values.items():
        if not math.isfinite(value):
            run.settle()
            kept = run.checkpoint
            where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was due yet"
            raise UserError(
                f"the {name} is {value} at step {step}; {where}; look at that step's data, or "
                + advice("amend", "go on from there with --amend and a lower lr", ANEW)
            )


@torch.no_grad()
def evaluated(
    model: Transformer, evaluate: Callable[[Transformer], dict[str, float]]
) -> dict[str, float]:
    """`evaluate`'s numbers, their names marked as held-out."""
    return {f"eval_{name}": value for name, value in evaluate(model).items()}


@torch.no_grad()
def mean_loss(model: Transformer, batches: Sequence[Any], objective: Objective) -> dict[str, float]:
    """The objective's means over `batches`, all ranks' together, without gradients."""
    device = model.device
    sums: dict[str, Tensor] = {"weight": torch.zeros((), dtype=torch.float64, device=device)}
    for batch in batches:
        loss, extras = objective.loss(model, batch)
        sums["weight"] = sums["weight"] + objective.weight(batch)
        for name, value in {"loss": loss, **extras}.items():
            sums[name] = sums.get(name, 0.0) + value.double()
    stacked = parallel.all_sum(torch.stack(list(sums.values()))).tolist()
    means = dict(zip(sums, stacked, strict=True))
    weight = max(means.pop("weight"), 1e-12)
    return {name: value / weight for name, value in means.items()}
