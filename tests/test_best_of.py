"""Run: python -m pytest tests/test_best_of.py -q"""

import itertools
import json
import random

import pytest
import torch

from puna.trainers.rl.best_of import (
    best_few,
    best_of,
    prompt_key,
    read_samples,
    reward_curve,
    why_none,
    write_samples,
)


def sample(question, score, *, finished=True, number=0, round=1, answer="yes"):
    return {
        "messages": [{"role": "user", "content": question}],
        "is_safety": False,
        "answer": answer,
        "tokens": [5, 2],
        "finished": finished,
        "score": score,
        "scores": {"helpfulness": score, "safety": 1.0},
        "round": round,
        "prompt": 0,
        "sample": number,
    }


def test_the_best_answer_to_each_prompt_is_kept():
    rows = [sample("a", 1.0), sample("a", 3.0), sample("b", -2.0), sample("a", 2.0)]
    assert best_of(rows) == [rows[1], rows[2]]


def test_unfinished_and_empty_answers_are_never_kept():
    rows = [sample("a", 9.0, finished=False), sample("a", 8.0, answer=""), sample("a", 1.0)]
    assert best_of(rows) == [rows[2]]
    assert best_of(rows[:2]) == []


def test_the_pool_reaches_over_all_rounds():
    """Paper 3.2.3: the best samples of V1 and V2 stay in the running for V3."""
    rows = [sample("a", 1.0, round=3), sample("a", 2.0, round=1), sample("old", 0.5, round=2)]
    assert [(s["round"], s["score"]) for s in best_of(rows)] == [(1, 2.0), (2, 0.5)]


def test_the_best_few_are_different_answers_best_first():
    rows = [
        sample("a", 1.0, answer="x"), sample("b", 0.0), sample("a", 3.0, answer="y"),
        sample("a", 3.0, answer="y", number=7), sample("a", 2.0, answer="x"),
        sample("a", 2.5, answer="z", finished=False), sample("a", 0.5, answer="w"),
    ]  # fmt: skip
    assert best_few(rows, 2) == [rows[2], rows[4], rows[1]]
    assert best_few(rows, 1) == best_of(rows) == [rows[2], rows[1]]


def test_what_a_round_hands_on_is_what_later_judges_can_choose():
    """Three rounds of 40 prompts by 8 samples, each round's judge another: how many final winners
    differ from those of a pool of all samples."""

    def judged(rows, judge):
        return [{**s, "score": random.Random(f"{judge} {s['answer']}").random()} for s in rows]

    def lost(few):
        handed, everything = [], []
        for round in (1, 2, 3):
            fresh = [
                sample(f"prompt {n}", 0.0, round=round, number=k, answer=f"{round} {n} {k}")
                for n in range(40)
                for k in range(8)
            ]
            everything += fresh
            if round < 3:
                handed += best_few(judged(fresh, round), few)
        found, best = best_of(judged([*handed, *fresh], 3)), best_of(judged(everything, 3))
        winners = {prompt_key(s["messages"]): s["answer"] for s in found}
        return sum(winners[prompt_key(s["messages"])] != s["answer"] for s in best)

    assert lost(1) > 15 and lost(4) < lost(1) and lost(8) == 0


def test_ties_go_to_the_earlier_sample():
    rows = [sample("a", 1.0, number=0), sample("a", 1.0, number=1)]
    assert best_of(rows)[0]["sample"] == 0


def test_prompts_with_the_same_last_message_but_another_history_differ():
    longer = sample("a", 5.0)
    longer["messages"] = [{"role": "system", "content": "x"}, *longer["messages"]]
    assert len(best_of([sample("a", 1.0), longer])) == 2


ALL = torch.ones(7, 20, dtype=torch.bool)


def test_what_cannot_be_kept_is_no_best():
    """By brute force over all subsets; an unfinished answer's high score once counted."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 5, generator=draw)
    usable = torch.rand(6, 5, generator=draw) < 0.5
    usable[0] = False
    usable[1] = torch.tensor([True, False, False, False, False])
    scores[1, 1] = 99.0
    for row in reward_curve(scores, usable):
        subsets = [list(s) for s in itertools.combinations(range(5), row["k"])]
        best = []
        for prompt in range(1, 6):
            found = [
                scores[prompt, s][usable[prompt, s]].max()
                for s in subsets
                if usable[prompt, s].any()
            ]
            best.append(torch.stack(found).mean().item())
        assert row["best"] == pytest.approx(sum(best) / 5, abs=1e-6)
        kept = [usable[:, s].any(1).double().mean() for s in subsets]
        assert row["kept"] == pytest.approx(float(torch.stack(kept).mean()))
        first = [scores[p][usable[p]][: row["k"]] for p in range(6)]
        means = [found.mean().item() for found in first if len(found)]
        assert row["mean"] == pytest.approx(sum(means) / len(means), abs=1e-6)
        middles = [found.quantile(0.5).item() for found in first if len(found)]
        assert row["median"] == pytest.approx(sum(middles) / len(middles), abs=1e-6)


def test_the_curve_is_the_expected_maximum_over_all_subsets():
    torch.manual_seed(0)
    scores = torch.randn(3, 5)
    for row in reward_curve(scores, ALL[:3, :5]):
        subsets = list(itertools.combinations(range(5), row["k"]))
        best = sum(scores[:, list(s)].max(1).values.mean().item() for s in subsets) / len(subsets)
        assert row["best"] == pytest.approx(best, abs=1e-6)
        assert row["mean"] == pytest.approx(scores[:, : row["k"]].mean().item(), abs=1e-6)
        median = scores[:, : row["k"]].quantile(0.5, dim=1).mean().item()
        assert row["median"] == pytest.approx(median, abs=1e-6)


def test_the_curve_never_falls():
    best = [row["best"] for row in reward_curve(torch.randn(7, 20), ALL)]
    assert all(a <= b + 1e-12 for a, b in zip(best, best[1:], strict=False))


def test_why_nothing_can_be_kept():
    unfinished, empty = sample("a", 1.0, finished=False), sample("a", 1.0) | {"answer": ""}
    assert why_none([unfinished] * 3).startswith("no answer of 3 is finished; raise max_new_tokens")
    assert "1 are finished and all of these are empty" in why_none([unfinished, empty])
    assert best_of([unfinished, empty]) == []


def test_samples_survive_the_disk(tmp_path):
    rows = [sample("ä", 1.0), sample("b", 2.5, finished=False)]
    write_samples(tmp_path / "s.jsonl", rows[:1], mode="w")
    write_samples(tmp_path / "s.jsonl", rows[1:], mode="a")
    assert read_samples(tmp_path / "s.jsonl") == rows


def test_a_pool_that_is_none_is_refused_by_line(tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_text(json.dumps(sample("a", 1.0)) + '\n{"answer": "x"}\n')
    with pytest.raises(ValueError, match="pool.jsonl:2: the sample lacks finished, is_safety"):
        read_samples(file)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="pool.jsonl:1: a JSON list, expected one object a line"):
        read_samples(file)
    with pytest.raises(ValueError, match="no such file; a pool is"):
        read_samples(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score", float("nan")),
        ("score", float("inf")),
        ("score", "1.0"),
        ("scores", {"safety": float("nan")}),
        ("scores", [1.0]),
        ("tokens", ["5", 2]),
        ("tokens", [5.5]),
        ("tokens", [-1]),
        ("tokens", "52"),
        ("tokens", 7),
        ("messages", []),
        ("messages", "red"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("answer", None),
        ("finished", 1),
        ("is_safety", "no"),
        ("round", 1.5),
        ("prompt", None),
        ("sample", True),
    ],
    ids=str,
)
def test_a_row_that_is_no_sample_is_named(tmp_path, name, value):
    """A NaN score above all: no other would be above it, and the first answer would be kept."""
    rows = [sample("a", 1.0), sample("b", 2.0) | {name: value}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"s.jsonl:2: .*(expected|has no user)") as raised:
        read_samples(tmp_path / "s.jsonl")
    assert "\n" not in str(raised.value)
