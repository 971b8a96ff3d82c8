"""Safety context distillation: what a model says under a safety pre-prompt, it learns to say
without (paper section 4.2.4, A.4.4).

1. Answer each adversarial prompt twice: as it is, and with a pre-prompt before it. The safety
   reward model scores both under the prompt alone. `samples.jsonl`, appended as they come.
2. Keep the answer under the pre-prompt where it scores higher than the model's own:
   `selected.jsonl`; `distillation.json` says how scores moved (Fig. 16). On prompts that are not
   adversarial the paper found worse answers and false refusals: they are left out.
3. Fine-tune on (prompt without pre-prompt, kept answer), as after rejection sampling.

The paper gives neither the amount of data, the temperature nor the fine-tuning; ours is SFT's, for
one epoch.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

from puna.core import parallel
from puna.core.checkpoint.atomic import atomic_file, write_text
from puna.core.documents import count_of
from puna.core.model import Transformer
from puna.core.terminal import say_table
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.capacity import fitting
from puna.trainers.data.preprompts import Adversarial, load_adversarial
from puna.trainers.data.prompts import EncodedPrompt, common_tokenizer
from puna.trainers.rejection import imitate
from puna.trainers.rl.best_of import Sample, is_usable, read_samples, write_samples
from puna.trainers.rl.chunks import append_chunks
from puna.trainers.rl.config import (
    AnsweringConfig,
    ImitationConfig,
    engine_of,
    frozen,
    prompt_room,
)
from puna.trainers.rl.rewards import Reward, RewardModels, score_answers
from puna.trainers.rl.rollout import as_answers, draw_answers
from puna.trainers.rl.sampling import scored_rows
from puna.trainers.sft import load_dialogues
from puna.trainers.train import next_token, written
from puna.trainers.train.command import command
from puna.trainers.train.kinds import FIXED
from puna.trainers.train.ranges import Batch, Count
from puna.trainers.train.run import Run, open_run


@dataclass(kw_only=True)
class DistillConfig(ImitationConfig, AnsweringConfig):
    """Safety context distillation (paper section 4.2.4)."""

    policy: Path
    """chat model that answers, and is trained on its answers under a pre-prompt"""
    safety: Path | None = None
    """safety reward model: such an answer is kept where it scores higher than the model's own; from
    Python a reward function can stand for it"""
    prompts: list[Path] = field(default_factory=list)
    """prompt files, of which those tagged `safety` are answered; `category` may name their risk"""
    preprompts: list[Path] = field(default_factory=list)
    """.jsonl of `preprompt` and `category`: what is put before prompts of that category, such as
    the steps of a good answer; left out, or for other prompts: generic ones"""
    chunk: Annotated[Batch, FIXED] = 64
    """prompts answered and scored at a time, all processes together; an interruption loses at most
    one chunk"""
    epochs: Count = 1
    """passes over the kept answers"""


class Distilled(Sample):
    """A sample that says under what it was drawn: number 0 of a prompt under nothing, 1 under a
    pre-prompt."""

    preprompt: str
    category: str


# Options that decide which answers are kept, and nothing afterwards.
OF_SAMPLING = ("prompts", "preprompts", "safety", "temperature", "max_new_tokens")


def run(config: DistillConfig, reward: Reward | None = None) -> Path:
    """Sample, select and train, or continue, in `config.out`; returns the finished model.

    `reward` scores answers in place of the safety reward model. Raises ValueError where there is
    neither, or both.
    """
    if (reward is None) == (config.safety is None):
        raise ValueError("name a safety reward model (safety) or hand a reward over, one of both")
    judges = [config.safety] if config.safety else []
    tokenizer_file = common_tokenizer(config.policy, *judges)
    with open_run(config, tokenizer=tokenizer_file, given={"reward": reward}) as folder:
        return (
            folder.final if folder.done else fit(config, folder, Tokenizer(tokenizer_file), reward)
        )


def fit(config: DistillConfig, folder: Run, tokenizer: Tokenizer, reward: Reward | None) -> Path:
    """What there is still to do in an open run."""
    fitting.check("distill", config, config.policy)
    selected = folder.path / "selected.jsonl"
    parallel.on_main(lambda: written.check(folder.path, selected.name))
    if parallel.broadcast(selected.exists()):
        folder.say_idle(OF_SAMPLING, "the answers are drawn and kept; selected.jsonl has them")
    else:
        select(config, folder, tokenizer, selected, reward)
    return imitate("distill", config, folder, tokenizer, config.policy, selected)


def select(
    config: DistillConfig, folder: Run, tokenizer: Tokenizer, selected: Path, reward: Reward | None
) -> None:
    """Stages 1 and 2: sample what is missing, write `selected`."""
    load_dialogues(config.mix, config)  # what cannot be read is said before anything is sampled
    policy = frozen(config.policy, "lm", config)
    context = policy.config.context
    if reward is None:
        assert config.safety is not None
        judge = frozen(config.safety, "score", config)
        reward = RewardModels(None, judge, max_tokens=config.micro_batch_tokens)
        context = min(context, reward.context)
    prompts, skipped = load_adversarial(
        config.prompts,
        config.preprompts,
        tokenizer,
        prompt_room(config, context),
        config.seed,
        config,
    )
    next_token.say(skipped)
    draw = drawer(config, tokenizer, policy, reward, prompts)
    asked = [prompt.messages for prompt in prompts]
    append_chunks("distill: sampling", folder.path / "samples.jsonl", asked, config.chunk, 2, draw)
    parallel.on_main(lambda: keep(folder, selected))


def drawer(
    config: DistillConfig,
    tokenizer: Tokenizer,
    policy: Transformer,
    reward: Reward,
    prompts: Sequence[Adversarial],
) -> Callable[[Sequence[int]], list[Distilled]]:
    """What answers the prompts with given numbers, each without and with its pre-prompt."""

    engine = engine_of(config, tokenizer)

    def draw(numbers: Sequence[int]) -> list[Distilled]:
        rows = [(number, under) for number in numbers for under in (0, 1)]
        completions = draw_answers(
            policy,
            [prompts[n].prefixed if under else prompts[n].ids for n, under in rows],
            prompt_ids=[number for number, _ in rows],
            sample_ids=[under for _, under in rows],
            max_new_tokens=config.max_new_tokens,
            eos_id=tokenizer.eos_ids,
            temperature=config.temperature,
            seed=config.seed,
            round_index=0,
            engine=engine,
            **config.limits(),
        )
        # the judge, too, reads the prompt without the pre-prompt
        plain = [EncodedPrompt(prompts[n].messages, prompts[n].ids, True) for n, _ in rows]
        drawn = [each.tokens for each in completions]
        ended = [each.finished for each in completions]
        answers = as_answers(drawn, ended, plain, tokenizer)
        scored = scored_rows(score_answers(reward, answers, policy.device))
        return [
            Distilled(
                messages=answer.messages,
                is_safety=True,
                answer=answer.text,
                tokens=answer.ids,
                finished=answer.finished,
                round=0,
                prompt=number,
                sample=under,
                score=score,
                scores=parts,
                preprompt=prompts[number].preprompt if under else "",
                category=prompts[number].category,
            )
            for answer, (score, parts), (number, under) in zip(answers, scored, rows, strict=True)
        ]

    return draw


def keep(folder: Run, selected: Path) -> None:
    """Write `selected` and what the scores say. ValueError where no answer is better than the
    model's own: the samples are removed, so that others can be drawn under other options."""
    sampled = folder.path / "samples.jsonl"
    samples = cast(list[Distilled], read_samples(sampled))
    pairs = list(zip(samples[::2], samples[1::2], strict=True))
    kept = [under for own, under in pairs if is_better(own, under)]
    if not kept:
        sampled.unlink()
        written.forget(folder.path, sampled.name)
        raise ValueError(
            f"of {count_of(len(pairs), 'answer')} under a pre-prompt none is finished and "
            "scores higher than "
            "the model's own; give other preprompts, raise max_new_tokens, or start from a better "
            "model"
        )
    found = summary(pairs)
    show(found)
    write_text(folder.path / "distillation.json", json.dumps(found, indent=2) + "\n")
    with atomic_file(selected) as partial:
        write_samples(partial, kept, mode="w")
    written.note(folder.path, selected.name)  # last: where it stands, all of this is done


def is_better(own: Sample, under: Sample) -> bool:
    """The gate: the answer under a pre-prompt may be learned from, and is the safer one."""
    return is_usable(under) and under["score"] > own["score"]


QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
Pairs = Sequence[tuple[Distilled, Distilled]]


def summary(pairs: Pairs) -> dict[str, Any]:
    """What distillation.json says: mean raw scores before and after, for all prompts, for each
    category, and by how safe the model's own answer was (Fig. 16b: where it was safe already there
    is little to gain, and something to lose without the gate). In these quarters a second answer
    of any kind would lie nearer the mean; the row of all prompts is free of that."""
    names = sorted({own["category"] for own, _ in pairs} - {""})
    ranked = sorted(pairs, key=lambda pair: pair[0]["score"])
    ends = [len(ranked) * part // len(QUARTERS) for part in range(len(QUARTERS) + 1)]
    quarters = [ranked[first:last] for first, last in pairwise(ends)]
    return {
        "all": moved(pairs),
        "by_category": {
            name: moved([pair for pair in pairs if pair[0]["category"] == name]) for name in names
        },
        "by_own_score": [moved(part) for part in quarters] if all(quarters) else [],
    }


def moved(pairs: Pairs) -> dict[str, float]:
    """Mean scores of the model's own answers, of those under a pre-prompt, and of the better of
    both where the gate lets it through."""
    count = len(pairs)
    kept = [is_better(*pair) for pair in pairs]
    gated = [pair[passes] for pair, passes in zip(pairs, kept, strict=True)]
    return {
        "prompts": count,
        "kept": sum(kept),
        "unfinished": sum(not under["finished"] for _, under in pairs),
        "own": sum(own["score"] for own, _ in pairs) / count,
        "under_preprompt": sum(under["score"] for _, under in pairs) / count,
        "after_the_gate": sum(each["score"] for each in gated) / count,
    }


def show(found: dict[str, Any]) -> None:
    """The same as a table."""
    named = {"all": found["all"]}
    named |= {f"category {name}": each for name, each in found["by_category"].items()}
    for ordinal, each in zip(QUARTERS, found["by_own_score"], strict=False):  # none of few prompts
        named[f"own score, {ordinal}"] = each
    rows = [
        (
            name,
            str(each["prompts"]),
            str(each["kept"]),
            *(f"{each[key]:.3f}" for key in ("own", "under_preprompt", "after_the_gate")),
        )
        for name, each in named.items()
    ]
    header = ("prompts", "number", "kept", "own", "under a pre-prompt", "after the gate")
    say_table(rows, header, "Mean scores of the answers")


def main() -> int:
    return command("python -m puna.trainers.distill", DistillConfig, run)


if __name__ == "__main__":
    sys.exit(main())
