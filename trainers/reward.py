"""Reward models: a scalar head on a chat model, trained on comparisons (paper section 3.2.2).

The score is read at the last token of the dialogue, EOS included. Loss: Eq. 2, with the margin
m(r) of Table 27; for the safety model, the auxiliary loss of `losses.safety_loss` besides.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from puna.core import parallel
from puna.core.checkpoint.folder import open_source, tokenizer_path
from puna.core.checkpoint.source import Source
from puna.core.documents import count_of
from puna.core.model import Transformer
from puna.core.terminal import say
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.capacity import fitting
from puna.trainers.data.columns import ReadingComparisons
from puna.trainers.data.formats import Preference
from puna.trainers.data.mix import MixShare, mixed
from puna.trainers.data.packing import (
    Pair,
    PairBatch,
    encode_held_out,
    encode_pairs,
    levels,
    pair_batch,
    unlabelled,
)
from puna.trainers.data.readers import Skipped, read_preferences
from puna.trainers.data.split import also_learned, opening, split, split_batches
from puna.trainers.data.visits import rows_at
from puna.trainers.rl.accuracy import (
    Share,
    accuracies,
    baselines,
    by_batch,
    sentences,
    shares,
)
from puna.trainers.rl.losses import MARGINS, ranking_loss, safety_loss
from puna.trainers.rl.rewards import check_finite
from puna.trainers.train import loop, next_token
from puna.trainers.train.command import command
from puna.trainers.train.kinds import FIXED
from puna.trainers.train.plan import announce, check_shares, of_epochs
from puna.trainers.train.ranges import Count, CountOrZero, ShareOf, Weight
from puna.trainers.train.run import Run, open_run
from puna.trainers.train.starting import open_start


@dataclass(kw_only=True)
class RewardConfig(loop.HeldOutConfig, ReadingComparisons):
    """Train a reward model on comparisons of two answers."""

    model: Path
    """chat model to start from (paper: so that it knows what the policy knows), or a reward model
    to go on with"""
    data: list[Path]
    """files of comparisons"""
    mix: list[Path] = field(default_factory=list)
    """comparisons to train on besides: public ones, or those of the other reward model"""
    mix_share: MixShare | None = None
    """share of all pairs trained on that are drawn from `mix`, none of them twice (paper: 0.5 for
    helpfulness, 0.1 for safety); left out: all of `mix`"""
    eval_data: list[Path] = field(default_factory=list)
    """comparisons for the held-out accuracy; left out: a share of `data`"""
    eval_share: Annotated[float, ShareOf(), FIXED] = 0.05
    """share of `data` kept for the held-out accuracy, where no file is given"""
    eval_per_batch: Annotated[CountOrZero, FIXED] = 0
    """instead: so many rows of each batch of `data`, at most half of it (paper: 1,000 of each
    week's); the accuracy is told by batch"""
    truncate: bool = False
    """cut comparisons with a side longer than the model's context, whose answers then lose their
    end; off: they are skipped"""
    margin: Literal["none", "small", "large"] = "small"
    """m(r) of Table 27 (which one the final models used is not said)"""
    safety_weight: Weight = 0.0
    """weight of the safety auxiliary loss, ours: the paper gives neither formula nor weight"""
    center_weight: Weight = 0.0
    """weight of the squared mean score of a pair, ours: Eq. 4 cuts at sigma(r) = 0.15 and lets
    scores of both models compete, but the ranking loss leaves each one's zero point free"""
    epochs: Count = 1
    """passes over the data (paper: 1, more overfits)"""
    lr: float = 1e-5
    """peak (paper: 5e-6 for 70b, 1e-5 for the others)"""
    batch: int = 512
    """pairs in a step, all processes together (paper: 512)"""
    micro_batch: int = 64
    """pairs in one forward pass"""
    warmup_steps: int = 0
    """0: 3% of the steps, at least 5 (paper)"""

    def check(self) -> None:
        if self.eval_per_batch and self.eval_data:
            raise ValueError("eval_data is held out already: leave eval_per_batch or it out")


def run(config: RewardConfig) -> Path:
    """Train, or continue, the run in `config.out`; returns the finished model's folder.

    At the end the held-out accuracy is printed with its 95% interval.
    """
    tokenizer_file = tokenizer_path(config.model)
    with open_run(config, tokenizer=tokenizer_file) as folder:
        return folder.final if folder.done else fit(config, folder, Tokenizer(tokenizer_file))


def fit(config: RewardConfig, folder: Run, tokenizer: Tokenizer) -> Path:
    """What there is still to do in an open run."""
    source = start_model(config, folder)
    pairs, held = load_pairs(config, tokenizer, source.config.context)
    longest = max(-(-(len(pair.chosen) + len(pair.rejected)) // 2) for pair in pairs)
    fitting.check("reward", config, replace(source.config, context=longest))
    tp = config.parallel.tp
    check_shares(config.batch, tp)
    plan = of_epochs(len(pairs), config.epochs, config.batch, folder)
    if config.warmup_steps == 0:
        config = replace(config, warmup_steps=min(plan.steps - 1, warmup(plan.steps)))
    announce("reward", count_of(len(pairs), "pair"), plan, config, config.batch)
    device = loop.device_of(config)
    margins = MARGINS[config.margin]

    def batch_at(step: int) -> list[PairBatch]:
        chosen = rows_at(len(pairs), config.seed, plan.places(step))
        share = labelled_share([pairs[i] for i in chosen])
        return [
            pairs_on(device, [pairs[i] for i in piece], margins, real, share)
            for piece, real in next_token.parts(chosen, config.micro_batch, tp)
        ]

    network = next_token.prepared(source, config)
    scored: list[Tensor] = []  # the held-out pairs' scores, as the run goes on
    final = loop.fit(
        "reward",
        folder,
        network,
        batch_at,
        plan.steps,
        objective(config.safety_weight, config.center_weight),
        config,
        evaluation(held, config, device, scored.append),
        config.eval_every,
    )
    if held:
        # The last are those after the last step; there are none where a kill came behind that.
        scores = (
            scored[-1] if scored else scores_of(network.model, held, config.micro_batch, device)
        )
        if parallel.is_main():
            say(sentences(held_out_shares(scores, held), "held-out accuracy"))
    return final


def held_out_shares(scores: Tensor, held: Sequence[Pair]) -> dict[str, Share]:
    """Accuracy of all, by rating and, where there are several, by batch; then what needs no model.
    scores: (P, 2), chosen and rejected."""
    batches = {f"batch {each.batch}": each.right for each in by_batch(scores, held)}
    found = shares(scores[:, 0] - scores[:, 1], levels(held), held)
    return found | (batches if len(batches) > 1 else {}) | baselines(held)


def warmup(steps: int) -> int:
    """Steps of warm-up where none are asked for (paper: 3%, at least 5)."""
    return max(5, round(0.03 * steps))


def start_model(config: RewardConfig, folder: Run) -> Source:
    """The chat model with a fresh score head, or the reward model given to go on with."""
    is_score = open_source(folder.weights(config.model)).head == "score"
    return open_start(folder, config.model, head="score", fresh_head=not is_score, seed=config.seed)


def load_pairs(
    config: RewardConfig, tokenizer: Tokenizer, context: int
) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs); what was skipped is printed."""
    rows, skipped = load_preferences(config.data, config)
    held_rows: list[Preference] = []
    if config.eval_data:
        held_rows, unusable = load_preferences(config.eval_data, config)
        skipped.merge(unusable)
        skipped.notes += also_learned(rows, held_rows, said)
    elif config.eval_per_batch:
        rows, held_rows = split_batches(
            rows, config.eval_per_batch, config.seed, begins, lambda row: row.batch
        )
    elif config.eval_share > 0:
        rows, held_rows = split(rows, config.eval_share, config.seed, begins)
    cut = config.truncate
    pairs, over_long = encode_pairs(tokenizer, rows, context, truncate=cut)
    skipped.merge(over_long)
    held: list[Pair] = []
    if held_rows:
        held, over_long = encode_held_out(tokenizer, held_rows, context, truncate=cut)
        skipped.merge_held_out(over_long)
    if config.mix:
        rows, unusable = load_preferences(config.mix, config)
        others, over_long = encode_pairs(tokenizer, rows, context, truncate=cut)
        skipped.merge(unusable)
        skipped.merge(over_long)
        share, seed = config.mix_share, config.seed
        pairs = mixed(pairs, others, held, share, seed, lambda pair: pair.prompt, skipped)
    if config.safety_weight > 0 and not any(pair.safety for pair in pairs):
        raise ValueError(
            f"safety_weight is {config.safety_weight:g} and none of "
            f"{count_of(len(pairs), 'pair')} has a "
            "safety label; name their column in [columns], or set it to 0"
        )
    skipped.notes += unlabelled(pairs, config.margin, config.safety_weight)
    next_token.say(skipped)
    return pairs, held


def said(row: Preference) -> str:
    """What makes two comparisons the same, whoever won."""
    return json.dumps([row.messages, sorted((row.chosen, row.rejected))])


def begins(row: Preference) -> str:
    """What stays on one side of what is held out: all comparisons under one first message."""
    return opening(row.messages)


def load_preferences(
    paths: list[Path], how: ReadingComparisons | None = None
) -> tuple[list[Preference], Skipped]:
    """All usable comparisons of the files, and what was skipped."""
    rows: list[Preference] = []
    skipped = Skipped()
    for path in paths:
        found, unusable = read_preferences(path, how)
        rows += found
        skipped.merge(unusable)
    return rows, skipped


def labelled_share(pairs: Sequence[Pair]) -> float:
    """Share of a step's pairs, those of all ranks, that have a safety label; 1 where none has."""
    labelled = sum(pair.safety is not None for pair in pairs)
    return labelled / len(pairs) if labelled else 1.0


def pairs_on(
    device: torch.device,
    pairs: Sequence[Pair],
    margins: dict[str, float],
    real: int,
    labelled: float = 1.0,
) -> PairBatch:
    """Pairs as one batch, of which the first `real` count. `labelled` is the share of the whole
    step's pairs that have a safety label: the auxiliary loss is the mean over those. (Over all
    pairs, one labelled of ten would count a tenth of what its weight says.)"""
    batch = pair_batch(pairs, margins)
    batch.weights[real:] = 0.0
    batch.safety_weights[2 * real :] = 0.0
    batch.safety_weights.div_(labelled)
    return batch.to(device)


def pair_scores(model: Transformer, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), both (P,): each dialogue's score at its last token."""
    hidden = model(
        batch.tokens, batch.positions, batch.cu_seqlens, shared=batch.shared, wanted=batch.last
    )
    scores = model.logits(hidden[0])[:, 0]
    return scores[0::2], scores[1::2]


def objective(safety_weight: float, center_weight: float = 0.0) -> loop.Objective:
    """Eq. 2 a pair, plus the weighted mean of the auxiliary loss of its two answers, plus the
    weighted square of its mean score."""

    def loss(model: Transformer, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = pair_scores(model, batch)
        each = batch.weights
        ranking = (ranking_loss(chosen, rejected, batch.margins) * each).sum()
        extras = {"accuracy": ((chosen > rejected).float() * each).sum()}
        total = ranking
        if safety_weight > 0:
            scores = torch.stack((chosen, rejected), 1).flatten()
            safety = 0.5 * (safety_loss(scores, batch.safe) * batch.safety_weights).sum()
            total = total + safety_weight * safety
            extras |= {"ranking_loss": ranking, "safety_loss": safety}
        if center_weight > 0:
            middle = 0.5 * (chosen + rejected)
            total = total + center_weight * (middle.square() * each).sum()
        return total, extras

    return loop.Objective(
        loss=loss,
        weight=lambda batch: float(batch.weights.sum()),
        tokens=lambda batch: int(
            (batch.cu_seqlens.diff().view(-1, 2).sum(1) * batch.weights).sum()
        ),
    )


@torch.no_grad()
def scores_of(
    model: Transformer,
    pairs: Sequence[Pair],
    micro_batch: int,
    device: torch.device,
    called: str = "the reward model",
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """(P, 2) on the CPU: the raw scores of the chosen and the rejected answer, for `pairs` in
    order. Each rank scores its part, and all of them learn all scores. `advance` is told of every
    forward pass, and of how many pairs it was.

    Raises RuntimeError, of the model as `called`, where a score is not finite.
    """
    if not pairs:
        return torch.empty(0, 2)
    own: list[list[float]] = []
    tp = parallel.tp_of(model)
    for indices, real in next_token.parts(range(len(pairs)), micro_batch, tp):
        piece = [pairs[index] for index in indices]
        batch = pairs_on(device, piece, MARGINS["none"], len(piece))
        own += torch.stack(pair_scores(model, batch), 1)[:real].tolist()
        advance(len(piece))
    scores = torch.tensor([row for part in parallel.gather(own)[::tp] for row in part])
    check_finite(called, scores, "pair")
    return scores


def margins_of(
    model: Transformer,
    pairs: Sequence[Pair],
    micro_batch: int,
    device: torch.device,
    called: str = "the reward model",
) -> tuple[Tensor, Tensor]:
    """(r_chosen - r_rejected, rating index), both (P,) on the CPU, for `pairs` in order.

    Raises RuntimeError as `scores_of` does.
    """
    scores = scores_of(model, pairs, micro_batch, device, called)
    return scores[:, 0] - scores[:, 1], levels(pairs)


def evaluation(
    held: list[Pair],
    config: RewardConfig,
    device: torch.device,
    keep: Callable[[Tensor], None] = lambda scores: None,
) -> Callable[[Transformer], dict[str, float]] | None:
    """Held-out accuracy by rating, for `loop.fit`; `keep` is given the scores behind it."""
    if not held:
        return None

    def evaluate(model: Transformer) -> dict[str, float]:
        scores = scores_of(model, held, config.micro_batch, device)
        keep(scores)
        found = accuracies(scores[:, 0] - scores[:, 1], levels(held))
        return {f"accuracy_{name}" if name != "all" else "accuracy": v for name, v in found.items()}

    return evaluate


def main() -> int:
    return command("python -m puna.trainers.reward", RewardConfig, run)


if __name__ == "__main__":
    sys.exit(main())
