"""PPO: raise the reward of the model's own answers without leaving the model they started from.

Paper section 3.2.3, Eq. 3 and 4. An iteration samples one answer to each prompt of a batch with
the policy as it is now (`rollout`), scores the answers (`rewards`), and makes one pass over them in
mini-batches of one gradient step each (`update`).

The paper does not say the following, so it is our choice: a critic of its own (a separate
network with its own optimizer, so its learning rate takes the place of a value coefficient), its
start, clipping and warm-up; gamma and lambda; KL per token (with gamma 1 the return's KL is that
of the whole answer); population statistics of the batch for whitening; whitened advantages; no
entropy bonus; what an answer without EOS is worth.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from puna.core import parallel, ranks
from puna.core.checkpoint.folder import open_model
from puna.core.errors import UserError
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.capacity import fitting
from puna.trainers.data.prompts import EncodedPrompt, common_tokenizer, draw, load_prompts
from puna.trainers.rl import early_stopping
from puna.trainers.rl.comparisons import write_rows
from puna.trainers.rl.config import (
    PPOConfig,
    check_reward,
    engine_of,
    frozen,
    open_reward_models,
    prompt_room,
    reward_paths,
)
from puna.trainers.rl.engine import Engine
from puna.trainers.rl.rewards import (
    Answer,
    Reward,
    RewardModels,
    Scores,
    score_answers,
    settle_unfinished,
)
from puna.trainers.rl.rollout import Rollout, as_answers, collect
from puna.trainers.rl.update import (
    Experience,
    Rates,
    Totals,
    make_experience,
    rollout_metrics,
    update,
)
from puna.trainers.train import loop
from puna.trainers.train.advice import ANEW, advice
from puna.trainers.train.command import command
from puna.trainers.train.interrupts import stop_requests
from puna.trainers.train.next_token import say
from puna.trainers.train.notice import notice
from puna.trainers.train.plan import Plan, check_shares, of_steps
from puna.trainers.train.progress import meter
from puna.trainers.train.run import Run, Trained, open_run

SHOWN = 8  # answers written to samples/ at a time
EVAL_ROUND = -1  # held-out answers are drawn with the same random numbers every time


class Stage(NamedTuple):
    """Everything an iteration needs besides its number."""

    config: PPOConfig
    policy: Trained
    critic: Trained
    reference: Transformer
    reward: Reward
    tokenizer: Tokenizer
    prompts: list[EncodedPrompt]
    eval_prompts: list[EncodedPrompt]
    engine: Engine | None
    plan: Plan  # whose rows are prompts


def run(config: PPOConfig, reward: Reward | None = None) -> Path:
    """Train, or continue, the run in `config.out`; returns the finished model's folder.

    `reward` scores answers in place of the reward models; without it Eq. 4 over
    `config.helpfulness` and `config.safety` does.
    """
    ranks.init()
    check(config)
    check_reward(config, reward)
    tokenizer_file = common_tokenizer(config.policy, *reward_paths(config))
    with open_run(config, tokenizer=tokenizer_file, given={"reward": reward}) as folder:
        if folder.done:
            return folder.final
        fitting.check("ppo", config, config.policy)
        stage = open_stage(config, folder, Tokenizer(tokenizer_file), reward)
        return train(stage, folder)


class Look(NamedTuple):
    """What the policy is like before an iteration's step."""

    experience: Experience
    answers: list[Answer]
    scores: Scores
    row: dict[str, float]


def train(stage: Stage, folder: Run) -> Path:
    """Iterate from the run's checkpoint to the end, or until it is time to stop."""
    config = stage.config
    loop.check_left(folder, config.iterations, "iterations")
    iteration = folder.resume_step()
    networks = {"model": stage.policy, "critic": stage.critic}
    folder.restore_optimizers(networks)
    if stage.eval_prompts and parallel.broadcast(not early_stopping.history(folder.metrics)):
        folder.log(0, **evaluate(stage))
    early_stopping.check_kept(folder, iteration)
    if iteration and (times := early_stopping.judged_anew(folder)):
        folder.log(iteration, anew=times, **(evaluate(stage) if stage.eval_prompts else {}))
        notice(
            f"{folder.path}: rewards are others from here on; the best policy is looked for anew"
        )
    bar = meter("ppo", config.iterations, start=iteration, unit="answers", show=parallel.is_main())
    with bar as progress, stop_requests(folder.path) as stop:
        while iteration < config.iterations:
            if stop():
                folder.save(iteration, networks, keep=config.keep)
                folder.settle()
                raise SystemExit(
                    f"stopped at iteration {iteration}; the same command continues {folder.path}"
                )
            found = look(stage, iteration)
            if reason := early_stopping.too_far(config, folder, found.row):
                folder.log(iteration + 1, **found.row)
                return early_stopping.give_best(folder, f"before iteration {iteration + 1}", reason)
            row = found.row | early_stopping.keep_if_best(
                config, folder, stage.policy.model, iteration, found.row
            )
            row |= learn(stage, folder, iteration, found)
            iteration += 1
            if stage.eval_prompts and iteration % config.eval_every == 0:
                row |= evaluate(stage)
            folder.log(iteration, **row)
            progress.advance(config.batch, f"reward {row['reward']:.3f} kl {row['kl']:.2f}")
            if reason := early_stopping.broken(config, folder):
                return early_stopping.give_best(folder, f"after iteration {iteration}", reason)
            if iteration % config.save_every == 0 and iteration < config.iterations:
                folder.save(iteration, networks, keep=config.keep)
        return finished(stage, folder, iteration)


def finished(stage: Stage, folder: Run, iteration: int) -> Path:
    """The model of a run that came to its end: the last policy, or the best one where that is what
    was asked for or the last is past the limit."""
    config = stage.config
    if config.patience or config.max_kl is not None:
        found = look(stage, iteration)
        if reason := early_stopping.too_far(config, folder, found.row):
            return early_stopping.give_best(folder, f"after iteration {iteration}", reason)
        if config.patience:
            early_stopping.keep_if_best(config, folder, stage.policy.model, iteration, found.row)
            return early_stopping.finish_with_best(folder)
    return folder.finish(stage.policy.model)


def check(config: PPOConfig) -> None:
    """ValueError for what a configuration cannot see by itself."""
    check_shares(config.minibatch, config.parallel.tp, "minibatch")
    if config.critic == "helpfulness" and config.helpfulness is None:
        raise ValueError(
            "the critic starts from the helpfulness model, and none is named; set "
            'critic to "policy"'
        )


def open_stage(
    config: PPOConfig, folder: Run, tokenizer: Tokenizer, reward: Reward | None
) -> Stage:
    """Load the networks and the prompts."""
    start = config.policy
    if config.critic == "helpfulness" and config.helpfulness is not None:
        start = config.helpfulness
    critic_options: dict[str, Any] = {"head": "score"}
    if folder.checkpoint is None:
        critic_options |= {"fresh_head": True, "seed": config.seed}
    policy = trained(open_model(folder.weights(config.policy), head="lm"), config)
    critic = trained(open_model(folder.weights(start, "critic"), **critic_options), config)
    tp = config.parallel.tp
    reference = frozen(config.policy, "lm", config, tp)
    contexts = [m.config.context for m in (policy.model, critic.model, reference)]
    if reward is None:
        reward = open_reward_models(config, tp)
    if isinstance(reward, RewardModels):
        contexts.append(reward.context)
    room = prompt_room(config, min(contexts))
    prompts, skipped = load_prompts(config.prompts, tokenizer, room, config)
    eval_prompts: list[EncodedPrompt] = []
    if config.eval_prompts:
        eval_prompts, unusable = load_prompts(config.eval_prompts, tokenizer, room, config)
        skipped.merge(unusable)
    say(skipped)
    held = eval_prompts[: config.eval_count]
    engine = engine_of(config, tokenizer)
    plan = of_steps(len(prompts), config.iterations, config.batch, folder)
    return Stage(config, policy, critic, reference, reward, tokenizer, prompts, held, engine, plan)


def trained(source: Any, config: PPOConfig) -> Trained:
    model = loop.load(source, config)
    return Trained(model, loop.make_optimizer(model, config))


def look(stage: Stage, iteration: int) -> Look:
    """Sample the iteration's answers and score them: nothing is changed yet."""
    config = stage.config
    began = time.monotonic()
    share = parallel.share(config.parallel.tp)
    picks = rank_prompts(config, stage.plan, iteration, *share)
    prompts = [stage.prompts[index] for index, _ in picks]
    rollout = sample(stage, prompts, [i for i, _ in picks], [e for _, e in picks], iteration)
    sampled = time.monotonic()
    check_finished(config, rollout)
    answers = as_answers(rollout.answers, rollout.finished.tolist(), prompts, stage.tokenizer)
    scores = score_answers(stage.reward, answers, rollout.lengths.device)
    experience = make_experience(stage.reference, stage.critic.model, rollout, scores.raw, config)
    row = rollout_metrics(experience, scores, stage.policy.model)
    row["seconds_sampling"] = sampled - began
    row["seconds_scoring"] = time.monotonic() - sampled
    return Look(experience, answers, scores, row)


def learn(stage: Stage, folder: Run, iteration: int, found: Look) -> dict[str, float]:
    """One pass of gradient steps over what was sampled; returns its part of the row of metrics."""
    config = stage.config
    began = time.monotonic()
    rates = learning_rates(config, iteration)
    row = update(stage.policy, stage.critic, found.experience, config, rates)
    norms = {
        f"gradient of the {name}": row[f"{name}_grad_norm"]
        for name in ("critic", "policy")
        if f"{name}_grad_norm" in row
    }
    loop.check_finite(folder, iteration + 1, **norms)
    if iteration % config.eval_every == 0:
        write_samples(folder, iteration, found.answers, found.scores)
    return row | {"lr": rates.policy or 0.0, "seconds_training": time.monotonic() - began}


def check_finished(config: PPOConfig, rollout: Rollout) -> None:
    """UserError where every answer of all ranks is masked out, so that nothing could be learned."""
    if config.unfinished == "mask" and not parallel.all_max(int(rollout.finished.any())):
        raise UserError(
            f"no answer of {config.batch} ends within max_new_tokens, so that all are masked; "
            + advice("amend", 'raise it (--amend), or set unfinished to "subtract"', ANEW)
        )


def learning_rates(config: PPOConfig, iteration: int) -> Rates:
    """Of policy and critic in this iteration."""
    rate = loop.learning_rate(iteration, config.iterations, config)
    critic = rate if config.critic_lr is None else rate * config.critic_lr / config.lr
    return Rates(None if iteration < config.critic_warmup else rate, critic)


def rank_prompts(
    config: PPOConfig, plan: Plan, iteration: int, rank: int, ranks: int
) -> list[tuple[int, int]]:
    """(prompt, epoch) of this rank's answers, mini-batch after mini-batch.

    The batch is the next stretch of the shuffled prompts, so its order is random already; each
    mini-batch is dealt to the ranks like cards.
    """
    first = plan.places(iteration).start
    return [
        draw(first + start + place, plan.rows, config.seed)
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
        stage.policy.model,
        [prompt.ids for prompt in prompts],
        prompt_ids=prompt_ids,
        sample_ids=sample_ids,
        max_new_tokens=stage.config.max_new_tokens,
        eos_id=stage.tokenizer.eos_ids,
        temperature=stage.config.temperature,
        seed=stage.config.seed,
        round_index=round_index,
        engine=stage.engine,
        max_tokens=stage.config.micro_batch_tokens,
        **stage.config.limits(),
    )


def evaluate(stage: Stage) -> dict[str, float]:
    """Mean reward of the policy on the held-out prompts: always the same prompts and draws."""
    config = stage.config
    rank, ranks = parallel.share(config.parallel.tp)
    numbers = range(rank, len(stage.eval_prompts), ranks)
    prompts = [stage.eval_prompts[i] for i in numbers]
    rollout = sample(stage, prompts, list(numbers), [0] * len(prompts), EVAL_ROUND)
    answers = as_answers(rollout.answers, rollout.finished.tolist(), prompts, stage.tokenizer)
    scores = score_answers(stage.reward, answers, rollout.lengths.device)
    totals = Totals(rollout.lengths.device)
    totals.add(
        "eval_reward",
        settle_unfinished(
            scores.raw, rollout.finished, config.unfinished, config.unfinished_penalty
        ),
    )
    for name, part in scores.parts.items():
        totals.add(f"eval_{name}", part)
    totals.add("eval_unfinished", (~rollout.finished).double())
    return totals.means()


def write_samples(folder: Run, iteration: int, answers: list[Answer], scores: Scores) -> None:
    """The first answers of an iteration with their scores, for people to read."""
    if not parallel.is_main():
        return
    target = folder.path / "samples" / f"step-{iteration:06d}.jsonl"
    target.parent.mkdir(exist_ok=True)
    rows = [
        {
            "messages": answer.messages,
            "answer": answer.text,
            "finished": answer.finished,
            "score": float(scores.raw[row]),
            "scores": {name: float(part[row]) for name, part in scores.parts.items()},
            "branch": next((b for b, taken in scores.branches.items() if taken[row]), None),
        }
        for row, answer in enumerate(answers[:SHOWN])
    ]
    write_rows(target, rows)


def main() -> int:
    return command("python -m puna.trainers.ppo", PPOConfig, run)


if __name__ == "__main__":
    sys.exit(main())
