"""What Ghost Attention samples from: the user's side of dialogues, and instructions to keep."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from puna.core.chat import check_text


class GhostDialogue(NamedTuple):
    instruction: str  # in full, attached to every message while sampling
    short: str  # what may stand for it in training, "Figure: Napoleon."
    turns: list[str]  # the user's messages


def read_ghost_dialogues(
    dialogues: list[Path], instructions: list[Path], seed: int
) -> list[GhostDialogue]:
    """Dialogues with an instruction each: their own, else one drawn from `instructions`.

    A row of a dialogue file has `turns` (a list of texts) or `messages` (their user messages are
    taken), and may have `instruction` and `short`. Raises ValueError as `file:line: ...` for a
    row that is neither, and where there is nothing to draw from.
    """
    drawn_from = [_instruction(row, where) for row, where in _rows(instructions)]
    rng = np.random.default_rng(seed)
    found = []
    for row, where in _rows(dialogues):
        if "instruction" in row:
            instruction, short = _instruction(row, where)
        elif drawn_from:
            instruction, short = drawn_from[int(rng.integers(len(drawn_from)))]
        else:
            raise ValueError(f"{where}: no `instruction`; add one, or name an instructions file")
        found.append(GhostDialogue(instruction, short, _turns(row, where)))
    if not found:
        raise ValueError("there is no dialogue to sample from; name a dialogues file with rows")
    return found


def _rows(paths: list[Path]) -> Iterator[tuple[dict[str, Any], str]]:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}), expected an object") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {type(row).__name__}, expected an object")
            yield row, where


def _instruction(row: dict[str, Any], where: str) -> tuple[str, str]:
    full = _text(row, "instruction", where)
    return full, _text(row, "short", where) if "short" in row else full


def _turns(row: dict[str, Any], where: str) -> list[str]:
    if isinstance(row.get("turns"), list):
        turns = [{"text": turn} for turn in row["turns"]]
    elif isinstance(row.get("messages"), list):
        users = [m for m in row["messages"] if isinstance(m, dict) and m.get("role") == "user"]
        turns = [{"text": message.get("content")} for message in users]
    else:
        raise ValueError(f"{where}: no `turns` and no `messages`, expected one of them")
    if not turns:
        raise ValueError(f"{where}: no user message, expected at least one")
    return [_text(turn, "text", where) for turn in turns]


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}: `{name}` is {type(value).__name__}, expected text")
    try:
        check_text(value, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return value
