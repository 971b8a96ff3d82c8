"""What is seen of the comparisons so far: the figures of the dashboard."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from puna.annotate import charts
from puna.annotate.agreement import ac2
from puna.trainers.annotations.items import Progress, progress_of
from puna.trainers.annotations.scores import Scored, scored
from puna.trainers.annotations.store import Store
from puna.trainers.data.formats import RATINGS
from puna.trainers.rl.accuracy import Share, clustered, right, wilson

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
    rewards: list[tuple[str, Share]]  # a reward model on what it was not trained on
    ratings: list[charts.Row]
    times: list[charts.Row]


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
        rewards=rewards_of(scored(store)),
        ratings=ratings_of(chosen),
        times=times_of(rows),
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
    that costs nothing. The interval counts an item once, however many people compared it; the
    model that came later is named first."""
    hits: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
    order: dict[str, int] = {}
    for number, row in enumerate(rows):
        names = {side: called(each) for side, each in answers[row["item"]].items()}
        for name in names.values():
            order.setdefault(name, -number)
        if len(set(names.values())) == 2:
            one, other = sorted(names.values(), key=lambda name: (order[name], name))
            hits[one, other].append((row["item"], names[row["chosen"]] == one))
    return [
        (
            f"{one} preferred to {other}",
            wilson(sum(hit for _, hit in each), len(each), len({item for item, _ in each})),
        )
        for (one, other), each in hits.items()
    ]


def called(answer: Any) -> str:
    """A model's name, short enough for a label (of a folder what tells it apart), and its
    version."""
    parts = [part for part in answer["model"].split("/") if part] or ["unknown"]
    if len(parts) > 1 and parts[-1] == "model":
        parts.pop()
    name = "/".join(parts[-2:])
    short = name if len(name) <= 40 else f"…{name[-39:]}"
    return f"{short} ({answer['version'][:6]})" if answer["version"] else short


def rewards_of(found: Sequence[Scored]) -> list[tuple[str, Share]]:
    """How often reward models order the answers of a batch as people did."""
    return [
        (
            f"batch {each.batch}, {each.kind}: {called(each._asdict())}",
            clustered(right(torch.tensor(each.differences)), each.items),
        )
        for each in found
    ]


def times_of(rows: Sequence[Any]) -> list[charts.Row]:
    """Seconds an item by person: the median with the quarters on both sides of it."""
    times: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["seconds"] is not None:
            times[row["who"]].append(row["seconds"])
    # Each counts twice, as one value alone has no quarters.
    cut = {name: quantiles([*each, *each]) for name, each in sorted(times.items())}
    most = max((each[2] for each in cut.values()), default=1.0) or 1.0
    found = []
    for name, (low, middle, high) in cut.items():
        value = f"{middle:.0f} s"
        said = f"{name}: {value}, half of them {low:.0f} to {high:.0f} s"
        drawing = charts.interval(low / most, middle / most, high / most, said)
        found.append(charts.Row(name, drawing, value))
    return found


def ratings_of(rows: Sequence[Any]) -> list[charts.Row]:
    """Of each batch the share of each degree, the strongest first."""
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["rating"] is not None:
            found[row["batch"]][row["rating"]] += 1
    made = []
    for batch, counts in sorted(found.items()):
        label, count = f"batch {batch}", sum(counts.values())
        shares = [counts[rating] / count for rating in RATINGS]
        named = (f"{r.replace('_', ' ')} {s:.0%}" for r, s in zip(RATINGS, shares, strict=True))
        drawing = charts.stacked(shares, f"{label}: {', '.join(named)}")
        made.append(charts.Row(label, drawing, str(count)))
    return made
