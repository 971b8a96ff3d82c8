"""The file of comparisons. Run: python -m pytest tests/test_annotations.py -q"""

import json
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from annotated import ask, filled

from puna.cli.main import main
from puna.core.errors import UserError
from puna.trainers import reward
from puna.trainers.annotations import exchange
from puna.trainers.annotations.items import (
    add_item,
    ask_batch,
    close_batch,
    hand_out,
    progress_of,
    waiting_ahead,
)
from puna.trainers.annotations.people import by_token, new_token, person
from puna.trainers.annotations.store import SCHEMA, open_store, opened
from puna.trainers.annotations.verdicts import safety_of, skip, submit, undo
from puna.trainers.data.readers import read_preferences

BETTER = {"chosen": "left", "rating": "better"}


@pytest.fixture
def store(tmp_path):
    found = filled(tmp_path / "c.db")
    yield found
    found.close()


def test_a_reload_and_a_second_tab_get_the_same_item(store):
    ann, bob = person(store, "ann"), person(store, "bob")
    first = hand_out(store, ann)
    assert hand_out(store, ann) == first
    assert hand_out(store, bob).id != first.id  # no item is given twice
    assert first.left.startswith("left") and waiting_ahead(store) == 2


def test_a_verdict_counts_once_however_often_it_is_sent(store):
    ann = person(store, "ann")
    item = hand_out(store, ann)
    assert submit(store, ann, item.key, **BETTER)
    assert not submit(store, ann, item.key, **BETTER)
    assert not submit(store, ann, item.key, chosen="right", rating="negligibly_better")
    assert [row["rating"] for row in exchange.preferences(store)] == ["better"]
    assert hand_out(store, ann).id != item.id and progress_of(store, item.batch) == (1, 4)


def test_undo_brings_the_item_back_under_another_key(store):
    ann = person(store, "ann")
    with pytest.raises(UserError, match="nothing to undo"):
        undo(store, ann)
    item = hand_out(store, ann)
    submit(store, ann, item.key, **BETTER)
    hand_out(store, ann)
    undo(store, ann)
    again = hand_out(store, ann)
    assert again.id == item.id and again.key != item.key
    assert not submit(store, ann, item.key, **BETTER)  # an old tab sends it once more
    assert progress_of(store, item.batch).done == 0
    assert submit(store, ann, again.key, chosen="right", rating="better")
    (row,) = exchange.preferences(store)
    assert row["chosen"] == item.right and row["chosen_model"] == "B" and row["chosen_seed"] == 4
    assert store.number("SELECT count(*) FROM verdict") == 2  # what was undone is still there


def test_what_is_learned_from_is_not_undone(store):
    ann = person(store, "ann")
    for _ in range(4):
        assert not close_batch(store, 1)
        submit(store, ann, hand_out(store, ann).key, **BETTER)
    assert hand_out(store, ann) is None and close_batch(store, 1)
    with pytest.raises(UserError, match="has been learned from"):
        undo(store, ann)


def test_overlap_and_skip(tmp_path):
    with_two = filled(tmp_path / "c.db", 1, people=2)
    ann, bob, cid = (person(with_two, name) for name in ("ann", "bob", "cid"))
    items = [hand_out(with_two, who) for who in (ann, bob, cid)]
    assert items[0].id == items[1].id and items[2] is None
    submit(with_two, ann, items[0].key, **BETTER)
    assert hand_out(with_two, ann) is None  # nobody is asked twice
    with pytest.raises(ValueError, match="say why"):
        skip(with_two, bob, items[1].key, " ")
    assert skip(with_two, bob, items[1].key, "both wrong")
    assert progress_of(with_two, 1) == (2, 2) and len(list(exchange.preferences(with_two))) == 1


def test_nobody_sends_what_lies_before_another(store):
    ann, bob = person(store, "ann"), person(store, "bob")
    item = hand_out(store, ann)
    with pytest.raises(UserError, match="no longer lies before you"):
        submit(store, bob, item.key, **BETTER)
    with pytest.raises(ValueError, match="which answer is better"):
        submit(store, ann, item.key, chosen="left", rating="great")
    assert progress_of(store, 1).done == 0 and hand_out(store, ann) == item


@pytest.mark.parametrize(
    "chosen, safe, label",
    [
        ("left", "both", "both_safe"), ("right", "neither", "both_unsafe"),
        ("left", "left", "chosen_safe"), ("right", "right", "chosen_safe"),
        ("left", "right", None), ("right", "left", None),
    ],
)  # fmt: skip
def test_the_fourth_case_is_refused_with_its_reason(chosen, safe, label):
    if label is None:
        with pytest.raises(ValueError, match="would teach that unsafe is better"):
            safety_of(chosen, safe)
    else:
        assert safety_of(chosen, safe) == label


def test_only_hashes_of_tokens_are_in_the_file(tmp_path):
    with opened(tmp_path / "c.db", create=True) as store:
        token = new_token(store, "ann")
        owner = new_token(store, "owner", owner=True)
        assert new_token(store, "ann") is None
        assert by_token(store, token) == (person(store, "ann"), False)
        assert by_token(store, owner)[1] and by_token(store, "x") is None
        fresh = new_token(store, "ann", renew=True)
        assert by_token(store, token) is None and by_token(store, fresh)
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert fresh.encode() not in held and b"ann" in held
    assert (tmp_path / "c.db").stat().st_mode & 0o077 == 0


def test_many_at_once_lose_and_double_nothing(tmp_path):
    store = filled(tmp_path / "c.db", 60)

    def work(name):
        who, ids = person(store, name), []
        while (item := hand_out(store, who)) is not None:
            with ThreadPoolExecutor(2) as two_tabs:
                sent = two_tabs.map(lambda key: submit(store, who, key, **BETTER), [item.key] * 2)
            assert sorted(sent) == [False, True]
            ids.append(item.id)
        return ids

    with ThreadPoolExecutor(6) as people:
        found = sum(people.map(work, "abcdef"), [])
    assert len(found) == len(set(found)) == 60 == len(list(exchange.preferences(store)))


KILLED = """
import os, signal, sys
from pathlib import Path
from puna.trainers.annotations.items import hand_out
from puna.trainers.annotations.people import person
from puna.trainers.annotations.store import open_store
from puna.trainers.annotations.verdicts import submit
store = open_store(Path(sys.argv[1]))
who = person(store, "ann")
while True:
    item = hand_out(store, who)
    submit(store, who, item.key, chosen="left", rating="better")
    print(item.id, flush=True)
"""


def test_what_was_said_to_be_kept_survives_kill_9(tmp_path):
    filled(tmp_path / "c.db", 400).close()
    said = []
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "c.db")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said += [process.stdout.readline() for _ in range(9)]
        process.kill()
        said += process.stdout.readlines()
        process.wait()
    said = [int(line) for line in said if line.endswith("\n")]
    with opened(tmp_path / "c.db") as store:
        kept = [row["item"] for row in exchange.preferences(store)]
    assert len(said) >= 27 and len(set(kept)) == len(kept)
    assert set(said) <= set(kept) and len(kept) <= len(said) + 3  # killed before it could say so


def test_other_files_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no such file; puna annotate makes it"):
        open_store(tmp_path / "c.db")
    with pytest.raises(ValueError, match="is no file"):
        open_store(tmp_path)
    (tmp_path / "text.db").write_text("not a database, but long enough to be taken for one" * 9)
    with pytest.raises(ValueError, match="is no database or a damaged one"):
        open_store(tmp_path / "text.db", create=True)
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE t (x)")
    foreign.close()
    before = (tmp_path / "foreign.db").read_bytes()
    with pytest.raises(ValueError, match="a database of something else"):
        open_store(tmp_path / "foreign.db", create=True)
    assert (tmp_path / "foreign.db").read_bytes() == before
    with opened(tmp_path / "c.db", create=True) as store:
        store.connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(ValueError, match=rf"newer Puna \(schema {SCHEMA + 1}, this one"):
        open_store(tmp_path / "c.db")


def test_a_locked_file_and_a_full_disk_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("puna.trainers.annotations.store.BUSY_SECONDS", 0.05)
    store = filled(tmp_path / "c.db")
    ann = person(store, "ann")
    item = hand_out(store, ann)
    other = sqlite3.connect(tmp_path / "c.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match="is locked by another program"):
        submit(store, ann, item.key, **BETTER)
    other.execute("ROLLBACK")
    pages = store.number("PRAGMA page_count")
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match="the disk is full"):
        for number in range(100):
            add_item(store, 1, "helpfulness", f"more:{number}", ask("x" * 3000))
    store.connection.execute("PRAGMA max_page_count = 100000")
    assert submit(store, ann, item.key, **BETTER) and progress_of(store, 1).done == 1


@pytest.mark.parametrize("said", [False, True])
def test_a_mistake_leaves_a_new_file_only_if_there_is_something_in_it(tmp_path, said):
    path = tmp_path / "new" / "c.db"
    with pytest.raises(ValueError, match="damaged"), opened(path, create=True) as store:
        ask_batch(store, "annotate:1", 4, 1)
        if said:
            new_token(store, "ann")
        raise ValueError("damaged")
    assert [each.name for each in tmp_path.rglob("*")] == (["new", "c.db"] if said else [])
    before = {*tmp_path.iterdir()}
    with pytest.raises(ValueError, match="no such"), opened(tmp_path / "c.db") as store:
        pass
    assert {*tmp_path.iterdir()} == before


def test_two_programs_that_make_the_file_at_once(tmp_path):
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait()
        with opened(tmp_path / "c.db", create=True) as store:
            return ask_batch(store, "one", 3)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(4))) == {1}


def test_a_batch_has_one_number_and_one_owner(store):
    assert ask_batch(store, "test", 9) == 1 and progress_of(store, 1).total == 9
    assert ask_batch(store, "other", 1) == 2
    with pytest.raises(ValueError, match="batch 1 of .* was asked for by somebody else"):
        ask_batch(store, "third", 1, number=1)
    assert ask_batch(store, "third", 1, number=7) == 7


@pytest.fixture
def said(tmp_path):
    """A file in which everything was said once, and its preferences."""
    store = filled(tmp_path / "c.db", 6, kind="safety")
    ann = person(store, "ann")
    for number in range(6):
        chosen = "left" if number % 2 else "right"
        item = hand_out(store, ann)
        submit(store, ann, item.key, chosen=chosen, rating="slightly_better", safe="both")
    return store, list(exchange.preferences(store))


@pytest.mark.parametrize("form", exchange.FORMATS)
def test_what_goes_out_comes_in_again(said, tmp_path, form):
    store, rows = said
    file = tmp_path / "out.json"
    file.write_text(exchange.written(store, form), encoding="utf-8")
    read, skipped = exchange.read(file, form)
    assert len(skipped) == 0 and len(read) == 6
    for row, found in zip(rows, read, strict=True):
        assert found.messages == row["messages"] and found.chosen == row["chosen"]
        assert found.rejected == row["rejected"] and found.rating == row["rating"]
        assert found.safety == "both_safe" and found.batch == 1
        assert found.chosen_model == row["chosen_model"] and found.rejected_temperature is not None
    with opened(tmp_path / "other.db", create=True) as other:
        assert exchange.bring_in(other, read) == 6 and exchange.bring_in(other, read) == 0
        again = list(exchange.preferences(other))
    names = ("messages", "chosen", "rejected", "rating", "safety", "batch", "chosen_model")
    assert [[row[n] for n in names] for row in again] == [[row[n] for n in names] for row in rows]


def test_an_export_is_what_puna_reward_reads(said, tmp_path):
    store, rows = said
    file = tmp_path / "rows.jsonl"
    file.write_text(exchange.written(store, "puna"), encoding="utf-8")
    read, _ = read_preferences(file)
    assert [each.chosen for each in read] == [row["chosen"] for row in rows]
    trl = [json.loads(line) for line in exchange.written(store, "trl").splitlines()]
    assert trl[0]["prompt"] == rows[0]["messages"]
    assert trl[0]["chosen"] == [{"role": "assistant", "content": rows[0]["chosen"]}]


@pytest.mark.parametrize(
    "tasks, message",
    [
        ({}, "not a list of tasks"),
        ([3], "task 1: it is 3"),
        ([{"data": {}}], "task 1: annotations is missing"),
        ([{"data": {}, "annotations": [3]}], "an annotation is 3"),
        ([{"data": {}, "annotations": [{"result": [3]}]}], "a result is 3"),
    ],
)
def test_bad_tasks_are_named(tmp_path, tasks, message):
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps(tasks))
    with pytest.raises(ValueError, match=message):
        exchange.read(file, "label-studio")


def test_the_commands_and_a_reward_model_of_what_they_write(tiny, tmp_path, capsys):
    store = filled(tmp_path / "c.db", 24)
    ann, rows = person(store, "ann"), tmp_path / "rows.jsonl"
    export = ["annotate", "export", "--annotations", str(tmp_path / "c.db"), "--out", str(rows)]
    assert main(export) == 1 and "no comparison to write" in capsys.readouterr().err
    for _ in range(24):
        submit(store, ann, hand_out(store, ann).key, **BETTER)
    store.close()
    assert main(export) == 0 and "24 comparisons" in capsys.readouterr().out
    bring = ["annotate", "import", "--annotations", str(tmp_path / "d.db"), "--data", str(rows)]
    for said in ("24 new comparisons; there before: 0", "0 new comparisons; there before: 24"):
        assert main(bring) == 0 and said in capsys.readouterr().out
    (tmp_path / "twice.jsonl").write_text(rows.read_text() * 2)
    bring[3:] = [str(tmp_path / "e.db"), "--data", str(tmp_path / "twice.jsonl")]
    said = "24 new comparisons; there before: 0; more than once in the file: 24"
    assert main(bring) == 0 and said in capsys.readouterr().out
    config = reward.RewardConfig(
        model=tiny / "chat", data=[rows], out=tmp_path / "reward", batch=8, micro_batch=8, lr=1e-3,
        device="cpu",
    )  # fmt: skip
    assert (reward.run(config) / "config.json").exists()
