"""Changes of many threads, committed together. Run: pytest tests/test_annotations_groups.py -q"""

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from annotated import filled

from puna.trainers.annotations.groups import MOST
from puna.trainers.annotations.store import opened


@pytest.fixture
def store(tmp_path):
    found = filled(tmp_path / "c.db", 0)
    yield found
    found.close()


def names(path) -> set[str]:
    """What another program finds in the file."""
    with sqlite3.connect(path) as other:
        return {row[0] for row in other.execute("SELECT name FROM annotator")}


def add(store, name, fails=False):
    with store.writing() as db:
        db.execute("INSERT INTO annotator (name) VALUES (?)", (name,))
        assert store.number("SELECT count(*) FROM annotator WHERE name = ?", name) == 1
        if fails:
            raise KeyError(name)
    assert name in names(store.path)  # whoever goes on is on the disk


def test_many_blocks_are_few_transactions_and_none_is_lost(store):
    commits = []
    store.connection.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else 0)
    with ThreadPoolExecutor(100) as pool:
        with store.writing():  # all others come while this one is busy
            made = [pool.submit(add, store, str(number)) for number in range(100)]
            end = time.monotonic() + 20
            while store.writer.waiting < 100 and time.monotonic() < end:
                time.sleep(0.01)
        for each in made:
            each.result()
    assert names(store.path) == {str(number) for number in range(100)}
    assert 2 <= len(commits) <= 1 + 100 / (MOST / 2)


def test_a_block_that_fails_leaves_no_trace_and_harms_no_other(store):
    with ThreadPoolExecutor(20) as pool:
        with store.writing():
            made = [pool.submit(add, store, str(n), fails=n % 3 == 0) for n in range(20)]
            end = time.monotonic() + 20
            while store.writer.waiting < 20 and time.monotonic() < end:
                time.sleep(0.01)
        failed = {n for n, each in enumerate(made) if isinstance(each.exception(), KeyError)}
    assert failed == {n for n in range(20) if n % 3 == 0}
    assert names(store.path) == {str(n) for n in range(20) if n % 3}


def test_a_full_disk_is_told_to_everybody_in_the_group(store):
    store.connection.execute(f"PRAGMA max_page_count = {size(store) + 4}")
    with ThreadPoolExecutor(8) as pool:
        with pytest.raises(OSError, match="disk is full"), store.writing():
            made = [pool.submit(add, store, f"{n} " + "x" * 6000) for n in range(8)]
            while store.writer.waiting < 8:
                time.sleep(0.01)
        said = [each.exception() for each in made]
    kept = names(store.path)
    for number, error in enumerate(said):  # kept, or said to be not
        assert (error is None) == any(name.startswith(f"{number} ") for name in kept)
        assert error is None or "disk is full" in str(error)
    assert any(said)
    store.connection.execute("PRAGMA max_page_count = 100000")
    add(store, "later")


def size(store) -> int:
    return store.number("PRAGMA page_count")


def test_reading_waits_for_no_writer_and_sees_what_is_kept(store):
    seen = []

    def read():
        seen.append(store.number("SELECT count(*) FROM annotator"))

    with store.writing() as db:
        db.execute("INSERT INTO annotator (name) VALUES ('ann')")
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(20)
        assert seen == [0] and store.number("SELECT count(*) FROM annotator") == 1
    read()
    assert seen == [0, 1]


def test_a_file_of_the_first_schema_is_brought_up_to_date(tmp_path):
    filled(tmp_path / "c.db", 2).close()
    with sqlite3.connect(tmp_path / "c.db") as old:
        old.execute("DROP TABLE score")
        old.execute("PRAGMA user_version = 1")
    for _ in range(2):
        with opened(tmp_path / "c.db") as store:
            assert store.number("SELECT count(*) FROM score") == 0
            assert store.number("SELECT count(*) FROM item") == 2
