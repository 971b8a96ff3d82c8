"""The figures of the arms as files, and results.json made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import say_table
from puna.demo.kept import kept
from puna.demo.reproduce.arms import SFT, Arm, planned, title_of
from puna.demo.reproduce.claims import CLAIMS, Claim, verdict
from puna.demo.reproduce.measures import Values
from puna.demo.reproduce.tables import Estimate, Results, difference, figure, is_score


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """The run of an arm; its figures stand beside it, with the ending .json."""
    return out / "arms" / arm / f"seed-{seed}"


def note(out: Path, arm: str, seed: int, figures: Values) -> None:
    """Write what was measured of an arm: from here on it is done."""
    write_text(folder_of(out, arm, seed).with_suffix(".json"), json.dumps(figures))


def figures_of(out: Path, arm: str, seed: int) -> Values | None:
    """What was measured of an arm; None where nothing was, or the file is damaged."""
    found = kept(folder_of(out, arm, seed).with_suffix(".json"), dict)
    if not found or not all(is_row(values) for values in found.values()):
        return None
    return found


def is_row(values: Any) -> bool:
    """Whether these can be figures: numbers, of which means and differences are numbers, too."""
    return isinstance(values, list) and all(
        type(value) in (int, float) and -1e30 < value < 1e30 for value in values
    )


def read_results(out: Path, seeds: int) -> Results:
    """Arm -> seed -> figures of what is there. The model that all start from is one and the same
    under every seed, and only its judges differ: what was measured with seed 0 alone is of all."""
    results: dict[str, dict[int, Values]] = {}
    plan = planned(seeds)
    first = figures_of(out, SFT, 0) or {}
    for name, seed in [(arm.name, seed) for arm, seed in plan] + [(SFT, s) for s in seeds_of(plan)]:
        if (found := figures_of(out, name, seed)) is not None:
            results.setdefault(name, {})[seed] = first | found if name == SFT else found
    return results


def seeds_of(plan: Sequence[tuple[Arm, int]]) -> list[int]:
    return sorted({seed for _, seed in plan})


def missing(out: Path, seeds: int) -> list[str]:
    """What of a run's plan was not measured, a line a seed."""
    found: dict[int, list[str]] = {}
    for arm, seed in planned(seeds):
        if figures_of(out, arm.name, seed) is None:
            found.setdefault(seed, []).append(arm.name)
    return [f"of seed {seed} {', '.join(names)}" for seed, names in sorted(found.items())]


def document(
    results: Results, seed: int, seeds: int, scale: float, left: list[str]
) -> dict[str, Any]:
    """What results.json says: every figure of every arm, then the claims."""
    return {
        "seed": seed,
        "seeds": seeds,
        "scale": scale,
        "left_out": left,
        "arms": {
            arm: {name: estimated(figure(results, arm, name)) for name in names_of(results, arm)}
            for arm in results
        },
        "claims": [
            claim._asdict() | {"difference": estimated(found), "verdict": verdict(claim, found)}
            for claim, found in compared(results)
        ],
    }


def names_of(results: Results, arm: str) -> list[str]:
    """The figures of an arm, in the order in which they were measured."""
    return list(dict.fromkeys(name for figures in results[arm].values() for name in figures))


def compared(results: Results) -> list[tuple[Claim, Estimate | None]]:
    return [(c, difference(results, c.arm, c.other, c.figure)) for c in CLAIMS]


def estimated(found: Estimate | None) -> dict[str, float] | None:
    return None if found is None else found._asdict()


def shown(name: str, value: float, *, signed: bool = False) -> str:
    """A figure for reading: shares in percent, their differences in points, scores as they are."""
    sign = "+" if signed else ""
    if is_score(name):
        return f"{value:{sign}.2f}"
    return f"{100 * value:{sign}.1f}" if signed else f"{100 * value:.1f}%"


def with_interval(name: str, found: Estimate | None, *, signed: bool = False) -> str:
    """A figure with its interval; "not measured" for none."""
    if found is None:
        return "not measured"
    low, high = (shown(name, value, signed=signed) for value in (found.low, found.high))
    return f"{shown(name, found.mean, signed=signed)} ({low} to {high})"


def say_claims(results: Results) -> None:
    """The differences, as a table in the terminal."""
    rows = [
        (
            str(claim.question),
            claim.what,
            f"{title_of(claim.arm)} / {title_of(claim.other)}",
            with_interval(claim.figure, found, signed=True),
            verdict(claim, found),
        )
        for claim, found in compared(results)
    ]
    say_table(rows, ("", "figure", "arm / against", "difference, points", "the paper"))
