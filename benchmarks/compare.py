"""`puna bench compare BEFORE AFTER`: what became faster or slower beyond the noise of both runs.

A machine is not as fast today as it was yesterday, and that falls on the peers, too: what became of
a row is held against what became of the peers' rows of the same bench, in the middle. A run's noise
is half the way from p20 to p80; both runs' are added, and a change below `LEAST` is none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from puna.core.documents import count_of, read_object, shortened, typed
from puna.core.errors import UserError
from puna.core.terminal import shown as visible

LEAST = 0.05
OURS = ("puna", "puna-native")
WORK = ("bench", "operation", "direction", "shape", "batch", "dtype", "ranks")
MACHINE = ("processor", "gpu", "threads")

Key = tuple[str, ...]
Rows = Mapping[Key, Mapping[str, Any]]


class Change(NamedTuple):
    """What became of a row that both runs timed."""

    key: Key  # of WORK, then the provider
    before: float
    after: float
    unit: str
    ratio: float  # after over before, over what became of the peers
    noise: float

    @property
    def verdict(self) -> str:
        if self.ratio < 1 - self.noise:
            return "slower"
        return "faster" if self.ratio > 1 + self.noise else "as before"

    @property
    def ours(self) -> bool:
        return self.key[-1] in OURS


def compare(before: Path, after: Path) -> list[Change]:
    """Print what changed, and return it. UserError where a row of Puna became slower, or wrong, or
    is gone; ValueError for files that hold no results, that timed nothing alike and that are of two
    machines."""
    old, new = document(before), document(after)
    for name in MACHINE:
        was, now = (found["machine"].get(name) for found in (old, new))
        if was != now:
            raise ValueError(
                f"{before} and {after} are of two machines ({name}: {was}, {now}); compare two "
                "runs of one"
            )
    then, now = rows_of(before, old), rows_of(after, new)
    changes = changed(then, now)
    worse = [f"{shown(c.key)} is slower" for c in changes if c.ours and c.verdict == "slower"]
    worse += lost(then, now)
    if not changes and not worse:
        raise ValueError(f"{before} and {after} timed nothing alike; compare two runs of one bench")
    console = Console(width=max(120, Console().width), markup=False, emoji=False)
    console.print(table(changes))
    if worse:
        raise UserError(f"worse than before: {'; '.join(worse)}")
    console.print(
        f"of {count_of(len(changes), 'row')} none of Puna's became slower beyond the noise"
    )
    return changes


def document(path: Path) -> dict[str, Any]:
    """What `puna bench --save` wrote."""
    found = read_object(path)
    if not isinstance(found.get("machine"), dict) or not isinstance(found.get("rows"), list):
        raise ValueError(f"{path} holds no results; give a file that `puna bench --save` wrote")
    return found


def rows_of(path: Path, found: Mapping[str, Any]) -> Rows:
    """Its rows by what was measured and who did it."""
    rows: dict[Key, Mapping[str, Any]] = {}
    for number, row in enumerate(found["rows"], 1):
        if not isinstance(row, dict) or not isinstance(row.get("provider"), str):
            raise ValueError(f"{path}: row {number} names no provider; measure again")
        try:
            slow, rate, fast = (rate_of(row, name) for name in ("p20", "value", "p80"))
            # Quantiles of equal times differ from them in their last bits.
            if slow and rate and fast and not slow * (1 - 1e-9) <= rate <= fast * (1 + 1e-9):
                raise ValueError(f"value {rate} is not between p20 {slow} and p80 {fast}")
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}; measure again") from error
        key = (*(str(row.get(name, "")) for name in WORK), row["provider"])
        if key in rows:
            raise ValueError(f"{path}: row {number} is of what an earlier row is; measure again")
        rows[key] = row
    return rows


def rate_of(row: Mapping[str, Any], name: str) -> float | None:
    """A rate of a row, None where it was not timed; ValueError for what cannot be one."""
    if row.get(name) is None:
        return None
    rate = typed(row[name], float, name)
    if not 1e-30 < rate < 1e30:  # so that quotients of two are numbers, too
        raise ValueError(f"{name} is {shortened(rate)}, expected a rate above 0")
    return rate


def timed(row: Mapping[str, Any] | None) -> bool:
    """Whether a row has a rate; one that was wrong has none."""
    return row is not None and None not in (row.get(name) for name in ("p20", "value", "p80"))


def changed(before: Rows, after: Rows) -> list[Change]:
    """Each row that both timed."""
    both = [key for key, row in before.items() if timed(row) and timed(after.get(key))]
    ratios = {key: after[key]["value"] / before[key]["value"] for key in both}
    changes = []
    for key in both:
        peers = [ratio for k, ratio in ratios.items() if k[0] == key[0] and k[-1] not in OURS]
        drift = median(peers) if peers and key[-1] in OURS else 1.0
        noise = max(LEAST, sum(spread(rows[key]) for rows in (before, after)))
        was, now = before[key], after[key]
        unit, ratio = str(now.get("unit", "")), ratios[key] / drift
        changes.append(Change(key, was["value"], now["value"], unit, ratio, noise))
    return changes


def spread(row: Mapping[str, Any]) -> float:
    """The noise of a row, as a share of its rate."""
    return float((row["p80"] - row["p20"]) / 2 / row["value"])


def lost(before: Rows, after: Rows) -> list[str]:
    """Rows of Puna that were timed and are not any more, each with the reason."""
    found = []
    for key, row in before.items():
        if key[-1] in OURS and timed(row) and not timed(after.get(key)):
            reason = after[key].get("failed") if key in after else "is not there"
            found.append(f"{shown(key)} {reason if isinstance(reason, str) else 'has no rate'}")
    return found


def shown(key: Key) -> str:
    return " ".join(part for part in (*key[:-1], f"({key[-1]})") if part)


def table(changes: Sequence[Change]) -> Table:
    """What changed first, then the rest."""
    found = Table()
    found.add_column("row")
    for heading in ("before", "after", "", "ratio", "noise"):
        found.add_column(heading, justify="right")
    found.add_column("verdict")
    for change in sorted(changes, key=lambda c: c.verdict == "as before"):
        cells = (
            shown(change.key), f"{change.before:,.4g}", f"{change.after:,.4g}", change.unit,
            f"{change.ratio:.2f}", f"{change.noise:.2f}", change.verdict,
        )  # fmt: skip
        found.add_row(*map(visible, cells))
    return found
