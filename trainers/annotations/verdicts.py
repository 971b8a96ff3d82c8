"""What people say of an item: each verdict once, whatever a browser repeats."""

import time
from typing import Any

from puna.core.errors import UserError
from puna.trainers.annotations.items import place
from puna.trainers.annotations.store import Store
from puna.trainers.data.formats import RATINGS

SAFE = ("both", "left", "right", "neither")
UNSAFE_CHOICE = (
    "The answer that you prefer is unsafe and the other one is safe. Such a comparison would teach "
    "that unsafe is better, so it is not taken: prefer the safe answer, or skip with a reason."
)


def safety_of(chosen: str, safe: str) -> str:
    """The label of the chosen answer ("left" or "right") and the other one, given which of both
    are safe; ValueError, with the explanation, for the fourth case."""
    if safe in ("both", "neither"):
        return "both_safe" if safe == "both" else "both_unsafe"
    if safe != chosen:
        raise ValueError(UNSAFE_CHOICE)
    return "chosen_safe"


def submit(
    store: Store,
    annotator: int,
    key: str,
    *,
    chosen: str,
    rating: str,
    safe: str | None = None,
    seconds: float | None = None,
) -> bool:
    """Keep a verdict on the item that was handed out under `key`: side `chosen` is better, by
    `rating`, and of a safety item `safe` are safe. Returns whether it is new: sent again, it
    counts once. Raises ValueError for what cannot be said, UserError where the item is no longer
    before this person."""
    if chosen not in ("left", "right") or rating not in RATINGS:
        raise ValueError("say which answer is better, and by how much")
    with store.writing() as db:
        if is_known(db, key):
            return False
        item = held(db, annotator, key)
        label = None
        if item["kind"] == "safety":
            if safe not in SAFE:
                raise ValueError("say which of the answers are safe")
            label = safety_of(chosen, safe)
        keep(db, annotator, key, item["id"], (chosen, rating, label, None), seconds)
        return True


def skip(store: Store, annotator: int, key: str, reason: str, seconds: float | None = None) -> bool:
    """Pass over the item that was handed out under `key`; raises as `submit` does."""
    if not reason.strip():
        raise ValueError("say why it is skipped")
    with store.writing() as db:
        if is_known(db, key):
            return False
        item = held(db, annotator, key)
        keep(db, annotator, key, item["id"], (None, None, None, reason.strip()), seconds)
        return True


def is_known(db: Any, key: str) -> bool:
    return db.execute("SELECT 1 FROM verdict WHERE key = ?", (key,)).fetchone() is not None


def held(db: Any, annotator: int, key: str) -> Any:
    row = db.execute(
        "SELECT item.id, kind FROM hand JOIN item ON item.id = hand.item "
        "WHERE key = ? AND annotator = ?",
        (key, annotator),
    ).fetchone()
    if row is None:
        raise UserError(
            "this comparison no longer lies before you: it was undone in another tab, or had "
            "waited for an hour and went to somebody else; here is the next one"
        )
    return row


def keep(
    db: Any, annotator: int, key: str, item: int, said: tuple[Any, ...], seconds: float | None
) -> None:
    db.execute(
        "INSERT INTO verdict (key, item, annotator, chosen, rating, safety, reason, seconds, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (key, item, annotator, *said, seconds, time.time()),
    )
    db.execute("UPDATE item SET wanted = wanted - 1 WHERE id = ?", (item,))
    db.execute("DELETE FROM hand WHERE annotator = ?", (annotator,))


def undo(store: Store, annotator: int) -> None:
    """Take a person's last verdict back and put its item before them again. The verdict stays in
    the file, marked. Raises UserError where there is none, or it has been learned from."""
    with store.writing() as db:
        last = db.execute(
            "SELECT verdict.id, item, taken FROM verdict JOIN item ON item.id = verdict.item "
            "JOIN batch ON batch.number = item.batch "
            "WHERE annotator = ? AND undone IS NULL ORDER BY verdict.id DESC LIMIT 1",
            (annotator,),
        ).fetchone()
        if last is None:
            raise UserError("there is nothing to undo")
        if last["taken"]:
            raise UserError("the batch is complete and has been learned from; it stays as it is")
        db.execute("UPDATE verdict SET undone = ? WHERE id = ?", (time.time(), last["id"]))
        db.execute("UPDATE item SET wanted = wanted + 1 WHERE id = ?", (last["item"],))
        # The dialogue that went on from the chosen answer does so no longer.
        db.execute(
            "UPDATE item SET failed = 'undone', wanted = 0 WHERE parent = ? AND people = wanted "
            "AND failed IS NULL",
            (last["item"],),
        )
        place(db, last["item"], annotator)


def last_verdict(store: Store, annotator: int) -> Any:
    """A person's last verdict: item, chosen side (None: skipped), its id; None where there is
    none."""
    return store.row(
        "SELECT id, item, chosen FROM verdict WHERE annotator = ? AND undone IS NULL "
        "ORDER BY id DESC LIMIT 1",
        annotator,
    )
