"""Which of two models answers better: by reward models, by people, or by a function.

A win counts 1, a tie one half. Two answers of the same text are a tie, and nobody is asked. Which
of the two answers is called a is drawn for each pair, so that whoever judges cannot know whose is
whose. P pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.core import parallel
from puna.core.documents import count_of, field, json_rows, shortened
from puna.trainers.data.split import opening
from puna.trainers.evaluation.answers import Reader, as_read
from puna.trainers.rl.accuracy import clustered, right
from puna.trainers.rl.best_of import Drawn
from puna.trainers.rl.comparisons import Annotator, check_verdict, write_rows
from puna.trainers.rl.rewards import one_each

WINNERS = {"a": 1.0, "tie": 0.0, "b": -1.0}


class Match(NamedTuple):
    """One model's answers beside those of the model that it is to win against."""

    ours: Sequence[Drawn]
    theirs: Sequence[Drawn]  # to the same prompts
    swapped: list[bool]  # (P,) whether ours is called b
    asked: list[int]  # the pairs whose texts differ


def match(ours: Sequence[Drawn], theirs: Sequence[Drawn], seed: int, number: int) -> Match:
    """The answers of model `number` and the other's, in an order that (seed, number) decides."""
    swapped = np.random.default_rng((seed, number)).random(len(ours)) < 0.5
    pairs = zip(ours, theirs, strict=True)
    asked = [i for i, (one, other) in enumerate(pairs) if one["answer"] != other["answer"]]
    return Match(ours, theirs, swapped.tolist(), asked)


def by_scores(found: Match, ours: Tensor, theirs: Tensor) -> Tensor:
    """(P,): above 0 where ours wins; of the scores (P,) of both."""
    differences = torch.zeros_like(ours)
    differences[found.asked] = (ours - theirs)[found.asked]
    return differences


def by_annotator(found: Match, annotator: Annotator, ours: Reader, theirs: Reader) -> Tensor:
    """As `by_scores`, of an annotator's verdicts. ValueError for what is none."""
    answers = as_read(found.ours, ours, ours), as_read(found.theirs, theirs, theirs)
    a = [answers[found.swapped[i]][i] for i in found.asked]
    b = [answers[not found.swapped[i]][i] for i in found.asked]

    def ask() -> list[float]:
        said = one_each("the annotator", annotator(a, b), len(a), "verdict", "pair")
        verdicts = [check_verdict(verdict, number) for number, verdict in enumerate(said, 1)]
        return [1.0 if verdict.chosen == 0 else -1.0 for verdict in verdicts]

    return as_ours(found, parallel.on_main(ask) if a else [])


def as_ours(found: Match, prefers_a: Sequence[float]) -> Tensor:
    """(P,) of what is said of the pairs asked: above 0 for a, turned to ours."""
    differences = torch.zeros(len(found.ours), dtype=torch.float64)
    for i, value in zip(found.asked, prefers_a, strict=True):
        differences[i] = -value if found.swapped[i] else value
    return differences


def write_pairs(path: Path, matches: Sequence[Match]) -> None:
    """The pairs of all matches for people to judge: `pair` is a number, a and b the answers."""
    rows: list[dict[str, Any]] = []
    for found in matches:
        for i in found.asked:
            both = found.ours[i]["answer"], found.theirs[i]["answer"]
            a, b = both[::-1] if found.swapped[i] else both
            messages = found.ours[i]["messages"]
            rows.append({"pair": len(rows), "messages": messages, "a": a, "b": b})
    write_rows(path, rows)


def by_judgements(path: Path, matches: Sequence[Match]) -> list[Tensor]:
    """As `by_scores` for each match, of a file's rows of `pair` and `winner` (a, b or tie).

    Where a pair is judged several times, the side wins that more of them prefer. ValueError as
    `file:line: ...` for another row, and where a pair is judged by nobody.
    """
    count = sum(len(found.asked) for found in matches)
    votes: list[list[float]] = [[] for _ in range(count)]
    for where, row in json_rows(path):
        try:
            pair, winner = field(row, "pair", int), field(row, "winner", str)
        except ValueError as error:
            raise ValueError(f"{where}: not a judgement: {error}") from error
        if not 0 <= pair < count or winner not in WINNERS:
            raise ValueError(
                f"{where}: pair {pair} and winner {shortened(winner)}; expected a pair from 0 to "
                f"{count - 1} and a, b or tie"
            )
        votes[pair].append(WINNERS[winner])
    if missing := [pair for pair, values in enumerate(votes) if not values]:
        raise ValueError(
            f"{path}: no judgement of {len(missing):,} of {count_of(count, 'pair')}, the first is "
            f"pair {missing[0]}; judge all of them"
        )
    prefers = [sum(values) for values in votes]
    found = []
    for each in matches:
        found.append(as_ours(each, prefers[: len(each.asked)]))
        prefers = prefers[len(each.asked) :]
    return found


def result(found: Match, differences: Tensor) -> dict[str, Any]:
    """The win rate, ties counted one half, with its 95% interval over prompts; and the shares of
    wins and ties."""
    prompts = [opening(row["messages"]) for row in found.ours]
    return {
        "win_rate": clustered(right(differences), prompts)._asdict(),
        "wins": float((differences > 0).double().mean()),
        "ties": float((differences == 0).double().mean()),
        "same_text": 1 - len(found.asked) / len(found.ours),
    }


def agreement(found: Match, one: Tensor, other: Tensor) -> dict[str, Any] | None:
    """How often two judges prefer the same answer, of the pairs for which neither sees a tie; None
    where there is no such pair."""
    both = ((one != 0) & (other != 0)).nonzero()[:, 0].tolist()
    if not both:
        return None
    same = (one.sign() == other.sign()).double()[both]
    return clustered(same, [opening(found.ours[i]["messages"]) for i in both])._asdict()
