"""Next-token training: the objective and the batches that pretraining, SFT, rejection sampling's
fine-tuning and GAtt share. They differ only in where rows and weights come from."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from puna.core import parallel, terminal
from puna.core.checkpoint.source import Source
from puna.core.model import Transformer
from puna.core.shared import of_wanted
from puna.trainers.data.packing import LMBatch
from puna.trainers.data.readers import Skipped
from puna.trainers.data.visits import rows_at
from puna.trainers.train import loop
from puna.trainers.train.plan import Plan, announce, check_shares
from puna.trainers.train.run import Run, Trained


class Rows(Protocol):
    """Packed rows: how many, and those with given indices as a batch."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> LMBatch: ...


OURS = {"step", "loss", "lr", "grad_norm", "tokens"}  # names in metrics.jsonl

Loss = Callable[[Transformer, LMBatch], tuple[Tensor, dict[str, Tensor]]]
"""(model, batch) -> (summed loss, further sums to log per weight, by name)"""


def next_token_loss(model: Transformer, batch: LMBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed weighted cross-entropy of the batch, nats."""
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, wanted=batch.wanted)
    targets, weights = (of_wanted(each, batch.wanted) for each in (batch.targets, batch.weights))
    return model.cross_entropy(hidden, targets, weights=weights, reduction="sum"), {}


def checked(loss: Loss) -> Loss:
    """`loss`, a user's own, which raises ValueError where it returns something else than a Loss."""

    def looked_at(model: Transformer, batch: LMBatch) -> tuple[Tensor, dict[str, Tensor]]:
        match loss(model, batch):
            case Tensor(ndim=0) as total, dict() as further if all(
                isinstance(value, Tensor) for value in further.values()
            ):
                if taken := sorted(OURS & set(further)):
                    raise ValueError(
                        f"the loss calls something it logs {taken[0]}, as the run does; give it "
                        "another name"
                    )
                return total, further
        raise ValueError(
            "the loss must return two things: the batch's summed loss, a tensor of one number, and "
            "a dict of further sums to log, tensors by name (it may be empty)"
        )

    return looked_at


OBJECTIVE = loop.Objective(
    loss=next_token_loss,
    weight=lambda batch: float(batch.weights.sum()),
    tokens=lambda batch: int((batch.weights != 0).any(1).sum()) * batch.tokens.shape[1],
)


def rank_part(indices: Sequence[int] | np.ndarray, tp: int = 1) -> tuple[list[int], int]:
    """(this rank's part of a global batch, how many of it count); `tp` neighbouring ranks have the
    same part.

    The parts are equally long, since every rank must take part in every forward pass: what is
    missing at the end is filled up with the first index, to count for nothing.
    """
    rank, ranks = parallel.share(tp)
    size = -(-len(indices) // ranks)
    first = rank * size
    mine = [int(index) for index in indices[first : first + size]]
    return mine + [int(indices[0])] * (size - len(mine)), len(mine)


def parts(
    indices: Sequence[int] | np.ndarray, size: int, tp: int = 1
) -> Iterator[tuple[list[int], int]]:
    """`rank_part` in pieces of at most `size`: (indices, how many of them count)."""
    mine, real = rank_part(indices, tp)
    for start in range(0, len(mine), size):
        piece = mine[start : start + size]
        yield piece, min(len(piece), max(0, real - start))


def counted(batch: LMBatch, real: int) -> LMBatch:
    """The batch with no weight on the rows after the first `real`."""
    if real == len(batch.weights):
        return batch
    weights = batch.weights.clone()
    weights[real:] = 0.0
    return batch._replace(weights=weights)


def to_device(batch: LMBatch, device: torch.device) -> LMBatch:
    return LMBatch(**{n: t.to(device) for n, t in batch._asdict().items() if t is not None})


Order = Callable[[range], np.ndarray]
"""Places among all visits -> indices of the rows that are visited there"""


def row_batches(
    rows: Rows,
    plan: Plan,
    micro_batch: int,
    seed: int,
    device: torch.device,
    order: Order | None = None,
    tp: int = 1,
) -> Callable[[int], list[LMBatch]]:
    """`batch_at` for `loop.fit`: step -> this rank's micro-batches of at most `micro_batch` rows.

    Epochs follow each other without a gap, each in a fresh order of (seed, epoch); or the rows
    come as `order` says.
    """

    def batch_at(step: int) -> list[LMBatch]:
        places = plan.places(step)
        chosen = rows_at(plan.rows, seed, places) if order is None else order(places)
        return [
            to_device(counted(rows.batch(piece), real), device)
            for piece, real in parts(chosen, micro_batch, tp)
        ]

    return batch_at


def evaluation(
    rows: Rows | None,
    micro_batch: int,
    device: torch.device,
    objective: loop.Objective = OBJECTIVE,
) -> Callable[[Transformer], dict[str, float]] | None:
    """`evaluate` for `loop.fit`: mean loss over all of `rows`; None without any."""
    if rows is None:
        return None

    def evaluate(model: Transformer) -> dict[str, float]:
        batches = [
            to_device(counted(rows.batch(piece), real), device)
            for piece, real in parts(range(len(rows)), micro_batch, parallel.tp_of(model))
        ]
        return loop.mean_loss(model, batches, objective)

    return evaluate


def train(
    title: str,
    run: Run,
    source: Source,
    rows: Rows,
    config: loop.RowsConfig,
    *,
    plan: Plan,
    what: str,
    eval_rows: Rows | None = None,
    eval_every: int = 0,
    loss: Loss = next_token_loss,
    order: Order | None = None,
) -> Path:
    """Fit the model of `source` to `rows`; returns the finished model's folder.

    `loss` is minimised on the rows and reported for `eval_rows` every `eval_every` steps, both per
    unit of weight; `what` says in words what the rows are; `order` which rows come when, where they
    are not shuffled anew in each epoch.
    """
    tp = config.parallel.tp
    check_shares(config.batch, tp)
    announce(title, what, plan, config, config.batch)
    device = loop.device_of(config)
    objective = OBJECTIVE._replace(loss=loss)
    return loop.fit(
        title,
        run,
        prepared(source, config),
        row_batches(rows, plan, config.micro_batch, config.seed, device, order, tp),
        plan.steps,
        objective,
        config,
        evaluation(eval_rows, config.micro_batch, device, objective),
        eval_every,
    )


def prepared(source: Source, config: loop.TrainConfig) -> Trained:
    """The model, sharded and so on as configured, with its optimizer."""
    model = loop.load(source, config)
    return Trained(model, loop.make_optimizer(model, config))


def row_length(asked: int, context: int) -> int:
    """Tokens in a training row: `asked`, or the model's context where it is 0."""
    if asked > context:
        raise ValueError(
            f"row_tokens {asked} exceeds the model's context of {context}; lower it, or train a "
            "model with a longer context"
        )
    return asked or context


def say(skipped: Skipped) -> None:
    """Print what was skipped and why."""
    if parallel.is_main() and skipped:
        terminal.say(skipped)
