"""What is to be compared: batches, items and their answers, and who has which before them."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from puna.core.text.chat import Message
from puna.trainers.annotations.store import Store

KINDS = ("helpfulness", "safety")
SIDES = ("left", "right")
STALE_SECONDS = 3600.0  # an item that lay before somebody for so long goes to the next
FRESH_SECONDS = 60.0  # since a look that was noted; another one is not


class Given(NamedTuple):
    """An answer and where it comes from."""

    text: str
    model: str = ""
    version: str = ""
    temperature: float | None = None
    seed: int | None = None


class Item(NamedTuple):
    """An item as it lies before somebody."""

    id: int
    key: str  # what a verdict on it is sent with
    batch: int
    kind: str
    messages: list[Message]
    left: str
    right: str


class Progress(NamedTuple):
    """How far a batch is, in verdicts."""

    done: int
    total: int


def dialogue_in(row: Any) -> list[Message]:
    """The dialogue of an item's row."""
    messages: list[Message] = json.loads(row["messages"])
    return messages


def ask_batch(store: Store, source: str, expected: int, number: int | None = None) -> int:
    """The number of the batch that `source` asks for: the same one every time, or a new one, the
    next where none is given. Raises ValueError where the number is another source's."""
    with store.writing() as db:
        there = db.execute("SELECT number FROM batch WHERE source = ?", (source,)).fetchone()
        if there is None:
            if number is None:
                number = db.execute("SELECT 1 + coalesce(max(number), 0) FROM batch").fetchone()[0]
            elif db.execute("SELECT 1 FROM batch WHERE number = ?", (number,)).fetchone():
                raise ValueError(
                    f"batch {number} of {store.path} was asked for by somebody else; take another "
                    "number"
                )
            db.execute(
                "INSERT INTO batch (number, source, expected) VALUES (?, ?, ?)",
                (number, source, expected),
            )
            return int(number)
        db.execute("UPDATE batch SET expected = max(expected, ?) WHERE source = ?",
                   (expected, source))  # fmt: skip
        return int(there[0])


def add_item(
    store: Store,
    batch: int,
    kind: str,
    source: str,
    messages: Sequence[Message],
    *,
    people: int = 1,
    reserved: int | None = None,
    parent: int | None = None,
) -> int | None:
    """A new item without answers, unless there was one from this source; returns its id or None.
    `people` is how many are to compare it, `reserved` the one person who shall."""
    text = json.dumps(list(messages), ensure_ascii=False)
    with store.writing() as db:
        made = db.execute(
            "INSERT OR IGNORE INTO item (batch, kind, source, messages, people, wanted, reserved, "
            "parent) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (batch, kind, source, text, people, people, reserved, parent),
        )
        return made.lastrowid if made.rowcount else None


def put_answers(store: Store, item: int, left: Given, right: Given) -> None:
    """The two answers of an item, which can be compared from now on; what has them keeps them."""
    with store.writing() as db:
        if db.execute("SELECT ready FROM item WHERE id = ?", (item,)).fetchone()[0]:
            return
        for side, given in zip(SIDES, (left, right), strict=True):
            db.execute("INSERT INTO answer VALUES (?, ?, ?, ?, ?, ?, ?)", (item, side, *given))
        db.execute("UPDATE item SET ready = 1 WHERE id = ?", (item,))


def give_up(store: Store, item: int, why: str) -> None:
    """An item that cannot be answered is out of its batch."""
    with store.writing() as db:
        db.execute("UPDATE item SET failed = ?, wanted = 0 WHERE id = ?", (why, item))


def unanswered(store: Store) -> dict[str, Any] | None:
    """The item whose answers are most needed: somebody waits for one reserved for them."""
    row = store.row(
        "SELECT id, messages FROM item WHERE NOT ready AND failed IS NULL "
        "ORDER BY reserved IS NULL, id LIMIT 1"
    )
    return None if row is None else {"id": row["id"], "messages": dialogue_in(row)}


def waiting_ahead(store: Store) -> int:
    """How many items with answers lie before nobody yet."""
    return store.number(
        "SELECT count(*) FROM item WHERE wanted > 0 AND ready AND failed IS NULL "
        "AND id NOT IN (SELECT item FROM hand)"
    )


# An item that is open, not judged by this person and not before enough others.
NEXT = """
SELECT id FROM item WHERE wanted > 0 AND ready AND failed IS NULL
    AND reserved {}
    AND wanted > (SELECT count(*) FROM hand WHERE hand.item = item.id)
    AND NOT EXISTS (SELECT 1 FROM verdict
        WHERE verdict.item = item.id AND annotator = :me AND undone IS NULL)
    AND NOT (SELECT taken FROM batch WHERE number = item.batch)
ORDER BY id LIMIT 1
"""
WHOSE = ("= :me", "IS NULL")  # what somebody waits for comes first, then what is anybody's


def hand_out(store: Store, annotator: int) -> Item | None:
    """The item that lies before somebody, or the next one for them; None where none is ready. A
    second call, a reload or a second tab gets the same one."""
    now = time.time()
    fresh = store.row("SELECT since FROM hand WHERE annotator = ?", annotator)
    if fresh is not None and now - fresh["since"] < FRESH_SECONDS:
        there = before(store, annotator)
        if there is not None:
            return there
    with store.writing() as db:
        db.execute("DELETE FROM hand WHERE since < ?", (now - STALE_SECONDS,))
        held = db.execute("SELECT item FROM hand WHERE annotator = ?", (annotator,)).fetchone()
        if held is None:
            me = {"me": annotator}
            found = (db.execute(NEXT.format(whose), me).fetchone() for whose in WHOSE)
            row = next(filter(None, found), None)
            if row is None:
                return None
            place(db, row[0], annotator)
        else:
            db.execute("UPDATE hand SET since = ? WHERE annotator = ?", (now, annotator))
        return before(store, annotator)


def place(db: Any, item: int, annotator: int) -> None:
    """Put an item before somebody, under a fresh key, in place of what lies there."""
    key = secrets.token_urlsafe(16)
    db.execute("INSERT OR REPLACE INTO hand VALUES (?, ?, ?, ?)",
               (annotator, item, key, time.time()))  # fmt: skip


def before(store: Store, annotator: int) -> Item | None:
    """What lies before somebody."""
    row = store.row(
        "SELECT item.id, key, batch, kind, messages, l.text AS left_text, r.text AS right_text "
        "FROM hand JOIN item ON item.id = hand.item "
        "JOIN answer AS l ON l.item = item.id AND l.side = 'left' "
        "JOIN answer AS r ON r.item = item.id AND r.side = 'right' WHERE annotator = ?",
        annotator,
    )
    if row is None:
        return None
    named = {name: row[name] for name in ("id", "key", "batch", "kind")}
    return Item(**named, messages=dialogue_in(row), left=row["left_text"], right=row["right_text"])


def is_awaited(store: Store, annotator: int) -> bool:
    """Whether answers are being made for this person in particular."""
    return store.row("SELECT 1 FROM item WHERE NOT ready AND failed IS NULL AND reserved = ?",
                     annotator) is not None  # fmt: skip


def progress_of(store: Store, batch: int) -> Progress:
    """Verdicts made and verdicts asked for. An item that could not be answered is not counted."""
    row = store.rows(
        "SELECT coalesce(sum(people - wanted), 0), coalesce(sum(people), 0), count(*) FROM item "
        "WHERE batch = ? AND failed IS NULL",
        batch,
    )[0]
    expected = store.number("SELECT expected FROM batch WHERE number = ?", batch)
    failed = store.number("SELECT count(*) FROM item WHERE batch = ? AND failed IS NOT NULL", batch)
    return Progress(row[0], row[1] + max(0, expected - failed - row[2]))


def close_batch(store: Store, batch: int) -> bool:
    """Take a batch out of people's hands, if it is complete: nothing in it can be undone then.
    Returns whether it is."""
    with store.writing() as db:
        done, total = progress_of(store, batch)
        if done < total:
            return False
        db.execute("UPDATE batch SET taken = 1 WHERE number = ?", (batch,))
        return True
