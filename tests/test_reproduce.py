"""`puna reproduce`: the experiments behind the four questions, at the smallest size.

Run: python -m pytest tests/test_reproduce.py -q
"""

import json
import math
import random
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from puna.demo.reproduce import arms, claims, measures, page, results, run, stages, tables
from puna.demo.reproduce.arms import ARMS, BY_NAME, SFT
from puna.demo.reproduce.base import repeat_prompts
from puna.demo.reproduce.claims import CLAIMS
from puna.demo.village import oracle, tasks
from puna.trainers.rl import rounds
from puna.trainers.rl.rewards import Answer

FEW = ("rejection", "second")
# The figures that each measure gives, by their beginnings.
GIVES = {
    "answers": ("wins", "reward", "helpful", "violations", "false", "borderline"),
    "instructions": ("kept", "attention"),
    "repeat": ("repeat",),
    "helpfulness pairs": ("right all", "right significantly", "right negligibly", "at the ends"),
    "branches": ("branch",),
    "safety pairs": ("right safety", "right both", "recall", "precision"),
}


def config(out: Path, **options) -> run.ReproduceConfig:
    return run.ReproduceConfig(out=out, scale=0.001, seeds=1, **options)


@pytest.fixture(scope="module")
def only_few():
    with pytest.MonkeyPatch.context() as patch:
        few = tuple(
            BY_NAME[name]._replace(measured=("answers", "branches"), extra=0) for name in FEW
        )
        patch.setattr(arms, "ARMS", few)
        yield


@pytest.fixture(scope="module")
def without_arms(only_few, tmp_path_factory) -> Path:
    """A run whose time was over when the base was made."""
    out = tmp_path_factory.mktemp("reproduce") / "run"
    run.run(config(out, minutes=1e-6))
    return out


@pytest.fixture(scope="module")
def whole(without_arms, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(without_arms, out)
    run.run(config(out))
    return out


def test_what_there_was_no_time_for_is_said(without_arms):
    found = json.loads((without_arms / "results.json").read_text())
    assert found["left_out"] == ["of seed 0 rejection, second"]
    assert set(found["arms"]) == {SFT} and found["arms"][SFT]["wins t1"]["mean"] == 0.5
    assert all(claim["verdict"] == "not measured" for claim in found["claims"])
    text = (without_arms / "experiments.md").read_text()
    assert "Left out, because the time was over: of seed 0 rejection, second." in " ".join(
        text.split()
    )
    assert "*Reward models by margin: not measured.*" in text


def test_killed_and_continued_gives_the_same(without_arms, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(without_arms, out)
    measured, calls = run.measured, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(run, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(config(out))
    assert not (out / "arms" / FEW[1] / "seed-0.json").exists()
    run.run(config(out))
    for name in ("results.json", "experiments.md"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert len(calls) == len(FEW) + 1  # what was measured is not measured again


def test_damaged_figures_are_made_anew(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    file = out / "arms" / FEW[1] / "seed-0.json"
    file.write_text(file.read_text()[:100])
    run.run(config(out))
    assert (out / "results.json").read_text() == (whole / "results.json").read_text()


def test_each_seed_has_judges_of_its_own(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "ARMS", (BY_NAME["rejection"]._replace(measured=("answers",)),))
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    run.run(config(out))
    first = out / "base" / "rlhf" / "round-1"
    second = out / "judges" / "seed-1" / "round-1"
    for kind in rounds.KINDS:
        assert (first / f"{kind}.jsonl").read_text() != (second / f"{kind}.jsonl").read_text()
    used = (out / "arms" / "rejection" / "seed-1" / "config.toml").read_text()
    assert str(second / "safety" / "model") in used
    found = results.read_results(out, 1)[SFT]
    assert found[0]["wins t1"] == found[1]["wins t1"] and "repeat t1" in found[1]
    assert found[0]["reward t1"] != found[1]["reward t1"]


def test_ppo_on_top_by_judges_that_know_its_start_and_by_the_oracle(whole, tmp_path, monkeypatch):
    few = [BY_NAME["rejection"]._replace(extra=0)]
    few += [arm._replace(extra=0) for arm in ARMS if arm.name.endswith(("-again", "-oracle"))]
    monkeypatch.setattr(arms, "ARMS", few)
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    run.run(config(out))
    again = (out / "arms" / "on-top-again" / "seed-0" / "config.toml").read_text()
    assert f"{out}/arms/helpfulness-again/seed-0/model" in again
    trained = (out / "arms" / "safety-again" / "seed-0" / "config.toml").read_text()
    assert all(f"round-{number}/safety.jsonl" in trained for number in (1, 2))
    assert "arms/rejection/seed-0/model" in trained
    assert "helpfulness" not in (
        out / "arms" / "on-top-oracle" / "seed-0" / "config.toml"
    ).read_text().replace("helpfulness_", "")
    assert set(results.read_results(out, 1)) == {SFT, *(arm.name for arm in few)}


def test_the_oracles_reward_is_what_wins_are_decided_by():
    question = tasks.draw_task(random.Random(0), kind="repeat").question
    answers = answers_to(question, "no", question, "x y z")
    rewards = stages.by_quality(answers)
    for a, first in zip(answers, rewards, strict=True):
        for b, second in zip(answers, rewards, strict=True):
            wins = oracle.better(a.messages, a.text, b.text)
            assert wins == (0.5 if first == second else float(first > second))


def test_the_page_shows_what_was_measured(whole):
    text = (whole / "experiments.md").read_text()
    found = json.loads((whole / "results.json").read_text())
    assert text.count("\n## ") == 4 and not re.search(r"\$|None|nan\b|inf\b", text)
    wins = found["arms"]["rejection"]["wins t1"]
    assert f"{100 * wins['mean']:.1f}% ({100 * wins['low']:.1f}% to" in text
    for line in text.splitlines():
        if line.startswith("!["):
            ElementTree.parse(whole / line.split("](")[1].rstrip(")"))
    assert "| Ghost Attention | 0 | not measured |" in text
    (claim,) = [c for c in found["claims"] if c["arm"] == "second"]
    apart = [found["arms"][arm]["wins t1"]["mean"] for arm in ("second", "rejection")]
    assert claim["difference"]["mean"] == pytest.approx(apart[0] - apart[1])


def test_the_page_is_written_again_from_the_figures(whole, tmp_path):
    assert page.write_again(whole, tmp_path) == tmp_path / "questions.md"
    assert (tmp_path / "questions.md").read_text() == (whole / "experiments.md").read_text()
    with pytest.raises(ValueError, match="let puna reproduce finish first"):
        page.write_again(tmp_path, tmp_path)


def test_another_run_stands_beside_each_comparison(whole, tmp_path):
    page.write_again(whole, tmp_path, [whole])
    text = (tmp_path / "questions.md").read_text()
    threads = json.loads((whole / "environment.json").read_text())["threads"]
    assert f"(seed 0 on {threads} thread" in text
    rows = [line for line in text.splitlines() if line.count(" | ") == 5 and " / " in line]
    rows = [line for line in rows if "| the paper |" not in line]
    assert len(rows) == len(CLAIMS)
    for row in rows:
        _, _, here, _, verdict, there = (cell.strip("| ") for cell in row.split(" | "))
        assert there == (here if here == "not measured" else f"{here}: {verdict}")


def test_the_branches_of_the_switch_are_counted_by_prompt(whole):
    figures = json.loads((whole / "arms" / "rejection" / "seed-0.json").read_text())
    rows = [figures[f"branch {name}"] for name in ("is_safety", "unsafe", "helpfulness")]
    assert all(sum(shares) == pytest.approx(1) for shares in zip(*rows, strict=True))
    lines = (whole / "data" / "first.jsonl").read_text().splitlines()
    assert rows[0] == [float(json.loads(line)["safety"]) for line in lines]


def test_every_claim_is_about_arms_that_measure_it():
    shared = measures_of(SFT)
    assert shared == run.SFT_MEASURED
    for claim in CLAIMS:
        for arm in (claim.arm, claim.other):
            beginnings = [start for which in measures_of(arm) for start in GIVES[which]]
            assert claim.figure.startswith(tuple(beginnings)), (claim, arm)
        assert claim.question in BY_NAME[claim.arm].questions
    for number, section in enumerate(page.SECTIONS, 1):
        own = [arm for arm in ARMS if number in arm.questions]
        assert own and set(section.table) <= set(page.COLUMNS)
        assert any(claim.leads for claim in CLAIMS if claim.question == number)


def measures_of(arm: str) -> tuple[str, ...]:
    return run.SFT_MEASURED if arm == SFT else BY_NAME[arm].measured


def test_what_an_arm_builds_on_comes_before_it_and_each_seed_before_the_next(monkeypatch):
    monkeypatch.setattr(arms, "ARMS", ARMS)  # all of them again
    plan = arms.planned(2)
    assert len({(arm.name, seed) for arm, seed in plan}) == len(plan)
    first = [seed for _, seed in plan]
    assert first == sorted(first[: 2 * len(ARMS)]) + first[2 * len(ARMS) :]
    for place, (arm, seed) in enumerate(plan):
        before = {other.name for other, own in plan[:place] if own == seed}
        assert arm.needs <= before, arm.name
    ranked = [seed for arm, seed in plan if arm.name == "margin-none"]
    assert ranked == [0, 1, 2, 3]


def test_one_seed_has_the_students_interval_over_prompts():
    found = tables.estimate([[0.0, 1.0, 1.0, 1.0]])
    half = 3.182 * math.sqrt(0.25 / 4)
    assert found == (0.75, 0.0, 1.0, 1, 4)  # a share does not leave 0 to 1
    signed = tables.estimate([[0.0, 1.0, 1.0, 1.0]], signed=True)
    assert (signed.low, signed.high) == pytest.approx((0.75 - half, 0.75 + half))


def test_seeds_that_agree_on_every_prompt_add_nothing():
    row = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5]
    alone, thrice = tables.estimate([row], signed=True), tables.estimate([row] * 3, signed=True)
    assert thrice[:3] == pytest.approx(alone[:3]) and (alone.seeds, thrice.seeds) == (1, 3)


def test_seeds_that_differ_alone_give_the_interval_over_seeds():
    found = tables.estimate([[0.1] * 50, [0.2] * 50, [0.6] * 50], signed=True)
    half = 4.303 * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half))


@pytest.mark.parametrize(("seeds", "prompts", "rest"), [(1, 1, 1), (0, 1, 1), (1, 0.1, 0.5)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, prompts, rest):
    rng = np.random.default_rng(0)
    hits, tries = 0, 1500
    for _ in range(tries):
        x = 0.1 * seeds * rng.normal(size=(3, 1)) + prompts * rng.normal(size=(1, 40))
        found = tables.estimate((x + rest * rng.normal(size=(3, 40))).tolist(), signed=True)
        hits += found.low <= 0 <= found.high
    assert 0.93 < hits / tries


def test_a_share_at_its_end_keeps_an_interval():
    found = tables.estimate([[1.0] * 100] * 2)
    assert found.mean == found.high == 1 and 0.95 < found.low < 0.97


def test_items_of_their_own_count_seed_by_seed():
    found = tables.estimate([[0.0, 1.0, 1.0], [1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert found.mean == pytest.approx((2 / 3 + 0.5 + 0.5) / 3) and found.items == 3
    assert found.low < 0.3 and found.high > 0.8


def test_a_difference_is_taken_prompt_by_prompt_of_common_seeds():
    rng = random.Random(0)
    hard = [rng.random() for _ in range(200)]
    one = {seed: {"wins": [0.8 * x + 0.1 for x in hard]} for seed in (0, 1, 2)}
    two = {seed: {"wins": [0.8 * x for x in hard]} for seed in (0, 2)}
    found = tables.difference({"a": one, "b": two}, "a", "b", "wins")
    assert found.mean == pytest.approx(0.1) and found.seeds == 2 and found.items == 200
    assert found.high - found.low < 1e-9 < tables.figure({"a": one}, "a", "wins").high
    assert tables.difference({"a": one}, "a", "b", "wins") is None
    assert tables.figure({}, "a", "wins") is None


def test_where_no_prompt_differs_others_could():
    same = {seed: {"wins": [0.5, 1.0] * 100, "reward": [0.5, 1.0] * 100} for seed in (0, 1, 2)}
    found = tables.difference({"a": same, "b": same}, "a", "b", "wins")
    assert found.mean == 0
    assert -found.low == found.high == pytest.approx(0.0188, abs=1e-4)  # Wilson: none of 200
    assert tables.difference({"a": same, "b": same}, "a", "b", "reward").high == 0


@pytest.mark.parametrize(
    ("sign", "low", "high", "said"),
    [
        (1, 0.01, 0.2, "agrees: higher"),
        (1, -0.2, -0.01, "disagrees: lower"),
        (-1, -0.2, -0.01, "agrees: lower"),
        (0, 0.01, 0.2, "higher here"),
        (1, -0.01, 0.2, "no difference shown"),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side(sign, low, high, said):
    claim = CLAIMS[0]._replace(sign=sign)
    assert claims.verdict(claim, tables.Estimate(0.1, low, high, 1, 1)) == said
    assert claims.verdict(claim, None) == "not measured"


def test_figures_for_reading():
    found = tables.Estimate(0.1234, -0.05, 0.3, 2, 10)
    assert results.with_interval("wins t1", found) == "12.3% (-5.0% to 30.0%)"
    assert results.with_interval("wins t1", found, signed=True) == "+12.3 (-5.0 to +30.0)"
    assert results.with_interval("reward t1", found, signed=True) == "+0.12 (-0.05 to +0.30)"
    assert results.with_interval("wins t1", None) == "not measured"


def test_a_pair_counts_once_however_many_of_its_answers_do():
    unsafe = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
    below = torch.tensor([[True, False], [True, True], [True, False], [False, False]])
    assert measures.shares(below, unsafe) == [0.5, 1.0, 0.0]  # recall
    assert measures.shares(unsafe, below) == [1.0, 0.5, 0.0]  # precision


def answers_to(question: str, *texts: str) -> list[Answer]:
    return [Answer([{"role": "user", "content": question}], text) for text in texts]


def test_lots_are_drawn_by_seed_and_question_and_know_nothing_of_the_answer():
    lots = stages.by_lot(3)
    good, bad = (lots(answers_to("why", *[text] * 400)) for text in ("yes", "no"))
    assert good == bad == lots(answers_to("why", *["yes"] * 400))
    assert stages.by_lot(4)(answers_to("why", "yes")) != lots(answers_to("why", "yes"))
    assert 0.4 < sum(good) / 400 < 0.6


def test_a_repetition_is_known_from_its_question():
    rng = random.Random(0)
    for kind in tasks.KINDS:
        question = tasks.draw_task(rng, kind=kind).question
        assert stages.is_repeat(question) == (kind == "repeat")


def test_repetitions_to_train_on_and_to_measure_share_none():
    sides = [
        {row["messages"][0]["content"] for row in repeat_prompts(0, 200, held_out=side)}
        for side in (False, True)
    ]
    assert [len(side) for side in sides] == [200, 200] and not sides[0] & sides[1]
