"""What is seen of the comparisons so far: the figures of the dashboard."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from markupsafe import Markup

from puna.annotate import charts
from puna.annotate.agreement import ac2
from puna.trainers.annotations.items import Progress, progress_of
from puna.trainers.annotations.store import Store
from puna.trainers.data.formats import RATINGS
from puna.trainers.rl.accuracy import Share, wilson

# From the left answer being far better to the right one being so; an item's sides are the same for
# everybody who compares it.
PLACES = [("left", rating) for rating in RATINGS] + [("right", r) for r in reversed(RATINGS)]

SAID = """
SELECT item.id AS item, batch, kind, annotator.name AS who, chosen, rating, reason, seconds
FROM verdict JOIN item ON item.id = verdict.item JOIN annotator ON annotator.id = verdict.annotator
WHERE undone IS NULL ORDER BY verdict.id
"""


class Person(NamedTuple):
    """What one person has done."""

    name: str
    made: int
    skipped: int
    seconds: float | None  # median an item
    left: Share  # how often the left answer was chosen
    agreement: float | None  # with all others, on the items that both compared
    shared: int  # how many items those are


class Batch(NamedTuple):
    number: int
    progress: Progress
    skipped: int


class Seen(NamedTuple):
    batches: list[Batch]
    people: list[Person]
    agreement: float | None  # Gwet's AC2 of all people
    shared: int  # items that more than one person compared
    reasons: list[tuple[str, int]]  # why items were skipped
    biases: list[tuple[str, Share]]
    duels: list[tuple[str, Share]]
    ratings: Markup
    shares: Markup


def seen(store: Store) -> Seen:
    """All figures, of one look at the file."""
    rows = store.rows(SAID)
    answers: dict[int, dict[str, Any]] = defaultdict(dict)
    for row in store.rows("SELECT item, side, length(text) AS length, model, version FROM answer"):
        answers[row["item"]][row["side"]] = row
    chosen = [row for row in rows if row["chosen"] is not None]
    skipped = Counter(row["batch"] for row in rows if row["chosen"] is None)
    numbers = [row[0] for row in store.rows("SELECT number FROM batch ORDER BY number")]
    batches = [Batch(number, progress_of(store, number), skipped[number]) for number in numbers]
    given = by_item(chosen)
    biases, duels = biases_of(chosen, answers), duels_of(chosen, answers)
    return Seen(
        batches=batches,
        people=[person(name, rows, given) for name in sorted({row["who"] for row in rows})],
        agreement=ac2([list(each.values()) for each in given.values()], len(PLACES)),
        shared=sum(len(each) > 1 for each in given.values()),
        reasons=Counter(row["reason"] for row in rows if row["reason"]).most_common(12),
        biases=biases,
        duels=duels,
        ratings=charts.stacked(ratings_of(chosen), [" ".join(r.split("_")) for r in RATINGS]),
        shares=charts.intervals([*biases, *duels]),
    )


def by_item(rows: Iterable[Any]) -> dict[int, dict[str, int]]:
    """Item -> person -> place on the scale; of verdicts with a rating."""
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for row in rows:
        if row["rating"] is not None:
            found[row["item"]][row["who"]] = PLACES.index((row["chosen"], row["rating"]))
    return found


def person(name: str, rows: Sequence[Any], given: dict[int, dict[str, int]]) -> Person:
    own = [row for row in rows if row["who"] == name]
    chosen = [row for row in own if row["chosen"] is not None]
    times = [row["seconds"] for row in own if row["seconds"] is not None]
    shared = [each for each in given.values() if name in each and len(each) > 1]
    pairs = [
        [each[name], place] for each in shared for other, place in each.items() if other != name
    ]
    return Person(
        name,
        len(chosen),
        len(own) - len(chosen),
        median(times) if times else None,
        wilson(sum(row["chosen"] == "left" for row in chosen), len(chosen)),
        ac2(pairs, len(PLACES)),
        len(shared),
    )


def biases_of(rows: Sequence[Any], answers: dict[int, dict[str, Any]]) -> list[tuple[str, Share]]:
    """How often the left and how often the longer answer is chosen; half means no bias to the
    left. (Longer answers may be better ones.)"""
    left = [row["chosen"] == "left" for row in rows]
    longer = [
        lengths[row["chosen"]] == max(lengths.values())
        for row in rows
        if len(set((lengths := lengths_of(answers[row["item"]])).values())) == 2
    ]
    found = [("left answer chosen", left), ("longer answer chosen", longer)]
    return [(name, wilson(sum(hits), len(hits))) for name, hits in found if hits]


def lengths_of(sides: dict[str, Any]) -> dict[str, int]:
    return {side: row["length"] for side, row in sides.items()}


def duels_of(rows: Sequence[Any], answers: dict[int, dict[str, Any]]) -> list[tuple[str, Share]]:
    """How often one model's answers are preferred to another's: the comparisons are an A/B test
    that costs nothing. The interval counts an item once, however many people compared it."""
    hits: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
    order: dict[str, int] = {}
    for row in rows:
        names = {side: called(each) for side, each in answers[row["item"]].items()}
        for name in sorted(set(names.values())):
            order.setdefault(name, len(order))
        if len(set(names.values())) == 2:
            one, other = sorted(names.values(), key=order.__getitem__)
            hits[one, other].append((row["item"], names[row["chosen"]] == one))
    return [
        (
            f"{one} preferred to {other}",
            wilson(sum(hit for _, hit in each), len(each), len({item for item, _ in each})),
        )
        for (one, other), each in hits.items()
    ]


def called(answer: Any) -> str:
    """A model's name, short enough for a label, and its version."""
    name = answer["model"] or "unknown"
    short = name if len(name) <= 28 else f"…{name[-27:]}"
    return f"{short} ({answer['version'][:6]})" if answer["version"] else short


def ratings_of(rows: Sequence[Any]) -> list[tuple[str, list[float]]]:
    """Of each batch the share of each degree, the strongest first."""
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["rating"] is not None:
            found[row["batch"]][row["rating"]] += 1
    return [
        (f"batch {batch}", [counts[rating] / sum(counts.values()) for rating in RATINGS])
        for batch, counts in sorted(found.items())
    ]
