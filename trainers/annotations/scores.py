"""What reward models say of the comparisons that people made, before they learn from them.

A model that is scored on what it was trained on says little. What people said after the model's
file was written cannot have been in its training; nothing else is scored, and a score stays when
the next model comes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from puna.trainers.annotations.items import dialogue_in
from puna.trainers.annotations.store import Store
from puna.trainers.data.formats import Preference

TO_SCORE = """
SELECT verdict.id AS verdict, batch, messages, chosen, verdict.rating, verdict.safety,
    good.text AS good, bad.text AS bad
FROM verdict JOIN item ON item.id = verdict.item
    JOIN answer AS good ON good.item = item.id AND good.side = chosen
    JOIN answer AS bad ON bad.item = item.id AND bad.side <> chosen
WHERE undone IS NULL AND chosen IS NOT NULL AND kind = ? AND at > ?
    AND NOT EXISTS (SELECT 1 FROM score WHERE score.verdict = verdict.id AND version = ?)
ORDER BY verdict.id LIMIT ?
"""


class ToScore(NamedTuple):
    """A comparison that a reward model has not seen."""

    verdict: int
    row: Preference


def to_score(store: Store, kind: str, version: str, since: float, most: int) -> list[ToScore]:
    """Up to `most` comparisons of a kind that were made after `since` (seconds since 1970) and
    have no score by the model of this version."""
    return [
        ToScore(
            found["verdict"],
            Preference(
                dialogue_in(found),
                found["good"],
                found["bad"],
                found["rating"],
                found["safety"],
                batch=found["batch"],
            ),
        )
        for found in store.rows(TO_SCORE, kind, since, version, most)
    ]


def put_scores(
    store: Store, model: str, version: str, differences: Sequence[tuple[int, float | None]]
) -> None:
    """Keep r_chosen - r_rejected of verdicts; None where the model cannot read the dialogue."""
    with store.writing() as db:
        db.executemany(
            "INSERT OR IGNORE INTO score (verdict, version, model, difference) VALUES (?, ?, ?, ?)",
            [(verdict, version, model, difference) for verdict, difference in differences],
        )


class Scored(NamedTuple):
    """Comparisons of one batch and kind, as one model ordered them."""

    batch: int
    kind: str
    model: str
    version: str
    items: list[int]
    differences: list[float]


def scored(store: Store) -> list[Scored]:
    """All that was scored and not undone, by batch, kind and model, in the order it came."""
    found: dict[tuple[int, str, str], Scored] = {}
    for row in store.rows(
        "SELECT batch, kind, score.model, score.version, item.id AS item, difference FROM score "
        "JOIN verdict ON verdict.id = score.verdict JOIN item ON item.id = verdict.item "
        "WHERE undone IS NULL AND difference IS NOT NULL ORDER BY batch, kind, verdict.id"
    ):
        key = (row["batch"], row["kind"], row["version"])
        each = found.setdefault(key, Scored(*key[:2], row["model"], key[2], [], []))
        each.items.append(row["item"])
        each.differences.append(row["difference"])
    return list(found.values())
