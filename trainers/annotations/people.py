"""Who compares: people with an address of their own, of whose token only a hash is kept."""

import hashlib
import secrets

from puna.trainers.annotations.store import Store


def digest(token: str) -> str:
    """A token is long and random, so that a plain hash of it tells nothing."""
    return hashlib.sha256(token.encode()).hexdigest()


def person(store: Store, name: str, *, owner: bool = False) -> int:
    """The id of the person called so, who is new where there is none yet."""
    find = "SELECT id FROM annotator WHERE name = ?"
    known = store.row(find, name)
    if known is not None:
        return int(known[0])
    with store.writing() as db:
        db.execute("INSERT OR IGNORE INTO annotator (name, owner) VALUES (?, ?)", (name, owner))
        return int(db.execute(find, (name,)).fetchone()[0])


def new_token(store: Store, name: str, *, owner: bool = False, renew: bool = False) -> str | None:
    """A token for this person, to be shown once; None where they have one and keep it."""
    who, token = person(store, name, owner=owner), secrets.token_urlsafe(24)
    condition = "" if renew else " AND token_hash IS NULL"
    with store.writing() as db:
        made = db.execute(
            f"UPDATE annotator SET token_hash = ? WHERE id = ?{condition}", (digest(token), who)
        )
        return token if made.rowcount else None


def by_token(store: Store, token: str) -> tuple[int, bool] | None:
    """(id, is the owner) of the person with this token."""
    row = store.row("SELECT id, owner FROM annotator WHERE token_hash = ?", digest(token))
    return None if row is None else (row["id"], bool(row["owner"]))
