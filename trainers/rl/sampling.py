"""K answers to each prompt, drawn chunk by chunk into a file that an interrupted run goes on with.

Scored by a reward as they are drawn, or not at all: which of them to keep says `best_of`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puna.core import parallel
from puna.core.checkpoint.atomic import write_text
from puna.core.documents import field, read_object
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.prompts import EncodedPrompt
from puna.trainers.rl.best_of import Drawn, Sample, is_usable
from puna.trainers.rl.chunks import append_chunks
from puna.trainers.rl.config import BestOfConfig, engine_of
from puna.trainers.rl.engine import Engine
from puna.trainers.rl.rewards import Reward, Scores, score_answers
from puna.trainers.rl.rollout import as_answers, draw_answers
from puna.trainers.train.notice import notice


class Drawing(NamedTuple):
    """How answers are drawn."""

    samples: int  # K, answers to each prompt
    temperature: float
    max_new_tokens: int
    chunk: int  # prompts at a time, all ranks together
    limits: Mapping[str, Any]  # of what stands side by side, as `generate` takes them
    seed: int
    round: int  # part of the random numbers
    title: str = "sampling"  # beside the progress
    engine: Engine | None = None  # what draws, where it is not this process


def drawing_of(config: BestOfConfig, tokenizer: Tokenizer) -> Drawing:
    """As the options say."""
    return Drawing(
        samples=config.samples,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        chunk=config.chunk,
        limits=config.limits(),
        seed=config.seed,
        round=config.round,
        engine=engine_of(config, tokenizer),
    )


TRIED = "temperatures.json"  # in the run's folder: what the best answers score at each


def drawing_at_best(
    folder: Path,
    config: BestOfConfig,
    tokenizer: Tokenizer,
    policy: Transformer,
    prompts: Sequence[EncodedPrompt],
    reward: Reward,
) -> Drawing:
    """As the options say; where several temperatures are given, at the one whose best of K answers
    score highest for this policy under this reward, on the first chunk of prompts (paper section
    3.2.3, Fig. 8). What was found stays in TRIED."""
    drawing = drawing_of(config, tokenizer)
    if not config.temperatures:
        return drawing
    path = folder / TRIED
    if not parallel.broadcast(path.exists()):
        numbers = range(min(drawing.chunk, len(prompts)))
        mine = numbers[parallel.rank() :: parallel.world_size()]
        found = {}
        for temperature in dict.fromkeys(config.temperatures):
            tried = drawing._replace(temperature=temperature)
            drawn = sample_chunk(tried, tokenizer, policy, prompts, mine, reward)
            best = [score for part in parallel.gather(best_scores(drawn)) for score in part]
            found[str(temperature)] = sum(best) / len(best)
        if parallel.is_main():
            write_text(path, json.dumps(found, indent=2) + "\n")
        parallel.barrier()
    row = read_object(path, "remove it")
    scores = {float(name): field(row, name, float) for name in row}
    chosen = max(scores, key=lambda temperature: scores[temperature])
    listed = ", ".join(f"{score:.3f} at {name}" for name, score in scores.items())
    notice(f"sampling at temperature {chosen}: the best of {drawing.samples} score {listed}")
    return drawing._replace(temperature=chosen)


def best_scores(drawn: Sequence[Any]) -> list[float]:
    """Of each prompt the best score of the answers that may be kept, else the worst of all."""
    by_prompt: dict[int, list[Sample]] = {}
    for sample in drawn:
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    return [
        max(
            (sample["score"] for sample in samples if is_usable(sample)),
            default=min(sample["score"] for sample in samples),
        )
        for samples in by_prompt.values()
    ]


def sample_all(
    path: Path,
    drawing: Drawing,
    tokenizer: Tokenizer,
    policy: Transformer,
    prompts: Sequence[EncodedPrompt],
    reward: Reward | None,
) -> None:
    """Append K answers a prompt to `path`, chunk after chunk, from where it ends; scored where
    there is a reward. All ranks take part and rank 0 writes."""

    def draw(numbers: Sequence[int]) -> Sequence[Drawn]:
        return sample_chunk(drawing, tokenizer, policy, prompts, numbers, reward)

    asked = [prompt.messages for prompt in prompts]
    append_chunks(drawing.title, path, asked, drawing.chunk, drawing.samples, draw)


def sample_chunk(
    drawing: Drawing,
    tokenizer: Tokenizer,
    policy: Transformer,
    prompts: Sequence[EncodedPrompt],
    numbers: Sequence[int],
    reward: Reward | None,
) -> Sequence[Drawn]:
    """K answers to each of the prompts with these numbers, scored where there is a reward."""
    rows = [(number, k) for number in numbers for k in range(drawing.samples)]
    completions = draw_answers(
        policy,
        [prompts[number].ids for number, _ in rows],
        prompt_ids=[number for number, _ in rows],
        sample_ids=[k for _, k in rows],
        max_new_tokens=drawing.max_new_tokens,
        eos_id=tokenizer.eos_ids,
        temperature=drawing.temperature,
        seed=drawing.seed,
        round_index=drawing.round,
        engine=drawing.engine,
        **drawing.limits,
    )
    answers = as_answers(
        [each.tokens for each in completions],
        [each.finished for each in completions],
        [prompts[number] for number, _ in rows],
        tokenizer,
    )
    drawn = [
        Drawn(
            messages=answer.messages,
            is_safety=answer.is_safety,
            answer=answer.text,
            tokens=answer.ids,
            finished=answer.finished,
            round=drawing.round,
            prompt=number,
            sample=k,
        )
        for answer, (number, k) in zip(answers, rows, strict=True)
    ]
    if reward is None:
        return drawn
    return with_scores(drawn, score_answers(reward, answers, policy.device))


def with_scores(drawn: Sequence[Drawn], scores: Scores) -> list[Sample]:
    """Answers and their scores, in the same order."""
    return [
        Sample(**{**one, "score": score, "scores": parts})
        for one, (score, parts) in zip(drawn, scored_rows(scores), strict=True)
    ]


def scored_rows(scores: Scores) -> list[tuple[float, dict[str, float]]]:
    """Scores as rows: (score, its parts by name)."""
    parts = {name: part.tolist() for name, part in scores.parts.items()}
    return [
        (score, {name: values[row] for name, values in parts.items()})
        for row, score in enumerate(scores.raw.tolist())
    ]
