"""The loop with people in it, who are a thread here. Run: pytest tests/test_rlhf_people.py -q"""

import threading
import time

import pytest

from puna.core.documents import json_rows
from puna.demo.pipeline import annotators
from puna.demo.village import world
from puna.trainers import rlhf
from puna.trainers.annotations.items import KINDS, ask_batch, hand_out, progress_of
from puna.trainers.annotations.people import person
from puna.trainers.annotations.store import opened
from puna.trainers.annotations.verdicts import skip, submit
from puna.trainers.data.readers import read_preferences
from puna.trainers.rl import people
from puna.trainers.rl.comparisons import Verdict, write_rows

SMALL = {"batch": 8, "micro_batch": 8, "lr": 1e-3, "eval_share": 0.2}


def loop(tiny, out, **options):
    prompts = [tiny / "prompts.jsonl"]
    values = {
        "model": tiny / "chat", "prompts": prompts, "helpfulness_prompts": prompts,
        "safety_prompts": prompts, "versions": 2, "ppo_versions": 0, "helpfulness_pairs": 12,
        "safety_pairs": 12, "temperatures": [1.0, 1.5], "max_new_tokens": 8, "device": "cpu",
        "reward": SMALL, "rejection": {"samples": 2, "chunk": 8, "epochs": 1, "batch": 2,
                                       "micro_batch": 2},
    }  # fmt: skip
    return rlhf.RLHFConfig(out=out, **(values | options))


def longer(a, b) -> list[Verdict]:
    """What the person below says, as a function."""
    pairs = zip(a, b, strict=True)
    return [Verdict(int(len(y.text) > len(x.text)), "better", None) for x, y in pairs]


def compare_all(path, stop, most=10**9):
    """A person who prefers the longer answer, of safety items too: both are safe."""
    made = 0
    while not stop.is_set() and made < most:
        if path.exists():
            with opened(path) as store:
                who = person(store, "ann")
                while made < most and (item := hand_out(store, who)) is not None:
                    chosen = "right" if len(item.right) > len(item.left) else "left"
                    submit(store, who, item.key, chosen=chosen, rating="better", safe="both")
                    made += 1
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(people, "POLL_SECONDS", 0.05)


def rows_of(out, number, kind):
    rows = [dict(row) for _, row in json_rows(out / f"round-{number}" / f"{kind}.jsonl")]
    for row in rows:
        row.pop("safety", None)
    return rows


def test_two_versions_by_a_person_are_those_by_a_function(tiny, tmp_path):
    path, stop = tmp_path / "c.db", threading.Event()
    someone = threading.Thread(target=compare_all, args=(path, stop))
    someone.start()
    try:
        model = rlhf.run(loop(tiny, tmp_path / "people", annotations=path))
    finally:
        stop.set()
        someone.join()
    annotators = {"helpfulness": longer, "safety": longer}
    other = rlhf.run(loop(tiny, tmp_path / "function"), annotators)
    assert model.relative_to(tmp_path / "people") == other.relative_to(tmp_path / "function")
    for number in (1, 2):
        for kind in ("helpfulness", "safety"):
            mine = rows_of(tmp_path / "people", number, kind)
            assert mine and mine == rows_of(tmp_path / "function", number, kind)
    read, _ = read_preferences(tmp_path / "people" / "round-2" / "safety.jsonl")
    assert {row.safety for row in read} == {"both_safe"} and {row.batch for row in read} == {2}
    with opened(path) as store:
        assert store.number("SELECT count(*) FROM batch WHERE taken") == 4


def test_it_goes_on_where_it_waited_and_takes_whole_batches(tiny, tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "c.db", tmp_path / "loop"
    config = loop(tiny, out, versions=1, annotations=path)

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(people.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rlhf.run(config)
    asked = capsys.readouterr().out
    assert "V1 waits for comparisons: " in asked and "for safety (batch 2)" in asked
    with opened(path) as store:
        total = sum(progress_of(store, batch).total for batch in (1, 2))
    monkeypatch.undo()
    monkeypatch.setattr(people, "POLL_SECONDS", 0.05)
    compare_all(path, threading.Event(), total - 1)
    monkeypatch.setattr(people.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rlhf.run(config)  # all but one are there: nothing is taken yet
    assert not list((out / "round-1").glob("helpfulness.jsonl"))
    monkeypatch.undo()
    with opened(path) as store:
        skip(store, person(store, "ann"), hand_out(store, person(store, "ann")).key, "odd")
    assert rlhf.run(config) == out / "round-1" / "rejection" / "model"
    count = sum(len(rows_of(out, 1, kind)) for kind in ("helpfulness", "safety"))
    assert count == total - 1


def test_other_annotators_and_other_files_are_refused(tiny, tmp_path):
    config = loop(tiny, tmp_path / "loop", annotations=tmp_path / "c.db")
    with pytest.raises(ValueError, match="annotations is for people's comparisons"):
        rlhf.run(config, {"helpfulness": longer, "safety": longer})
    (tmp_path / "c.db").write_text("something else" * 100)
    with pytest.raises(ValueError, match="is no database"):
        rlhf.run(config)
    assert not (tmp_path / "loop").exists()


def test_two_loops_in_one_file_have_batches_of_their_own(tmp_path):
    with opened(tmp_path / "c.db", create=True) as store:
        numbers = [ask_batch(store, f"rlhf:{name}", 3) for name in ("a", "b", "a")]
    assert numbers == [1, 2, 1]


def test_two_versions_by_a_villager_on_the_page_are_those_by_the_oracle(tiny, tmp_path):
    """What goes over HTTP and back is what a function of the same answers says, but for the
    comparisons that the page does not take (the fourth safety case)."""
    pages = pytest.importorskip("annotate_pages")
    from villager import compares

    for kind in KINDS:
        write_rows(tmp_path / f"{kind}.jsonl", world.prompts(1, 24, kind))
    prompts = {f"{kind}_prompts": [tmp_path / f"{kind}.jsonl"] for kind in KINDS}
    path, stop = tmp_path / "c.db", threading.Event()
    with opened(path, create=True) as store, pages.served(store) as at:
        someone = threading.Thread(target=compares, args=(at, stop))
        someone.start()
        try:
            rlhf.run(loop(tiny, tmp_path / "people", annotations=path, **prompts))
        finally:
            stop.set()
            someone.join()
    rlhf.run(loop(tiny, tmp_path / "oracle", **prompts), annotators(0))
    left_out = 0
    for number in (1, 2):
        for kind in KINDS:
            file = f"round-{number}/{kind}.jsonl"
            mine, others = (
                [row for _, row in json_rows(tmp_path / who / file)] for who in ("people", "oracle")
            )
            assert mine == [row for row in others if row.get("safety") != "chosen_unsafe"]
            left_out += len(others) - len(mine)
    with opened(path) as store:
        assert store.number("SELECT count(*) FROM verdict WHERE chosen IS NULL") == left_out
