"""The answers that are judged: drawn once, kept in the folder, read as each judge reads them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import parallel
from puna.core.checkpoint.folder import open_source, tokenizer_path
from puna.core.model import Transformer
from puna.core.packed import score
from puna.core.text.chat import encode_prompt, respelled
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.formats import Prompt
from puna.trainers.data.prompts import EncodedPrompt
from puna.trainers.data.readers import Skipped, read_prompts
from puna.trainers.evaluation.config import EvaluateChatConfig, policies
from puna.trainers.rl.best_of import Drawn, read_drawn
from puna.trainers.rl.config import engine_of, frozen
from puna.trainers.rl.rewards import Answer, check_finite
from puna.trainers.rl.sampling import Drawing, sample_all
from puna.trainers.train import next_token


class Reader(NamedTuple):
    """A model that reads prompts, to answer them or to judge answers."""

    path: Path
    tokenizer: Tokenizer
    spelling: bytes  # the tokenizer's file: whose ids are read as they are
    context: int  # tokens


def reader_of(path: Path) -> Reader:
    """The model's tokenizer and context; its weights stay where they are."""
    file = tokenizer_path(path)
    return Reader(path, Tokenizer(file), file.read_bytes(), open_source(path).config.context)


def common_prompts(paths: Sequence[Path], config: EvaluateChatConfig) -> list[Prompt]:
    """The prompts that all models have room for, with an answer after them; says what was skipped.

    Raises ValueError where nothing is left.
    """
    judges = (config.judge, config.second_judge, config.safety, config.refusals)
    readers = [reader_of(path) for path in (*policies(config), *filter(None, judges))]
    kept: list[Prompt] = []
    skipped = Skipped()
    for path in paths:
        rows, unusable = read_prompts(path, config)
        skipped.merge(unusable)
        for row in rows:
            if all(has_room(reader, row, config.max_new_tokens) for reader in readers):
                kept.append(row)
            else:
                skipped.add("too long for one of the models with an answer after it", row.where)
    next_token.say(skipped)
    if not kept:
        raise ValueError(
            f"no prompt to answer: {skipped.reasons()}; lower max_new_tokens".replace("\n", "; ")
        )
    return kept


def has_room(reader: Reader, prompt: Prompt, answer: int) -> bool:
    return len(encode_prompt(reader.tokenizer, prompt.messages)) + answer <= reader.context


def drawing_of(config: EvaluateChatConfig, title: str) -> Drawing:
    """One answer to each prompt."""
    return Drawing(
        samples=1,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        chunk=config.chunk,
        limits=config.limits(),
        seed=config.seed,
        round=0,
        title=title,
    )


def kept_in(config: EvaluateChatConfig, number: int, name: str) -> Path:
    """Where the answers of chat model `number` to this set of prompts are."""
    return config.out / "answers" / f"model-{number + 1}-{name}.jsonl"


def draw(
    config: EvaluateChatConfig,
    number: int,
    policy: Transformer,
    work: Sequence[tuple[str, Sequence[Prompt], Drawing]],
) -> None:
    """The missing answers of chat model `number` to each (name, prompts, how to draw)."""
    tokenizer = Tokenizer(tokenizer_path(policies(config)[number]))
    engine = engine_of(config, tokenizer)
    for name, prompts, drawing in work:
        path = kept_in(config, number, name)
        encoded = [
            EncodedPrompt(p.messages, encode_prompt(tokenizer, p.messages), p.is_safety)
            for p in prompts
        ]
        parallel.on_main(partial(path.parent.mkdir, exist_ok=True))
        drawing = drawing._replace(engine=engine)
        sample_all(path, drawing, tokenizer, policy, encoded, None)


def drawn(config: EvaluateChatConfig, number: int, name: str) -> list[Drawn]:
    """The answers that `draw` has kept."""
    return read_drawn(kept_in(config, number, name))


def as_read(rows: Sequence[Drawn], policy: Reader, reader: Reader) -> list[Answer]:
    """The answers in a reader's ids: those that were drawn where both spell alike, else those of
    the text, which a judge of another family reads as anybody would."""
    same = policy.spelling == reader.spelling
    return [
        Answer(
            row["messages"],
            row["answer"],
            encode_prompt(reader.tokenizer, row["messages"]),
            row["tokens"]
            if same
            else respelled(reader.tokenizer, row["answer"], finished=row["finished"]),
            row["finished"],
            row["is_safety"],
        )
        for row in rows
    ]


class Scorer:
    """A reward model with its tokenizer: scores of answers, whichever chat model gave them."""

    def __init__(self, path: Path, config: EvaluateChatConfig):
        self.path, self.reader = path, reader_of(path)
        self.model = frozen(path, "score", config)
        self.max_tokens = config.micro_batch_tokens

    def __call__(self, rows: Sequence[Drawn], policy: Reader) -> Tensor:
        """Raw scores (S,) fp64, on the CPU; UserError where one is not finite."""
        answers = as_read(rows, policy, self.reader)
        return self.of([answer.prompt_ids + answer.ids for answer in answers])

    def of(self, sequences: Sequence[list[int]]) -> Tensor:
        """The same of whole dialogues in the model's own ids."""
        found = score(self.model, sequences, max_tokens=self.max_tokens)
        check_finite(str(self.path), found)
        return found.to("cpu", torch.float64)
