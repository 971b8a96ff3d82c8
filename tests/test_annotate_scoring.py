"""Reward models on what people say now. Run: pytest tests/test_annotate_scoring.py -q"""

import os
import time

import pytest
from annotate_pages import visitor
from annotated import filled

from puna.annotate.background import Background, Requests
from puna.annotate.scoring import Scoring
from puna.annotate.statistics import seen
from puna.core.checkpoint.folder import load_model, tokenizer_path
from puna.core.packed import score
from puna.core.text.chat import encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.annotations.exchange import preferences
from puna.trainers.annotations.items import hand_out
from puna.trainers.annotations.people import person
from puna.trainers.annotations.verdicts import submit, undo


def compared(store, chosen):
    who = person(store, "ann")
    for side in chosen:
        submit(store, who, hand_out(store, who).key, chosen=side, rating="better")


def written(folder, seconds_ago):
    for file in folder.iterdir():
        os.utime(file, (when := time.time() - seconds_ago, when))


def work(scoring) -> int:
    steps = 0
    while scoring.step():
        steps += 1
    return steps


@pytest.fixture
def judge(tiny, tmp_path):
    """A reward model that was written an hour ago."""
    from shutil import copytree

    copytree(tiny / "helpfulness", tmp_path / "judge")
    written(tmp_path / "judge", 3600)
    return tmp_path / "judge"


def test_the_share_right_is_that_of_scores_by_hand(judge, tmp_path):
    store = filled(tmp_path / "c.db", 30)
    compared(store, ["left", "right"] * 12)
    scoring = Scoring(store, {"helpfulness": judge}, "cpu")
    assert work(scoring) == 2 and not scoring.step()
    model, tokenizer = load_model(judge), Tokenizer(tokenizer_path(judge))
    hits = 0
    for row in preferences(store):
        prompt = encode_prompt(tokenizer, row["messages"])
        good, bad = score(
            model,
            [prompt + encode_answer(tokenizer, row[side]) for side in ("chosen", "rejected")],
        ).tolist()
        hits += good > bad
    ((name, share),) = seen(store).rewards
    assert name.startswith("batch 1, helpfulness: ") and name.split("(")[1][:6]
    assert share.pairs == 24 and share.share == pytest.approx(hits / 24)
    assert f"{share.share:.0%} of 24" in visitor(store).get("/dashboard").text
    undo(store, person(store, "ann"))
    assert seen(store).rewards[0][1].pairs == 23


def test_nothing_is_scored_that_may_have_been_learned_from(judge, tmp_path):
    store = filled(tmp_path / "c.db", 30)
    compared(store, ["left"] * 5)
    with store.writing() as db:
        db.execute("UPDATE verdict SET at = at - 7200 WHERE id <= 2")  # before it was written
    work(Scoring(store, {"helpfulness": judge}, "cpu"))
    ((_, share),) = seen(store).rewards
    assert share.pairs == 3
    # The next model, trained on these, was written later: it gets what comes after, and what the
    # first one got stays.
    for file in judge.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    compared(store, ["right"] * 4)
    work(Scoring(store, {"helpfulness": judge}, "cpu"))
    assert [share.pairs for _, share in seen(store).rewards] == [3, 4]


def test_what_is_no_reward_model_is_refused(tiny, tmp_path):
    store = filled(tmp_path / "c.db", 1)
    with pytest.raises(ValueError, match="is a language model; safety_reward takes"):
        Scoring(store, {"safety": tiny / "lm"}, "cpu")


def test_work_beside_the_page_ends_waits_and_outlives_what_may_pass(monkeypatch):
    steps = iter([True, OSError("the disk is full"), True, ValueError("broken")])
    said = []

    def step():
        each = next(steps)
        said.append(background.problem)
        if isinstance(each, Exception):
            raise each
        return each

    background = Background(step, "no more")
    background.start()
    background.wake.set()
    background.thread.join(20)
    assert said == ["", "", "the disk is full", ""] and background.problem == "no more: broken"


def test_people_go_before_work_but_do_not_stop_it():
    requests = Requests()
    with requests.one():
        with requests.one():
            pass
        began = time.monotonic()
        requests.give_way()
        assert time.monotonic() - began > 0.1
    assert requests.none.is_set()
