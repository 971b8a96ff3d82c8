"""Rejection sampling: imitate the best of K of the model's own answers (paper section 3.2.3).

1. Sample K answers to each prompt from the newest model; score them with both reward models
   (Eq. 4's switch; raw scores, no whitening). `samples.jsonl`, appended as they come.
2. Keep the best finished answer to each prompt, over this round and the pools of earlier ones,
   which are scored again by today's reward models: `selected.jsonl`. This round's best few are
   `pool.jsonl`, for later rounds to choose from again.
3. Fine-tune on them as in SFT: the sampling model, or another one (a smaller student; the base
   or SFT model, since each version of the paper starts anew).

The paper does not say K, the number of prompts, the fine-tuning's learning rate or epochs; ours
are SFT's. Answers are trained on as the ids that were drawn, never tokenised again.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from puna.core import parallel
from puna.core.checkpoint.folder import open_model
from puna.core.documents import regular_file
from puna.core.text.chat import decode_answer, encode_dialogue, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.capacity import fitting
from puna.trainers.data.formats import Dialogue
from puna.trainers.data.packing import PackedRows
from puna.trainers.data.prompts import common_tokenizer, load_prompts
from puna.trainers.data.readers import Skipped
from puna.trainers.rl.best_of import (
    POOL,
    SAMPLES,
    SELECTED,
    Drawn,
    Sample,
    keep_best,
    read_drawn,
    read_samples,
)
from puna.trainers.rl.config import (
    BestOfConfig,
    ImitationConfig,
    check_reward,
    frozen,
    open_reward_models,
    prompt_room,
    reward_paths,
)
from puna.trainers.rl.rewards import Answer, Reward, RewardModels, score_answers
from puna.trainers.rl.sampling import drawing_at_best, sample_all, with_scores
from puna.trainers.sft import load_dialogues
from puna.trainers.train import loop, next_token, written
from puna.trainers.train.command import command
from puna.trainers.train.plan import of_epochs
from puna.trainers.train.run import Run, open_run
from puna.trainers.train.starting import open_start


@dataclass(kw_only=True)
class RejectionConfig(ImitationConfig, BestOfConfig):
    """Rejection-sampling fine-tuning (paper section 3.2.3)."""

    policy: Path
    """the newest chat model, which samples (paper: only the 70b)"""
    prompts: list[Path] = field(default_factory=list)
    """prompt files to sample from"""
    selected: Path | None = None
    """selected.jsonl of another run to train on: nothing is sampled (a smaller student)"""
    student: Path | None = None
    """model to fine-tune on the selected answers: a smaller one (paper: the 70b's answers train the
    others), or the base or SFT model to start a version anew; left out: the policy itself"""
    pools: list[Path] = field(default_factory=list)
    """pool.jsonl of earlier rounds (paper: of all of them, from V4 on)"""


def run(config: RejectionConfig, reward: Reward | None = None) -> Path:
    """Sample, select and train, or continue, in `config.out`; returns the finished model.

    `reward` scores answers in place of the reward models; without it Eq. 4 over
    `config.helpfulness` and `config.safety` does.
    """
    if config.selected is None:
        check_reward(config, reward)
    elif reward is not None or reward_paths(config):
        raise ValueError("selected answers are not scored again: leave the reward out")
    else:
        regular_file(config.selected, "no such file; name the selected.jsonl of a rejection run")
    student = config.student or config.policy
    tokenizer_file = common_tokenizer(config.policy, *reward_paths(config), student)
    tokenizer = Tokenizer(tokenizer_file)
    with open_run(config, tokenizer=tokenizer_file, given={"reward": reward}) as folder:
        return folder.final if folder.done else fit(config, folder, tokenizer, student, reward)


# Options that decide which answers are selected, and nothing afterwards.
OF_SAMPLING = (
    "prompts", "pools", "helpfulness", "safety", "combine", "safety_threshold", "round",
    "temperature", "temperatures", "max_new_tokens",
)  # fmt: skip


def fit(
    config: RejectionConfig,
    folder: Run,
    tokenizer: Tokenizer,
    student: Path,
    reward: Reward | None,
) -> Path:
    """What there is still to do in an open run."""
    fitting.check("rejection", config, config.policy)
    if student != config.policy:  # before anything is sampled
        fitting.check("sft", config, student)
        open_model(student, head="lm")
    selected = config.selected or folder.path / SELECTED
    if config.selected is None:
        parallel.on_main(lambda: written.check(folder.path, SELECTED, POOL))
    if parallel.broadcast(selected.exists()):
        folder.say_idle(OF_SAMPLING, "the answers are drawn and selected; selected.jsonl has them")
    else:
        reward = open_reward_models(config) if reward is None else reward
        select(config, folder, tokenizer, reward)
    return imitate("rejection", config, folder, tokenizer, student, selected)


def imitate(
    title: str,
    config: ImitationConfig,
    folder: Run,
    tokenizer: Tokenizer,
    start: Path,
    selected: Path,
) -> Path:
    """Stage 3: fine-tune `start` on the samples in `selected`, with `config.mix` dialogues."""
    source = open_start(folder, start, head="lm")
    row_tokens = next_token.row_length(config.row_tokens, source.config.context)
    mixed, skipped = load_dialogues(config.mix, config)
    pool = read_pool(selected, tokenizer, read_samples)
    rows = pack(tokenizer, pool, row_tokens, mixed, truncate=config.truncate)
    skipped.merge(rows.skipped)
    next_token.say(skipped)
    plan = of_epochs(len(rows), config.epochs, config.batch, folder)
    what = rows.described("answer")
    return next_token.train(title, folder, source, rows, config, plan=plan, what=what)


def pack(
    tokenizer: Tokenizer,
    selected: Sequence[Drawn],
    row_tokens: int,
    mixed: Sequence[Dialogue] = (),
    *,
    truncate: bool = False,
) -> PackedRows:
    """The selected answers, loss on the answer's tokens alone, and `mixed` dialogues, in rows."""
    sequences = [encode_dialogue(tokenizer, dialogue.messages) for dialogue in mixed]
    where = [dialogue.where for dialogue in mixed]
    where += [f"selected.jsonl:{number}" for number in range(1, len(selected) + 1)]
    for sample in selected:
        prompt = encode_prompt(tokenizer, sample["messages"])
        weights = [0.0] * len(prompt) + [1.0] * len(sample["tokens"])
        sequences.append((prompt + sample["tokens"], weights))
    return PackedRows(
        sequences,
        row_tokens,
        vocab_size=tokenizer.vocab_size,
        where=where,
        truncate=truncate,
    )


def select(config: RejectionConfig, folder: Run, tokenizer: Tokenizer, reward: Reward) -> None:
    """Stages 1 and 2: sample what is missing, score the pools again, write selected.jsonl."""
    load_dialogues(config.mix, config)  # what cannot be read is said before anything is sampled
    for path in config.pools:
        read_pool(path, tokenizer, read_drawn)
    policy = frozen(config.policy, "lm", config)
    context = policy.config.context
    if isinstance(reward, RewardModels):
        context = min(context, reward.context)
    prompts, skipped = load_prompts(config.prompts, tokenizer, prompt_room(config, context), config)
    drawing = drawing_at_best(folder.path, config, tokenizer, policy, prompts, reward)
    sample_all(folder.path / SAMPLES, drawing, tokenizer, policy, prompts, reward)
    pool = score_pool(config, tokenizer, reward, context, skipped)
    next_token.say(skipped)
    parallel.on_main(lambda: keep_best(folder.path, config, pool))


def read_pool(
    path: Path, tokenizer: Tokenizer, read: Callable[[Path], Sequence[Drawn]]
) -> Sequence[Drawn]:
    """The samples of a pool; ValueError where it has none, or was made with another
    tokenizer."""
    samples = read(path)
    if not samples:
        raise ValueError(f"{path}: there is no sample in it; leave it out")
    for number, sample in enumerate(samples, 1):
        if max(sample["tokens"]) >= tokenizer.vocab_size or (
            decode_answer(tokenizer, sample["tokens"]) != sample["answer"]
        ):
            raise ValueError(
                f"{path}:{number}: the ids do not spell the answer; this pool was made with "
                "another tokenizer: leave it out"
            )
    return samples


def score_pool(
    config: RejectionConfig,
    tokenizer: Tokenizer,
    reward: Reward,
    context: int,
    skipped: Skipped,
) -> list[Sample]:
    """The samples of earlier rounds under today's reward: only then do scores compare."""
    kept: list[Drawn] = []
    answers: list[Answer] = []
    for path in config.pools:
        for number, sample in enumerate(read_pool(path, tokenizer, read_drawn), 1):
            prompt = encode_prompt(tokenizer, sample["messages"])
            if len(prompt) + len(sample["tokens"]) > context:
                skipped.add(f"longer than the context of {context} tokens", f"{path}:{number}")
            else:
                kept.append(sample)
                answers.append(
                    Answer(
                        messages=sample["messages"],
                        text=sample["answer"],
                        prompt_ids=prompt,
                        ids=sample["tokens"],
                        finished=sample["finished"],
                        is_safety=sample["is_safety"],
                    )
                )
    if not kept:
        return []
    return with_scores(kept, score_answers(reward, answers, loop.device_of(config)))


def main() -> int:
    return command("python -m puna.trainers.rejection", RejectionConfig, run)


if __name__ == "__main__":
    sys.exit(main())
