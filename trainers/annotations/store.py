"""The file that people's comparisons are kept in: SQLite, written ahead, one file and one schema.

batch      what is collected together, with a number of its own
item       a dialogue that ends with a user message; `wanted` verdicts on it are still missing
answer     the left and the right answer to an item, and what gave each
annotator  a person; of the token in their address only a hash is kept
hand       an item that lies before somebody now, under a key
verdict    what somebody said of an item, under the key it was handed out with: a key is taken
           once, so nothing counts twice however often it is sent
score      by how much a reward model puts the chosen answer above the other one
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.core.checkpoint.atomic import make_folder, remove_empty
from puna.trainers.annotations.groups import Writer

APPLICATION = 0x50756E61  # "Puna"
SCHEMA = 2
BUSY_SECONDS = 10.0

TABLES = """
CREATE TABLE batch (
    number INTEGER PRIMARY KEY, source TEXT NOT NULL UNIQUE, expected INTEGER NOT NULL,
    taken INTEGER NOT NULL DEFAULT 0);
CREATE TABLE annotator (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, token_hash TEXT UNIQUE,
    owner INTEGER NOT NULL DEFAULT 0);
CREATE TABLE item (
    id INTEGER PRIMARY KEY, batch INTEGER NOT NULL REFERENCES batch, kind TEXT NOT NULL,
    source TEXT NOT NULL UNIQUE, messages TEXT NOT NULL, people INTEGER NOT NULL,
    wanted INTEGER NOT NULL, reserved INTEGER REFERENCES annotator, parent INTEGER REFERENCES item,
    ready INTEGER NOT NULL DEFAULT 0, failed TEXT);
CREATE INDEX item_open ON item (id) WHERE wanted > 0 AND ready AND failed IS NULL;
CREATE INDEX item_unanswered ON item (id) WHERE NOT ready AND failed IS NULL;
CREATE INDEX item_reserved ON item (reserved) WHERE reserved IS NOT NULL;
CREATE INDEX item_batch ON item (batch);
CREATE TABLE answer (
    item INTEGER NOT NULL REFERENCES item, side TEXT NOT NULL CHECK (side IN ('left', 'right')),
    text TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL, temperature REAL, seed INTEGER,
    PRIMARY KEY (item, side));
CREATE TABLE hand (
    annotator INTEGER PRIMARY KEY REFERENCES annotator, item INTEGER NOT NULL REFERENCES item,
    key TEXT NOT NULL UNIQUE, since REAL NOT NULL);
CREATE INDEX hand_item ON hand (item);
CREATE TABLE verdict (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, item INTEGER NOT NULL REFERENCES item,
    annotator INTEGER NOT NULL REFERENCES annotator, chosen TEXT, rating TEXT, safety TEXT,
    reason TEXT, seconds REAL, at REAL NOT NULL, undone REAL);
CREATE UNIQUE INDEX verdict_once ON verdict (item, annotator) WHERE undone IS NULL;
CREATE INDEX verdict_annotator ON verdict (annotator, id);
"""
SCORE = """
CREATE TABLE score (
    verdict INTEGER NOT NULL REFERENCES verdict, version TEXT NOT NULL, model TEXT NOT NULL,
    difference REAL, PRIMARY KEY (verdict, version));
"""  # new in schema 2


class Store:
    """An open file of comparisons; its methods may be called from several threads. They read from
    one connection, what is on the disk, and write to another."""

    def __init__(self, path: Path, connection: sqlite3.Connection, reader: sqlite3.Connection):
        self.path, self.connection, self.reader = path, connection, reader
        self.writer, self.reading = Writer(connection), threading.Lock()

    def rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """What a query finds; inside of a `writing` block with what was changed there."""
        with naming(self.path):
            if self.writer.is_mine():
                return self.connection.execute(sql, values).fetchall()
            with self.reading:
                return self.reader.execute(sql, values).fetchall()

    def row(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row that a query finds."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    def number(self, sql: str, *values: Any) -> int:
        """A query that counts."""
        return int(self.rows(sql, *values)[0][0])

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Changes that are on the disk when the block has ended, or leave no trace; inside of
        another block, a part of it."""
        if self.writer.is_mine():
            yield self.connection
            return
        with naming(self.path), self.writer.block() as db:
            yield db

    def close(self) -> None:
        with self.writer.turn, self.reading:
            self.reader.close()
            self.connection.close()


@contextmanager
def opened(path: Path, *, create: bool = False) -> Iterator[Store]:
    """`open_store`, closed when the block ends; where that is over an error before anything to
    compare, or anybody who does, is in a new file, it goes again."""
    new = create and not path.exists()
    made = make_folder(path.parent) if new else []
    empty = False
    try:
        store = open_store(path, create=create)
        try:
            yield store
        except Exception:
            empty = new and not any(
                store.number(f"SELECT count(*) FROM {table}") for table in ("item", "annotator")
            )
            raise
        finally:
            store.close()
            if empty:
                path.unlink()
    finally:
        remove_empty(made)


def open_store(path: Path, *, create: bool = False) -> Store:
    """Open the file, or with `create` make it where there is none. Raises ValueError for a file of
    something else or of a newer Puna, OSError where the disk is full or another program holds it
    locked."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; name a file of comparisons")
    if not path.exists() and not create:
        raise ValueError(f"{path}: no such file; puna annotate makes it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # it holds what people said, so that it is readable for its owner alone
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    with naming(path):
        connection = connected(path)
        store = Store(path, connection, connected(path))
        try:
            check_ours(store)
            write_ahead(store)
            connection.execute("PRAGMA synchronous = FULL")  # what was said to be kept is kept
            connection.execute("PRAGMA foreign_keys = ON")
            make_tables(store)
        except BaseException:
            store.close()
            raise
    return store


def connected(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode, for any thread."""
    made = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    made.row_factory = sqlite3.Row
    return made


def check_ours(store: Store) -> None:
    """ValueError where the file is not ours, or of a newer schema."""
    tables = store.number("SELECT count(*) FROM sqlite_master")
    application = store.number("PRAGMA application_id")
    if tables and application != APPLICATION:
        raise ValueError(f"{store.path} is a database of something else; name another file")
    version = store.number("PRAGMA user_version")
    if tables and version > SCHEMA:
        raise ValueError(
            f"{store.path} was written by a newer Puna (schema {version}, this one knows "
            f"{SCHEMA}); update Puna to open it"
        )


def write_ahead(store: Store) -> None:
    """Switch the write-ahead log on; where another program does so now, SQLite does not wait."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        problem = OSError(f"{store.path} stands where SQLite cannot write; put it on a local disk")
        try:
            if store.rows("PRAGMA journal_mode = WAL")[0][0] == "wal":
                return
        except OSError as error:
            problem = error
        if time.monotonic() > end:
            raise problem
        time.sleep(0.02)


def make_tables(store: Store) -> None:
    """The tables of a new file or what an older one lacks, all or none, whichever of two programs
    is first."""
    with store.writing() as db:
        if db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA:
            return
        is_new = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        for statement in (TABLES * is_new + SCORE).split(";\n"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {SCHEMA}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """SQLite's errors as one sentence that names the file and the way out."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # of our own making
    except sqlite3.DatabaseError as error:
        said = str(error)
        if "locked" in said or "busy" in said:
            raise OSError(
                f"{path} is locked by another program; close it there and try again: nothing is "
                "lost"
            ) from error
        if "disk is full" in said or "disk I/O" in said:
            raise OSError(
                f"the disk is full: {path} was not written and holds all that it held; free some "
                "space and try again"
            ) from error
        if "not a database" in said or "malformed" in said:
            raise ValueError(
                f"{path} is no database or a damaged one; name another file"
            ) from error
        if "readonly" in said or "unable to open" in said:
            raise ValueError(f"{path} cannot be written; see to its folder's rights") from error
        raise
