"""The reward of texts: what one reward model says of answers, or two of them by Eq. 4's switch.

A score is raw, before any whitening; its sigmoid is what the paper's thresholds are about (section
3.2.3: an answer is unsafe where sigma(R_s) is below 0.15).
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from puna.core import parallel, ranks
from puna.core.checkpoint.atomic import check_absent, write_text
from puna.core.checkpoint.folder import load_model, open_source
from puna.core.device import device_of_name
from puna.core.documents import count_of
from puna.core.model import Transformer
from puna.core.terminal import say_table
from puna.core.text.chat import Message, decode_answer, encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.answered import Answered
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.prompts import common_tokenizer
from puna.trainers.data.readers import Skipped, read_answered
from puna.trainers.rl.rewards import Answer, RewardModels, Scores
from puna.trainers.train import next_token
from puna.trainers.train.command import command
from puna.trainers.train.progress import meter
from puna.trainers.train.ranges import Above, Batch, Below, Count

OURS = {"score", "sigmoid", "scores", "sigmoids", "branch"}  # columns; those of before go
PAPERS = 0.15  # threshold of Eq. 4's switch
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(kw_only=True)
class ScoreConfig(ReadingMessages):
    """Score answers by a reward model, or by two of them (paper section 3.2.3, Eq. 4)."""

    model: Path
    """reward model; with `safety` besides, the one of helpfulness"""
    safety: Path | None = None
    """safety reward model: the score is then that of Eq. 4's switch"""
    safety_threshold: Annotated[float, Above(0), Below(1)] = PAPERS
    """the switch takes the safety score where its sigmoid is below this (paper: 0.15)"""
    data: list[Path] = field(default_factory=list)
    """files of dialogues that end with an answer, perhaps with `safety`; or samples.jsonl"""
    prompt: str = ""
    """in place of data: a user's message"""
    answer: str = ""
    """the answer to `prompt`"""
    out: Path | None = None
    """.jsonl file to write every row with its score to"""
    batch: Batch = 1024
    """answers scored between two looks at the progress"""
    micro_batch_tokens: Count = 16384
    """most tokens in one forward pass"""
    device: str = "auto"
    """auto takes a GPU where there is one"""


def run(config: ScoreConfig) -> list[dict[str, Any]]:
    """Print mean and quantiles, write the rows with their scores to `config.out`, return them.

    A row keeps its columns, but for scores of before, and gets `score` and `sigmoid`; with two
    models also `scores` and `sigmoids` of each and `branch`, the way that Eq. 4's switch went:
    "is_safety" (the prompt is tagged), "unsafe" (below the threshold) or "helpfulness".
    Raises ValueError where there is nothing to score, or the models have different tokenizers.
    """
    ranks.init()
    if bool(config.prompt or config.answer) == bool(config.data):
        raise ValueError("score either --data, or one --prompt and its --answer")
    if config.safety is None and config.safety_threshold != PAPERS:
        raise ValueError("safety_threshold is of the safety model's score; name one with --safety")
    if bool(config.prompt) != bool(config.answer):
        raise ValueError("--prompt and --answer go together: a user's message, and what is scored")
    if (out := config.out) is not None:
        parallel.on_main(lambda: check_absent(out))
    folders = [path for path in (config.model, config.safety) if path is not None]
    tokenizer = Tokenizer(common_tokenizer(*folders))
    models = [open_reward_model(folder, config.device) for folder in folders]
    helpfulness, safety = (*models, None)[:2]
    reward = RewardModels(
        helpfulness,
        safety,
        threshold=config.safety_threshold,
        max_tokens=config.micro_batch_tokens,
    )
    found, skipped = answers_of(config)
    kept, answers = encoded(found, tokenizer, reward.context, skipped)
    next_token.say(skipped)
    rows = [
        {**{name: value for name, value in one.row.items() if name not in OURS}, **scored}
        for one, scored in zip(kept, scored_rows(reward, answers, config.batch), strict=True)
    ]
    if parallel.is_main():
        show(rows)
        if config.out is not None:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(config.out, "".join(lines))
    return rows


def open_reward_model(folder: Path, device: str) -> Transformer:
    """A reward model to look with; ValueError for a language model."""
    if open_source(folder).head != "score":
        raise ValueError(f"{folder} is a language model; a reward model is needed to score answers")
    return load_model(folder, device=device_of_name(device)).requires_grad_(False)


def answers_of(config: ScoreConfig) -> tuple[list[Answered], Skipped]:
    """The answers of all files, or the one of the command line."""
    if not config.data:
        prompt: list[Message] = [{"role": "user", "content": config.prompt}]
        row = {"prompt": config.prompt, "response": config.answer}
        return [Answered(prompt, config.answer, [], False, row, "--answer")], Skipped()
    found: list[Answered] = []
    skipped = Skipped()
    for path in config.data:
        rows, unusable = read_answered(path, config)
        found += rows
        skipped.merge(unusable)
    return found, skipped


def encoded(
    found: Sequence[Answered], tokenizer: Tokenizer, context: int, skipped: Skipped
) -> tuple[list[Answered], list[Answer]]:
    """Those that fit the context, and the same as a reward reads them. Ids that were drawn are read
    as they are; ValueError where they do not spell the answer, or nothing is left."""
    kept, answers = [], []
    for one in found:
        ids = one.tokens or encode_answer(tokenizer, one.answer)
        if one.tokens and (
            max(ids) >= tokenizer.vocab_size or decode_answer(tokenizer, ids) != one.answer
        ):
            raise ValueError(
                f"{one.where}: the ids do not spell the answer; this sample was drawn with another "
                "tokenizer than the reward model's: remove the column tokens to score its text"
            )
        prompt = encode_prompt(tokenizer, one.messages)
        if len(prompt) + len(ids) > context:
            skipped.add(f"longer than the context of {context} tokens", one.where)
            continue
        kept.append(one)
        finished = ids[-1] in tokenizer.eos_ids
        answers.append(Answer(one.messages, one.answer, prompt, ids, finished, one.is_safety))
    if not answers:
        raise ValueError(f"no answer to score: {skipped.reasons()}".replace("\n", "; "))
    return kept, answers


def scored_rows(
    reward: RewardModels, answers: Sequence[Answer], batch: int
) -> list[dict[str, Any]]:
    """What each row says of its score, `batch` answers at a time."""
    starts = range(0, len(answers), batch)
    rows: list[dict[str, Any]] = []
    with meter("scoring", len(starts), unit="answers", show=parallel.is_main()) as progress:
        for start in starts:
            piece = answers[start : start + batch]
            rows += rows_of(reward(piece))
            progress.advance(len(piece))
    return rows


def rows_of(scores: Scores) -> list[dict[str, Any]]:
    """`score`, `sigmoid`, and of two models `scores`, `sigmoids` and `branch`, of each answer."""
    rows = [
        {"score": raw, "sigmoid": sigmoid}
        for raw, sigmoid in zip(scores.raw.tolist(), scores.raw.sigmoid().tolist(), strict=True)
    ]
    if not scores.branches:
        return rows
    for number, row in enumerate(rows):
        parts = {name: part[number] for name, part in scores.parts.items()}
        row["scores"] = {name: float(part) for name, part in parts.items()}
        row["sigmoids"] = {name: float(part.sigmoid()) for name, part in parts.items()}
        row["branch"] = next(n for n, taken in scores.branches.items() if taken[number])
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Mean and quantiles of what was scored, and the ways that Eq. 4's switch went."""
    columns = {name: [row[name] for row in rows] for name in ("score", "sigmoid")}
    for name in rows[0].get("scores", ()):
        columns[name] = [row["scores"][name] for row in rows]
        columns[f"{name}, sigmoid"] = [row["sigmoids"][name] for row in rows]
    branches = Counter(row["branch"] for row in rows if "branch" in row)
    if len(rows) == 1:
        ways = [("Eq. 4 took", name) for name in branches]
        say_table([(name, f"{value:.3f}") for name, (value,) in columns.items()] + ways)
        return
    cells = [(name, *spread(torch.tensor(values))) for name, values in columns.items()]
    header = ("", "mean", "lowest", "10%", "median", "90%", "highest")
    say_table(cells, header, f"Scores of {count_of(len(rows), 'answer')}")
    if branches:
        taken = [(name, f"{count:,}") for name, count in branches.most_common()]
        say_table(taken, ("Eq. 4 took", "answers"))


def spread(values: Tensor) -> list[str]:
    """Mean and QUANTILES of values (N,), as text."""
    ordered = values.double().sort().values
    places = [round(share * (len(ordered) - 1)) for share in QUANTILES]
    return [f"{float(each):.3f}" for each in (ordered.mean(), *ordered[places])]


def main() -> int:
    return command("python -m puna.trainers.score", ScoreConfig, run)


if __name__ == "__main__":
    sys.exit(main())
