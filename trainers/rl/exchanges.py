"""The answers that Ghost Attention samples, and the file that they are kept in, turn by turn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puna.core.checkpoint.atomic import atomic_file
from puna.core.documents import append_rows, are_ids, count_of, json_rows, shortened
from puna.trainers.data.ghost import GhostDialogue
from puna.trainers.train import written


class Exchange(NamedTuple):
    user: str
    answer: list[int]  # ids as they were drawn, EOS included where it was
    obeys: bool  # fit to be a target: finished, and accepted by the judge


def whole_turns(path: Path) -> int:
    """How many turns are complete; a line cut short by a kill is removed."""
    if not path.exists():
        return 0
    written.check(path.parent, path.name, grows=True)
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with atomic_file(path) as partial:
            partial.write_bytes(whole)
    return whole.count(b"\n")


def append_turn(
    path: Path, exchanges: dict[int, Exchange], dialogues: Sequence[GhostDialogue]
) -> None:
    """One line: by a dialogue's number what it was asked, the answer, under which instruction."""
    row: dict[str, Any] = {"of": len(dialogues)}
    for i, exchange in exchanges.items():
        row[str(i)] = [*exchange, dialogues[i].instruction]
    append_rows(path, [row])
    written.note(path.parent, path.name)


def load_turns(
    path: Path, dialogues: Sequence[GhostDialogue], vocab_size: int
) -> list[list[Exchange]]:
    """The answers in turns.jsonl; ValueError as `file:line: ...` for what answers none of these."""
    history: list[list[Exchange]] = [[] for _ in dialogues]
    others = f"these are other dialogues: give the former ones, or remove {path}"
    for turn, (where, row) in enumerate(json_rows(path) if path.exists() else ()):
        if row.pop("of", None) != len(dialogues):
            raise ValueError(f"{where}: not of {count_of(len(dialogues), 'dialogue')}; {others}")
        for index, exchange in row.items():
            match exchange:
                case [str(user), [*ids], bool(obeys), str(instruction)] if ids and are_ids(ids):
                    pass
                case _:
                    raise ValueError(
                        f"{where}: {shortened(exchange)} is no exchange; remove {path}"
                    )
            if max(ids) >= vocab_size:
                raise ValueError(
                    f"{where}: {max(ids)} is no id of a vocabulary of {vocab_size}; remove {path}"
                )
            if not (index.isdecimal() and int(index) < len(dialogues)):
                raise ValueError(
                    f"{where}: an answer to dialogue {shortened(index)} of {len(history)}; {others}"
                )
            asked = dialogues[int(index)]
            if len(history[int(index)]) != turn:
                raise ValueError(
                    f"{where}: turn {turn + 1} of dialogue {index} follows on turn "
                    f"{len(history[int(index)])}; remove {path}"
                )
            if [user, instruction] != [*asked.turns[turn : turn + 1], asked.instruction]:
                raise ValueError(
                    f"{where}: an answer to {shortened(user)} under {shortened(instruction)}; "
                    f"{others}"
                )
            history[int(index)].append(Exchange(user, ids, obeys))
    return history
