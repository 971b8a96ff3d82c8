"""Prompts to sample from: read, encoded, and drawn in an order that needs no memory."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from puna.core.checkpoint.folder import tokenizer_path
from puna.core.text.chat import Message, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.readers import Skipped, read_prompts
from puna.trainers.data.visits import epoch_order


class EncodedPrompt(NamedTuple):
    messages: list[Message]
    ids: list[int]  # up to where the answer begins
    is_safety: bool  # the paper's is_safety(p): tagged as likely to elicit unsafe answers


def load_prompts(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    longest: int,
    how: ReadingMessages | None = None,
) -> tuple[list[EncodedPrompt], Skipped]:
    """All usable prompts of the files, in order, and what was skipped.

    Prompts of more than `longest` tokens are skipped and counted, beside what the reader skips.
    Raises ValueError where nothing is left.
    """
    prompts: list[EncodedPrompt] = []
    skipped = Skipped()
    for path in paths:
        rows, unusable = read_prompts(path, how)
        skipped.merge(unusable)
        for row in rows:
            ids = encode_prompt(tokenizer, row.messages)
            if len(ids) > longest:
                skipped.add(f"longer than {longest} tokens", row.where)
            else:
                prompts.append(EncodedPrompt(list(row.messages), ids, row.is_safety))
    if not prompts:
        found = skipped.reasons().replace("\n", "; ") or "no file was named"
        raise ValueError(f"no prompt to sample from: {found}")
    return prompts, skipped


def common_tokenizer(*folders: Path) -> Path:
    """The tokenizer that all models share; ValueError where one has another.

    The reward models and the critic read the policy's ids as they were drawn.
    """
    first = tokenizer_path(folders[0])
    for folder in folders[1:]:
        if tokenizer_path(folder).read_bytes() != first.read_bytes():
            raise ValueError(
                f"{folder} has another tokenizer than {folders[0]}; scores are read from the "
                "policy's own ids, so all models must share one"
            )
    return first


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return epoch_order(count, seed, epoch).tolist()


def draw(position: int, count: int, seed: int) -> tuple[int, int]:
    """(prompt, epoch) at a position of the endless sequence of freshly shuffled epochs.

    A function of its arguments alone, so a resumed run goes on exactly. The epoch serves as the
    sample number of the random draw: a prompt that comes up again gets another answer.
    """
    epoch, place = divmod(position, count)
    return _shuffled(count, seed, epoch)[place], epoch
