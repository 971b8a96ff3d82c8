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

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from puna.core import parallel
from puna.core.chat import decode_answer, encode_dialogue, encode_prompt
from puna.core.checkpoint.atomic import atomic_file, write_text
from puna.core.model import Transformer
from puna.core.tokenizer import Tokenizer
from puna.trainers.data.formats import Columns, Dialogue
from puna.trainers.data.packing import PackedRows
from puna.trainers.data.prompts import EncodedPrompt, common_tokenizer, load_prompts
from puna.trainers.data.readers import Skipped
from puna.trainers.rl.best_of import (
    Sample,
    best_few,
    best_of,
    is_usable,
    read_samples,
    reward_curve,
    why_none,
    write_samples,
)
from puna.trainers.rl.chunks import append_chunks
from puna.trainers.rl.config import (
    ImitationConfig,
    SamplingConfig,
    check_reward,
    frozen,
    open_reward_models,
    prompt_room,
    reward_paths,
)
from puna.trainers.rl.rewards import Answer, Reward, RewardModels, Scores, score_answers
from puna.trainers.rl.rollout import as_answers, collect
from puna.trainers.sft import load_dialogues
from puna.trainers.train import loop, next_token, written
from puna.trainers.train.command import command
from puna.trainers.train.kinds import FIXED
from puna.trainers.train.plan import of_epochs
from puna.trainers.train.ranges import Batch, Count, Temperature
from puna.trainers.train.run import Run, open_run, open_start


@dataclass(kw_only=True)
class RejectionConfig(ImitationConfig, SamplingConfig):
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
    pool_samples: Annotated[Count, FIXED] = 4
    """best answers to a prompt that are handed on in pool.jsonl: later reward models may prefer
    another than today's"""
    round: Count = 1
    """number of this RLHF version; part of the random numbers"""
    samples: Annotated[Batch, FIXED] = 20
    """K, answers to each prompt (paper: not said; its Fig. 26 uses 20)"""
    temperature: Temperature = 1.2
    """of the answers (paper: 1.2 to 1.3 is best for its RLHF model; tune it for every version)"""
    chunk: Annotated[Batch, FIXED] = 64
    """prompts sampled and scored at a time, all processes together; an interruption loses at most
    one chunk"""


def run(config: RejectionConfig, reward: Reward | None = None) -> Path:
    """Sample, select and train, or continue, in `config.out`; returns the finished model.

    `reward` scores answers in place of the reward models; without it Eq. 4 over
    `config.helpfulness` and `config.safety` does.
    """
    if config.selected is None:
        check_reward(config, reward)
    elif reward is not None or reward_paths(config):
        raise ValueError("selected answers are not scored again: leave the reward out")
    student = config.student or config.policy
    tokenizer_file = common_tokenizer(config.policy, *reward_paths(config), student)
    tokenizer = Tokenizer(tokenizer_file)
    with open_run(config, tokenizer=tokenizer_file, given={"reward": reward}) as folder:
        return folder.final if folder.done else fit(config, folder, tokenizer, student, reward)


# Options that decide which answers are selected, and nothing afterwards.
OF_SAMPLING = (
    "prompts", "pools", "helpfulness", "safety", "combine", "safety_threshold", "round",
    "temperature", "max_new_tokens",
)  # fmt: skip


def fit(
    config: RejectionConfig,
    folder: Run,
    tokenizer: Tokenizer,
    student: Path,
    reward: Reward | None,
) -> Path:
    """What there is still to do in an open run."""
    selected = config.selected or folder.path / "selected.jsonl"
    if config.selected is None:
        parallel.on_main(lambda: written.check(folder.path, "selected.jsonl", "pool.jsonl"))
    if parallel.broadcast(selected.exists()):
        folder.say_idle(OF_SAMPLING, "the answers are drawn and selected; selected.jsonl has them")
    else:
        reward = open_reward_models(config) if reward is None else reward
        select(config, folder, tokenizer, selected, reward)
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
    mixed, skipped = load_dialogues(config.mix, Columns())
    rows = pack(tokenizer, read_pool(selected, tokenizer), row_tokens, mixed)
    skipped.merge(rows.skipped)
    next_token.say(skipped)
    plan = of_epochs(len(rows), config.epochs, config.batch)
    what = rows.described("answers")
    return next_token.train(title, folder, source, rows, config, plan=plan, what=what)


def pack(
    tokenizer: Tokenizer,
    selected: Sequence[Sample],
    row_tokens: int,
    mixed: Sequence[Dialogue] = (),
) -> PackedRows:
    """The selected answers, loss on the answer's tokens alone, and `mixed` dialogues, in rows."""
    sequences = [encode_dialogue(tokenizer, dialogue.messages) for dialogue in mixed]
    where = [dialogue.where for dialogue in mixed]
    where += [f"selected.jsonl:{number}" for number in range(1, len(selected) + 1)]
    for sample in selected:
        prompt = encode_prompt(tokenizer, sample["messages"])
        weights = [0.0] * len(prompt) + [1.0] * len(sample["tokens"])
        sequences.append((prompt + sample["tokens"], weights))
    return PackedRows(sequences, row_tokens, vocab_size=tokenizer.vocab_size, where=where)


def select(
    config: RejectionConfig, folder: Run, tokenizer: Tokenizer, selected: Path, reward: Reward
) -> None:
    """Stages 1 and 2: sample what is missing, score the pools again, write `selected`."""
    policy = frozen(config.policy, "lm", config)
    context = policy.config.context
    if isinstance(reward, RewardModels):
        context = min(context, reward.context)
    prompts, skipped = load_prompts(config.prompts, tokenizer, prompt_room(config, context))
    sample_all(config, folder, tokenizer, policy, reward, prompts)
    pool = score_pool(config, tokenizer, reward, context, skipped)
    next_token.say(skipped)
    parallel.on_main(lambda: keep_best(config, folder, pool, selected))


def keep_best(config: RejectionConfig, folder: Run, pool: list[Sample], selected: Path) -> None:
    """Write `selected` and the pool. ValueError where no sample can be kept: they are removed, so
    that others can be drawn under other options."""
    sampled = folder.path / "samples.jsonl"
    fresh = read_samples(sampled)
    kept = best_of([*fresh, *pool])
    if not kept:
        sampled.unlink()
        written.forget(folder.path, sampled.name)
        raise ValueError(why_none(fresh))
    found = json.dumps(summary(fresh, kept, config.samples), indent=2) + "\n"
    write_text(folder.path / "selection.json", found)
    for path, rows in (
        (folder.path / "pool.jsonl", best_few(fresh, config.pool_samples)),
        (selected, kept),  # last: where it stands, all of this is done
    ):
        with atomic_file(path) as partial:
            write_samples(partial, rows, mode="w")
        written.note(folder.path, path.name)


def sample_all(
    config: RejectionConfig,
    folder: Run,
    tokenizer: Tokenizer,
    policy: Transformer,
    reward: Reward,
    prompts: list[EncodedPrompt],
) -> None:
    """K scored answers a prompt in samples.jsonl."""

    def draw(numbers: Sequence[int]) -> list[Sample]:
        return sample_chunk(config, tokenizer, policy, reward, prompts, numbers)

    asked = [prompt.messages for prompt in prompts]
    append_chunks("sampling", folder.path, asked, config.chunk, config.samples, draw)


def sample_chunk(
    config: RejectionConfig,
    tokenizer: Tokenizer,
    policy: Transformer,
    reward: Reward,
    prompts: list[EncodedPrompt],
    numbers: Sequence[int],
) -> list[Sample]:
    """K answers to each of the prompts with these numbers, scored."""
    rows = [(number, k) for number in numbers for k in range(config.samples)]
    rollout = collect(
        policy,
        [prompts[number].ids for number, _ in rows],
        prompt_ids=[number for number, _ in rows],
        sample_ids=[k for _, k in rows],
        max_new_tokens=config.max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=config.temperature,
        seed=config.seed,
        round_index=config.round,
        batch_size=config.generation_batch,
    )
    answers = as_answers(rollout, [prompts[number] for number, _ in rows], tokenizer)
    scored = scored_rows(score_answers(reward, answers, rollout.lengths.device))
    return [
        Sample(
            messages=answer.messages,
            is_safety=answer.is_safety,
            answer=answer.text,
            tokens=answer.ids,
            finished=answer.finished,
            round=config.round,
            prompt=number,
            sample=k,
            score=score,
            scores=parts,
        )
        for answer, (score, parts), (number, k) in zip(answers, scored, rows, strict=True)
    ]


def scored_rows(scores: Scores) -> list[tuple[float, dict[str, float]]]:
    """Scores as rows: (score, its parts by name)."""
    parts = {name: part.tolist() for name, part in scores.parts.items()}
    return [
        (score, {name: values[row] for name, values in parts.items()})
        for row, score in enumerate(scores.raw.tolist())
    ]


def read_pool(path: Path, tokenizer: Tokenizer) -> list[Sample]:
    """The samples of a pool; ValueError where it has none, or was made with another
    tokenizer."""
    samples = read_samples(path)
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
    kept: list[Sample] = []
    answers: list[Answer] = []
    for path in config.pools:
        for number, sample in enumerate(read_pool(path, tokenizer), 1):
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
        return kept
    scores = score_answers(reward, answers, loop.device_of(config))
    for sample, (score, parts) in zip(kept, scored_rows(scores), strict=True):
        sample["score"], sample["scores"] = score, parts
    return kept


def summary(fresh: list[Sample], kept: list[Sample], samples: int) -> dict[str, Any]:
    """What selection.json says: Fig. 7's curve and where the kept answers come from."""
    rows = torch.tensor([sample["score"] for sample in fresh]).view(-1, samples)
    usable = torch.tensor([is_usable(sample) for sample in fresh]).view(-1, samples)
    return {
        "prompts": len(rows),
        "kept": len(kept),
        "kept_by_round": dict(sorted(Counter(str(s["round"]) for s in kept).items())),
        "unfinished": sum(not s["finished"] for s in fresh) / len(fresh),
        "score_sampled": float(rows.mean()),
        "score_kept": sum(s["score"] for s in kept) / len(kept),
        "by_k": reward_curve(rows, usable),
    }


def main() -> int:
    return command("python -m puna.trainers.rejection", RejectionConfig, run)


if __name__ == "__main__":
    sys.exit(main())
