"""PPO: raise the reward of the model's own answers without leaving the model they started from.

Paper section 3.2.3, Eq. 3 and 4. An iteration samples one answer to each prompt of a batch with
the policy as it is now, scores the answers (`rewards`), and makes one pass over them in
mini-batches of one gradient step each (`ppo_step`).

The paper does not say the following, so it is our choice: a critic of its own (a separate
network with its own optimizer, so its learning rate takes the place of a value coefficient), its
start, clipping and warm-up; gamma and lambda; KL per token (with gamma 1 the return's KL is that
of the whole answer); population statistics of the batch for whitening; whitened advantages; no
entropy bonus; what an answer without EOS is worth.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from puna.core import parallel
from puna.core.chat import decode_answer
from puna.core.checkpoint.folder import open_model
from puna.core.model import Transformer
from puna.core.tokenizer import Tokenizer
from puna.trainers.data.prompts import EncodedPrompt, common_tokenizer, draw, load_prompts
from puna.trainers.rl.early_stopping import (
    finish_with_best,
    history,
    is_best,
    save_best,
    stop_reason,
)
from puna.trainers.rl.rollout import Rollout, collect
from puna.trainers.rl.update import (
    Models,
    Scores,
    Settings,
    Totals,
    make_experience,
    rollout_metrics,
    score_answers,
    update,
)
from puna.trainers.train import loop
from puna.trainers.train.command import command
from puna.trainers.train.interrupts import stop_requests
from puna.trainers.train.progress import meter
from puna.trainers.train.ranges import Batch, Count, CountOrNone, Rate, Share, Temperature, Weight
from puna.trainers.train.run import Run, Trained

SHOWN = 8  # answers written to samples/ at a time
EVAL_ROUND = -1  # held-out answers are drawn with the same random numbers every time


@dataclass(kw_only=True)
class PPOConfig(loop.TrainConfig):
    """Proximal policy optimisation (paper section 3.2.3; its values are the defaults)."""

    policy: Path
    """model to start from, which is also the reference of the KL term"""
    helpfulness: Path
    """helpfulness reward model"""
    safety: Path
    """safety reward model"""
    prompts: list[Path]
    """prompt files to sample from"""
    eval_prompts: list[Path] = field(default_factory=list)
    """prompt files for held-out reward and early stopping"""
    iterations: Count = 400
    """rollouts (paper: 200-400, stopped early)"""
    batch: Batch = 512
    """answers per iteration, all ranks together (paper)"""
    minibatch: Batch = 64
    """answers per gradient step (paper)"""
    beta: Weight = 0.01
    """weight of KL (paper: 0.01 for 7b and 13b, 0.005 for 34b and 70b)"""
    ratio_clip: Rate = 0.2
    """half width of the interval around ratio 1 (paper)"""
    lr: float = 1e-6
    """constant (paper)"""
    schedule: Literal["cosine", "constant"] = "constant"
    critic_lr: Rate | None = None
    """the critic's learning rate; the policy's where left out"""
    critic: Literal["helpfulness", "policy"] = "helpfulness"
    """whose weights the critic starts from, with a fresh head"""
    critic_warmup: CountOrNone = 0
    """iterations at the beginning that train the critic alone"""
    value_clip: Rate | None = 0.2
    """how far a value may move since the rollout; in units of the whitened reward"""
    gamma: Share = 1.0
    """discount per token"""
    lam: Share = 0.95
    """of generalised advantage estimation"""
    temperature: Temperature = 1.0
    """of the answers; all log-probs are taken at it"""
    max_new_tokens: Count = 512
    """longest answer, tokens"""
    unfinished: Literal["keep", "subtract", "replace", "mask"] = "subtract"
    """an answer without EOS: keep its score; subtract the penalty; replace the score by minus
    the penalty; mask it out of loss and whitening"""
    unfinished_penalty: Weight = 1.0
    """in units of the raw score"""
    patience: CountOrNone = 0
    """stop after so many evaluations without a better held-out reward and take the best model; 0:
    go on to the end and take the last"""
    max_kl: Rate | None = None
    """stop when the mean KL of an answer, in nats, exceeds it"""
    eval_count: Count = 512
    """held-out prompts per evaluation"""
    micro_batch_tokens: Count = 16384
    """most tokens in one forward pass"""
    generation_batch: Batch = 256
    """answers sampled side by side"""
    ratio_tolerance: Rate = 1e-3
    """largest mean |log ratio| of an iteration's first mini-batch; about 2e-2 in bf16"""
    save_every: int = 20
    eval_every: int = 10

    def check(self) -> None:
        if self.batch % self.minibatch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of minibatch {self.minibatch}; "
                "one pass in equal gradient steps needs that"
            )
        if self.patience and not self.eval_prompts:
            raise ValueError("patience needs eval_prompts to look at; name some or set it to 0")


class Stage(NamedTuple):
    """Everything an iteration needs besides its number."""

    config: PPOConfig
    models: Models
    settings: Settings
    tokenizer: Tokenizer
    prompts: list[EncodedPrompt]
    eval_prompts: list[EncodedPrompt]


def run(config: PPOConfig) -> Path:
    """Train, or continue, the run in `config.out`; returns the finished model's folder."""
    check(config)
    tokenizer_file = common_tokenizer(config.policy, config.helpfulness, config.safety)
    folder = Run(config.out, config, tokenizer=tokenizer_file)
    if folder.done:
        return folder.final
    iteration = folder.resume_step()
    stage = open_stage(config, folder, Tokenizer(tokenizer_file))
    networks = {
        "model": Trained(stage.models.policy, loop.make_optimizer(stage.models.policy, config)),
        "critic": Trained(stage.models.critic, loop.make_optimizer(stage.models.critic, config)),
    }
    folder.restore_optimizers(networks)
    if stage.eval_prompts and parallel.broadcast(not history(folder.metrics)):
        if config.patience:
            save_best(folder, stage.models.policy)  # it may stay the best
        folder.log(0, **evaluate(stage))
    bar = meter("ppo", config.iterations, start=iteration, unit="answers", show=parallel.is_main())
    with bar as progress, stop_requests() as stop:
        while iteration < config.iterations:
            if parallel.all_max(int(stop())):
                folder.save(iteration, networks, keep=config.keep)
                raise SystemExit(
                    f"stopped at iteration {iteration}; the same command continues {folder.path}"
                )
            row = train_iteration(stage, folder, networks, iteration)
            iteration += 1
            if stage.eval_prompts and iteration % config.eval_every == 0:
                row |= evaluate(stage)
            folder.log(iteration, **row)
            progress.advance(config.batch, f"reward {row['reward']:.3f} kl {row['kl']:.2f}")
            if ended(config, folder, stage.models.policy):
                break
            if iteration % config.save_every == 0 and iteration < config.iterations:
                folder.save(iteration, networks, keep=config.keep)
    return finish_with_best(folder) if config.patience else folder.finish(stage.models.policy)


def ended(config: PPOConfig, folder: Run, policy: Transformer) -> bool:
    """Whether to stop after the iteration just logged; keeps the policy where it is the best."""
    rows = history(folder.metrics) if parallel.is_main() else []
    best = parallel.broadcast(bool(config.patience) and parallel.is_main() and is_best(rows))
    if best:
        save_best(folder, policy)
    reason = None
    if parallel.is_main():
        reason = stop_reason(rows, config.patience, config.max_kl)
    reason = parallel.broadcast(reason)
    if reason and parallel.is_main():
        print(f"ppo: stopped after iteration {rows[-1]['step']}: {reason}")
    return reason is not None


def check(config: PPOConfig) -> None:
    """ValueError for a size that the processes cannot share."""
    ranks = parallel.world_size()
    if config.minibatch % ranks:
        raise ValueError(f"minibatch {config.minibatch} must be a multiple of the {ranks} ranks")


def open_stage(config: PPOConfig, folder: Run, tokenizer: Tokenizer) -> Stage:
    """Load the five networks and the prompts."""
    start = config.policy if config.critic == "policy" else config.helpfulness
    critic_options: dict[str, Any] = {"head": "score"}
    if folder.latest() is None:
        critic_options |= {"fresh_head": True, "seed": config.seed}

    def opened(path: Path, **options: Any) -> Transformer:
        return loop.load(open_model(path, **options), config)

    def frozen(path: Path, head: str) -> Transformer:
        return opened(path, head=head).requires_grad_(False)

    models = Models(
        policy=opened(folder.weights(config.policy), head="lm"),
        critic=opened(folder.weights(start, "critic"), **critic_options),
        reference=frozen(config.policy, "lm"),
        helpfulness=frozen(config.helpfulness, "score"),
        safety=frozen(config.safety, "score"),
    )
    room = min(model.config.context for model in models) - config.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in the models' "
            f"context of {room + config.max_new_tokens}; lower it"
        )
    prompts, skipped = load_prompts(config.prompts, tokenizer, room)
    held: list[EncodedPrompt] = []
    if config.eval_prompts:
        held, unusable = load_prompts(config.eval_prompts, tokenizer, room)
        skipped.merge(unusable)
    if skipped and parallel.is_main():
        print(skipped)
    return Stage(
        config,
        models,
        settings_of(config),
        tokenizer,
        prompts,
        held[: config.eval_count],
    )


def settings_of(config: PPOConfig) -> Settings:
    return Settings(
        beta=config.beta,
        gamma=config.gamma,
        lam=config.lam,
        clip=config.ratio_clip,
        value_clip=config.value_clip,
        temperature=config.temperature,
        unfinished=config.unfinished,
        unfinished_penalty=config.unfinished_penalty,
        minibatches=config.batch // config.minibatch,
        ratio_tolerance=config.ratio_tolerance,
        max_tokens=config.micro_batch_tokens,
        all_sum=parallel.all_sum,
        all_max=parallel.all_max,
    )


def train_iteration(
    stage: Stage, folder: Run, networks: dict[str, Trained], iteration: int
) -> dict[str, float]:
    """Sample, score, one pass of gradient steps; returns the row of metrics."""
    config = stage.config
    began = time.monotonic()
    picks = share(config, len(stage.prompts), iteration, parallel.rank(), parallel.world_size())
    prompts = [stage.prompts[index] for index, _ in picks]
    rollout = sample(stage, prompts, [i for i, _ in picks], [e for _, e in picks], iteration)
    sampled = time.monotonic()
    scores = score_answers(stage.models, rollout, is_safety(prompts), stage.settings)
    experience = make_experience(stage.models, rollout, scores, stage.settings)
    row = rollout_metrics(experience, scores, stage.settings.all_sum)
    judged = time.monotonic()
    rate = loop.learning_rate(iteration, config.iterations, config)

    def step(name: str, rate: float) -> float:
        norm = loop.step_optimizer(networks[name], rate, config.clip)
        loop.check_finite(folder, iteration + 1, **{f"gradient of the {name}": norm})
        return norm

    critic_rate = rate if config.critic_lr is None else rate * config.critic_lr / config.lr
    warm = iteration < config.critic_warmup
    row |= update(
        stage.models,
        experience,
        stage.settings,
        lambda: step("critic", critic_rate),
        None if warm else lambda: step("model", rate),
    )
    if iteration % config.eval_every == 0:
        write_samples(stage, folder, iteration, prompts, rollout, scores)
    ended = time.monotonic()
    return row | {
        "lr": 0.0 if warm else rate,
        "seconds_sampling": sampled - began,
        "seconds_scoring": judged - sampled,
        "seconds_training": ended - judged,
    }


def share(
    config: PPOConfig, count: int, iteration: int, rank: int, ranks: int
) -> list[tuple[int, int]]:
    """(prompt, epoch) of this rank's answers, mini-batch after mini-batch.

    The batch is the next stretch of the shuffled prompts, so its order is random already; each
    mini-batch is dealt to the ranks like cards.
    """
    first = iteration * config.batch
    return [
        draw(first + start + place, count, config.seed)
        for start in range(0, config.batch, config.minibatch)
        for place in range(rank, config.minibatch, ranks)
    ]


def sample(
    stage: Stage,
    prompts: list[EncodedPrompt],
    prompt_ids: list[int],
    sample_ids: list[int],
    round_index: int,
) -> Rollout:
    """Answers of the policy as it is now."""
    return collect(
        stage.models.policy,
        [prompt.ids for prompt in prompts],
        prompt_ids=prompt_ids,
        sample_ids=sample_ids,
        max_new_tokens=stage.config.max_new_tokens,
        eos_id=stage.tokenizer.eos_id,
        temperature=stage.config.temperature,
        seed=stage.config.seed,
        round_index=round_index,
        batch_size=stage.config.generation_batch,
    )


def is_safety(prompts: list[EncodedPrompt]) -> torch.Tensor:
    return torch.tensor([prompt.is_safety for prompt in prompts], dtype=torch.bool)


def evaluate(stage: Stage) -> dict[str, float]:
    """Mean reward of the policy on the held-out prompts: always the same prompts and draws."""
    numbers = range(parallel.rank(), len(stage.eval_prompts), parallel.world_size())
    prompts = [stage.eval_prompts[i] for i in numbers]
    rollout = sample(stage, prompts, list(numbers), [0] * len(prompts), EVAL_ROUND)
    scores = score_answers(stage.models, rollout, is_safety(prompts), stage.settings)
    totals = Totals(rollout.lengths.device)
    totals.add("eval_reward", scores.settled)
    totals.add("eval_helpfulness", scores.helpfulness)
    totals.add("eval_safety", scores.safety)
    totals.add("eval_unfinished", (~rollout.finished).double())
    return totals.means(stage.settings.all_sum)


def write_samples(
    stage: Stage,
    folder: Run,
    iteration: int,
    prompts: list[EncodedPrompt],
    rollout: Rollout,
    scores: Scores,
) -> None:
    """The first answers of an iteration with their scores, for people to read."""
    if not parallel.is_main():
        return
    target = folder.path / "samples" / f"step-{iteration:06d}.jsonl"
    target.parent.mkdir(exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for row, prompt in enumerate(prompts[:SHOWN]):
            document = {
                "messages": prompt.messages,
                "answer": decode_answer(stage.tokenizer, rollout.answers[row]),
                "finished": bool(rollout.finished[row]),
                "helpfulness": float(scores.helpfulness[row]),
                "safety": float(scores.safety[row]),
                "from_safety": bool(scores.combined.from_safety[row]),
            }
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def main() -> None:
    sys.exit(command("python -m puna.trainers.ppo", PPOConfig, run))


if __name__ == "__main__":
    main()
