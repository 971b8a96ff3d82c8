"""Supervised fine-tuning on dialogues (paper section 3.1).

Dialogues are packed into rows; the loss is zero on prompts and counts the answers' tokens only.
Packed dialogues do not see each other (the paper does not say whether its own did).

The paper began with public data and went on with its own, far less and better. Here that is
`in_order`; or two runs, the second from the first one's model, with a schedule of its own.
"""

import json
import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from puna.core.checkpoint.folder import tokenizer_path
from puna.core.documents import as_name
from puna.core.text.chat import encode_dialogue
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.capacity import fitting
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.formats import Dialogue
from puna.trainers.data.mix import MixShare, mixed
from puna.trainers.data.packing import PackedRows
from puna.trainers.data.readers import Skipped, parse_dialogues, read_dialogues
from puna.trainers.data.split import also_learned, exchange, split
from puna.trainers.data.visits import rows_in_order
from puna.trainers.train import loop, next_token
from puna.trainers.train.command import command
from puna.trainers.train.kinds import FIXED
from puna.trainers.train.notice import notice
from puna.trainers.train.plan import of_epochs
from puna.trainers.train.ranges import Count, CountOrZero, ShareOf
from puna.trainers.train.run import Run, open_run
from puna.trainers.train.starting import open_start


@dataclass(kw_only=True)
class SFTConfig(loop.HeldOutConfig, ReadingMessages):
    """Fine-tune a language model on demonstrations."""

    model: Path
    """model folder to start from"""
    data: list[Path] = field(default_factory=list)
    """files of `messages`, or of `prompt` and `response`"""
    in_order: bool = False
    """all epochs of the first file of `data`, then all of the next, not shuffled together (paper:
    public data first, then its own); one learning-rate schedule over all of it"""
    mix: list[Path] = field(default_factory=list)
    """dialogues to train on besides"""
    mix_share: MixShare | None = None
    """share of all dialogues trained on that are drawn from `mix`, none of them twice; left out:
    all of `mix`"""
    eval_data: list[Path] = field(default_factory=list)
    """dialogues for the held-out loss; left out: a share of `data`"""
    eval_share: Annotated[float, ShareOf(), FIXED] = 0.02
    """share of `data` kept for the held-out loss, where no file is given"""
    epochs: Count = 2
    """passes over the data (paper: 2)"""
    lr: float = 2e-5
    """peak (paper: 2e-5, cosine)"""
    batch: int = 64
    """rows in a step, all processes together (paper: 64)"""
    row_tokens: CountOrZero = 0
    """tokens in a row; 0 takes the model's context (paper: 4096)"""
    truncate: bool = False
    """cut dialogues that are longer than a row, whose last answers then lose their end; off: they
    are skipped"""

    def check(self) -> None:
        if self.in_order and (len(self.data) < 2 or self.mix):
            raise ValueError(
                "in_order takes the files of data one after the other: name two or more there, and "
                "none in mix"
            )


def run(
    config: SFTConfig,
    dialogues: Iterable[Any] | None = None,
    loss: next_token.Loss | None = None,
) -> Path:
    """Train, or continue, the run in `config.out`; returns the finished model's folder.

    `dialogues` are read in place of `config.data`: rows as in its files, or lists of messages, all
    taken into memory at once; a run is continued with the same ones. `loss` takes the place of
    `next_token.next_token_loss`; a run is continued with the same one, which nothing can check.
    Raises ValueError for rows from both places or neither, and for one that cannot be read.
    """
    if dialogues is None and not config.data:
        raise ValueError("there are no dialogues to learn from; name their files with --data")
    if dialogues is not None and config.data:
        raise ValueError("dialogues come from config.data and from Python, too; leave one out")
    given = None if dialogues is None else parse_dialogues(dialogues, config)
    tokenizer_file = tokenizer_path(config.model)
    rows = [dialogue.messages for dialogue in given[0]] if given else None
    handed = {"dialogues": rows, "loss": loss}
    with open_run(config, tokenizer=tokenizer_file, given=handed) as folder:
        if folder.done:
            return folder.final
        return fit(config, folder, Tokenizer(tokenizer_file), given, loss)


def fit(
    config: SFTConfig,
    folder: Run,
    tokenizer: Tokenizer,
    given: tuple[list[Dialogue], Skipped] | None = None,
    loss: next_token.Loss | None = None,
) -> Path:
    """What there is still to do in an open run."""
    learned, skipped = given or load_dialogues(config.data, config)
    held: list[Dialogue] = []
    if config.eval_data:
        held, unusable = load_dialogues(config.eval_data, config)
        skipped.merge(unusable)
        skipped.notes += also_learned(learned, held, lambda row: json.dumps(row.messages))
    elif config.eval_share > 0:
        learned, held = split(learned, config.eval_share, config.seed, begins)
    if config.mix:
        others, unusable = load_dialogues(config.mix, config)
        skipped.merge(unusable)
        learned = mixed(learned, others, held, config.mix_share, config.seed, begins, skipped)
    source = open_start(folder, config.model, head="lm")
    fitting.check("sft", config, source.config)
    row_tokens = next_token.row_length(config.row_tokens, source.config.context)
    rows = pack(tokenizer, learned, row_tokens, by_file=config.in_order, truncate=config.truncate)
    skipped.merge(rows.skipped)
    eval_rows = pack_held_out(tokenizer, held, row_tokens, skipped, truncate=config.truncate)
    next_token.say(skipped)
    plan = of_epochs(len(rows), config.epochs, config.batch, folder)
    order = None
    check_order(config, folder)
    if config.in_order:
        order = partial(rows_in_order, list(rows.group_rows.values()), config.epochs, config.seed)
        files = (f"{count:,} of {as_name(file)}" for file, count in rows.group_rows.items())
        notice(f"sft: rows in order: {', then '.join(files)}")
    return next_token.train(
        "sft",
        folder,
        source,
        rows,
        config,
        plan=plan,
        what=rows.described("dialogue"),
        eval_rows=eval_rows,
        eval_every=config.eval_every,
        loss=next_token.checked(next_token.next_token_loss if loss is None else loss),
        order=order,
    )


def begins(dialogue: Dialogue) -> Hashable:
    """What stays on one side of what is held out: all dialogues that begin alike."""
    return exchange(dialogue.messages)


def load_dialogues(
    paths: list[Path], how: ReadingMessages | None = None
) -> tuple[list[Dialogue], Skipped]:
    """All usable dialogues of the files, and what was skipped."""
    dialogues: list[Dialogue] = []
    skipped = Skipped()
    for path in paths:
        found, unusable = read_dialogues(path, how)
        dialogues += found
        skipped.merge(unusable)
    return dialogues, skipped


def pack(
    tokenizer: Tokenizer,
    dialogues: list[Dialogue],
    row_tokens: int,
    *,
    by_file: bool = False,
    truncate: bool = False,
) -> PackedRows:
    """Dialogues in rows of `row_tokens`, with `by_file` file after file, with `truncate` cut where
    they are longer; ValueError where none is left."""
    sequences = [encode_dialogue(tokenizer, dialogue.messages) for dialogue in dialogues]
    where = [dialogue.where for dialogue in dialogues]
    files = [place.rpartition(":")[0] for place in where] if by_file else []
    return PackedRows(
        sequences,
        row_tokens,
        vocab_size=tokenizer.vocab_size,
        where=where,
        groups=files,
        truncate=truncate,
    )


def pack_held_out(
    tokenizer: Tokenizer,
    held: list[Dialogue],
    row_tokens: int,
    skipped: Skipped,
    *,
    truncate: bool = False,
) -> PackedRows | None:
    """`pack` of held-out dialogues, adding to `skipped` those that are left out; None where there
    are none or none is left, which is said and stops nobody."""
    if not held:
        return None
    try:
        rows = pack(tokenizer, held, row_tokens, truncate=truncate)
    except ValueError as error:
        skipped.notes.append(f"the held-out loss is not measured: {error}")
        return None
    skipped.merge_held_out(rows.skipped)
    return rows


def check_order(config: SFTConfig, folder: Run) -> None:
    """ValueError where what comes in order would change behind what is done of it."""
    ordering = {"in_order", *(("epochs", "data") if config.in_order else ())}
    if folder.step and (changed := sorted(folder.amended & ordering)):
        raise ValueError(
            f"{' and '.join(changed)} cannot change on the way where rows come in order: some "
            "would come again, or not at all; give another --out"
        )


def main() -> int:
    return command("python -m puna.trainers.sft", SFTConfig, run)


if __name__ == "__main__":
    sys.exit(main())
