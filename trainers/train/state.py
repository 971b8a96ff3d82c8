"""What a checkpoint says of itself, and the proof that it is whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.folder import tokenizer_path
from puna.core.checkpoint.hashes import HASHES, write_hashes
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.train.advice import advice

STATE = "training/state.json"
PROOF = f"training/{HASHES}"


class Visited(NamedTuple):
    """How far a run is in its rows, whatever batches it took them in."""

    visits: int  # a row counts in every epoch
    rows: int


class State(NamedTuple):
    """What a checkpoint says of itself."""

    step: int
    optimizer_entries: dict[str, int]  # of each network
    visited: Visited | None


def read_state(checkpoint: Path) -> State:
    """ValueError where that is not what is there."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        entries = {str(k): int(v) for k, v in state["optimizer_entries"].items()}
        visited = state.get("visited")  # older checkpoints do not say it
        return State(int(state["step"]), entries, visited and Visited(*map(int, visited)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{checkpoint / STATE} is damaged; {previous()}") from error


def finish_checkpoint(folder: Path, state: State, known: Mapping[str, str] | None = None) -> None:
    """The last files of a checkpoint: its state, and the hashes of all (`known`: of some)."""
    write_text(folder / STATE, json.dumps(state._asdict()))
    write_hashes(folder, PROOF, known)


def check_tokenizer(checkpoint: Path, given: Path) -> None:
    """ValueError where the ids of `given` are other words than those that were learned."""
    own = tokenizer_path(checkpoint)
    if given.read_bytes() == own.read_bytes():
        return
    one, other = Tokenizer(given), Tokenizer(own)  # a .gguf's own, for one, is written otherwise
    if [*map(one.piece, range(one.pieces))] != [*map(other.piece, range(other.pieces))]:
        raise ValueError(
            f"{checkpoint} was trained with another tokenizer than {given}, whose ids are other "
            "words; give the former one, or another --out"
        )


def previous() -> str:
    """How to go on without the newest checkpoint."""
    return advice(
        "resume",
        "--resume previous goes on from the checkpoint before it",
        "remove that checkpoint to go on from the one before it",
    )
