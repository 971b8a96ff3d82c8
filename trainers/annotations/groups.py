"""Changes of many threads, for which the disk is waited for once.

A disk takes milliseconds to confirm that something is kept, so that fifty people who submit at once
would wait for each other. Here a thread that is done leaves the transaction to the next one that
wants to write, each in a savepoint of its own, and the last one commits for all; every one of them
goes on when that is confirmed.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 64  # blocks in a transaction, so that it ends however many come


class Group:
    """Blocks that are committed together."""

    def __init__(self) -> None:
        self.size = 0
        self.ended = threading.Event()
        self.error: BaseException | None = None  # what kept it from the disk


class Writer:
    """A connection in autocommit mode to which several threads write."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection, self.turn = connection, threading.Lock()
        self.counting, self.waiting = threading.Lock(), 0  # threads that want to write
        self.thread: int | None = None  # whose block is being run
        self.group = Group()

    def is_mine(self) -> bool:
        """Whether this is asked inside of a block."""
        return self.thread == threading.get_ident()

    @contextmanager
    def block(self) -> Iterator[sqlite3.Connection]:
        """Changes that are on the disk when the block has ended, or leave no trace."""
        with self.my_turn():
            if not self.connection.in_transaction:
                self.connection.execute("BEGIN IMMEDIATE")
                self.group = Group()
            group = self.group
            try:
                with self.savepoint():
                    yield self.connection
            except BaseException as error:
                if not self.connection.in_transaction:  # a full disk has ended it for all
                    group.error = error
                raise
            finally:
                self.end(group)
        group.ended.wait()
        if group.error is not None:
            raise group.error

    @contextmanager
    def my_turn(self) -> Iterator[None]:
        self.count(1)
        try:
            self.turn.acquire()
        finally:
            self.count(-1)
        try:
            yield
        finally:
            self.turn.release()

    def count(self, change: int) -> None:
        with self.counting:
            self.waiting += change

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """One block's part of a transaction."""
        self.connection.execute("SAVEPOINT block")
        self.thread = threading.get_ident()
        try:
            yield
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK TO block")
            raise
        finally:
            self.thread = None
            if self.connection.in_transaction:
                self.connection.execute("RELEASE block")

    def end(self, group: Group) -> None:
        """Commit, unless another thread is about to add its part."""
        group.size += 1
        if group.error is None and self.waiting and group.size < MOST:
            return
        try:
            if group.error is None:
                self.connection.execute("COMMIT")
        except BaseException as error:
            group.error = error
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
        group.ended.set()
