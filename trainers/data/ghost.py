"""What Ghost Attention samples from: the user's side of dialogues, and instructions to keep."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.readers import Skipped, read_ghosts


class GhostDialogue(NamedTuple):
    instruction: str  # in full, attached to every message while sampling
    short: str  # what may stand for it in training, "Figure: Napoleon."
    turns: list[str]  # the user's messages
    where: str = ""  # file:line


def read_ghost_dialogues(
    dialogues: list[Path],
    instructions: list[Path],
    seed: int,
    how: ReadingMessages | None = None,
) -> tuple[list[GhostDialogue], Skipped]:
    """Dialogues with an instruction each, their own or else one drawn from `instructions`, and what
    was skipped.

    Raises ValueError as the other readers do, and where there is nothing to draw from.
    """
    skipped = Skipped()
    told = [ghost for path in instructions for ghost in _ghosts(path, how, skipped, alone=True)]
    rng = np.random.default_rng(seed)
    found = []
    for ghost in (ghost for path in dialogues for ghost in _ghosts(path, how, skipped)):
        source = ghost
        if ghost.instruction is None:
            if not told:
                raise ValueError(
                    f"{ghost.where}: no 'instruction'; add one, or name an instructions file"
                )
            source = told[int(rng.integers(len(told)))]
        assert source.instruction is not None and source.short is not None
        found.append(GhostDialogue(source.instruction, source.short, ghost.turns, ghost.where))
    if not found:
        raise ValueError("there is no dialogue to sample from; name a dialogues file with rows")
    return found, skipped


def _ghosts(
    path: Path, how: ReadingMessages | None, skipped: Skipped, *, alone: bool = False
) -> list:
    ghosts, unusable = read_ghosts(path, how, alone=alone)
    skipped.merge(unusable)
    return ghosts
