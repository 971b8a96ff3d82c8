"""Supervised fine-tuning on dialogues (paper section 3.1).

Dialogues are packed into rows; the loss is zero on prompts and counts the answers' tokens only.
Packed dialogues do not see each other (the paper does not say whether its own did).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from puna.core.chat import encode_dialogue
from puna.core.checkpoint.folder import tokenizer_path
from puna.core.tokenizer import Tokenizer
from puna.trainers.data.formats import Columns, Dialogue
from puna.trainers.data.packing import PackedRows
from puna.trainers.data.readers import Skipped, read_dialogues
from puna.trainers.train import loop, next_token
from puna.trainers.train.command import command
from puna.trainers.train.ranges import Count, CountOrNone, ShareOf
from puna.trainers.train.run import Run, open_start


@dataclass(kw_only=True)
class SFTConfig(loop.RowsConfig):
    """Fine-tune a language model on demonstrations."""

    model: Path
    """model folder to start from"""
    data: list[Path]
    """.jsonl of `messages`, or of `prompt` and `response`"""
    columns: Columns = field(default_factory=Columns)
    """names of the file's columns"""
    eval_data: list[Path] = field(default_factory=list)
    """dialogues for the held-out loss; left out: a share of `data`"""
    eval_share: Annotated[float, ShareOf()] = 0.02
    """share of `data` kept for the held-out loss, where no file is given"""
    epochs: Count = 2
    """passes over the data (paper: 2)"""
    lr: float = 2e-5
    """peak (paper: 2e-5, cosine)"""
    batch: int = 64
    """rows in a step, all processes together (paper: 64)"""
    row_tokens: CountOrNone = 0
    """tokens in a row; 0 takes the model's context (paper: 4096)"""


def run(config: SFTConfig) -> Path:
    """Train, or continue, the run in `config.out`; returns the finished model's folder."""
    tokenizer_file = tokenizer_path(config.model)
    folder = Run(config.out, config, tokenizer=tokenizer_file)
    if folder.done:
        return folder.final
    dialogues, skipped = load_dialogues(config.data, config.columns)
    held_dialogues: list[Dialogue] = []
    if config.eval_data:
        held_dialogues, unusable = load_dialogues(config.eval_data, config.columns)
        skipped.merge(unusable)
    elif config.eval_share > 0:
        dialogues, held_dialogues = next_token.split(dialogues, config.eval_share, config.seed)
    source = open_start(folder, config.model, head="lm")
    row_tokens = next_token.row_length(config.row_tokens, source.config.context)
    tokenizer = Tokenizer(tokenizer_file)
    rows = pack(tokenizer, dialogues, row_tokens)
    skipped.merge(rows.skipped)
    next_token.say(skipped)
    return next_token.train(
        "sft",
        folder,
        source,
        rows,
        next_token.epoch_steps(len(rows), config.epochs, config.batch),
        config.batch,
        config.micro_batch,
        config,
        pack(tokenizer, held_dialogues, row_tokens) if held_dialogues else None,
    )


def load_dialogues(paths: list[Path], columns: Columns) -> tuple[list[Dialogue], Skipped]:
    """All usable dialogues of the files, and what was skipped."""
    dialogues: list[Dialogue] = []
    skipped = Skipped()
    for path in paths:
        found, unusable = read_dialogues(path, columns)
        dialogues += found
        skipped.merge(unusable)
    return dialogues, skipped


def pack(tokenizer: Tokenizer, dialogues: list[Dialogue], row_tokens: int) -> PackedRows:
    """Dialogues in rows of `row_tokens`; ValueError where none is left."""
    sequences = [encode_dialogue(tokenizer, dialogue.messages) for dialogue in dialogues]
    return PackedRows(sequences, row_tokens, vocab_size=tokenizer.vocab_size)


def main() -> None:
    sys.exit(command("python -m puna.trainers.sft", SFTConfig, run))


if __name__ == "__main__":
    main()
