"""The demo's bars, on both sides of each. Run: python -m pytest tests/test_bars.py -q"""

import pytest

from puna.demo.report.bars import bars

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")


def rates(win, violation, false_refusal, helpful):
    return {
        "t1": {
            "win_rate_vs_sft": win,
            "win_rate_ci95": [win - 0.04, win + 0.04],
            "violation_rate": violation,
            "false_refusal_rate": false_refusal,
            "helpful_rate": helpful,
            "count": {"win": 500, "ordinary": 500, "unsafe": 500, "borderline": 500},
        }
    }


def good_evaluation():
    """A run in which every bar is met."""
    turns = ("1", "2", "4", "6", "10", "20")
    accuracy = {
        "helpfulness": (0.87, 0.79, 0.71, 0.57),
        "safety": (0.99, 0.9, 0.69, 0.56),
    }
    return {
        "versions": {
            "sft": rates(0.5, 0.62, 0.03, 0.31),
            "rlhf-v1": rates(0.63, 0.5, 0.03, 0.42),
            "rlhf-v2": rates(0.7, 0.37, 0.04, 0.5),
            "rlhf-v3": rates(0.81, 0.08, 0.06, 0.6),
            "gatt": rates(0.8, 0.09, 0.06, 0.59),
            "rlhf-v4-rejection": rates(0.8, 0.09, 0.06, 0.59),
            "rlhf-v4": rates(0.85, 0.08, 0.06, 0.6),
        },
        "ppo": {
            mode: {"wins": wins, "ci95": [wins - 0.02, wins + 0.02], "equal": 0.6, "prompts": 500}
            for mode, wins in (("t1", 0.55), ("greedy", 0.51))
        },
        "reward_models": {
            model: {
                "accuracy": dict(zip(RATINGS, values, strict=True)),
                "counts": dict(zip(RATINGS, (600, 400, 300, 900), strict=True)),
            }
            for model, values in accuracy.items()
        },
        "gatt": {
            "greedy": {
                "with": dict(zip(turns, (1.0, 1.0, 1.0, 0.98, 0.97, 0.97), strict=True)),
                "without": dict(zip(turns, (1.0, 0.6, 0.2, 0.1, 0.03, 0.0), strict=True)),
            }
        },
    }


def test_a_good_run_meets_every_bar():
    found = bars(good_evaluation())
    assert len(found) == 16
    assert [bar.name for bar in found if bar.met is not True] == []


def at(path, value):
    """Changes one place of the good evaluation."""

    def change(evaluation):
        *parents, last = path
        for key in parents:
            evaluation = evaluation[key]
        evaluation[last] = value

    return change


def rate_at(name, key, value):
    return at(("versions", name, "t1", key), value)


HELPFUL_MODEL = ("reward_models", "helpfulness", "accuracy")


@pytest.mark.parametrize(
    ("bar", "change", "met"),
    [
        # A step down of 6.9 points is chance's for 400 and 300 pairs near .7, one of 7.1 is not.
        ("Helpfulness model", at((*HELPFUL_MODEL, "better"), 0.641), True),
        ("Helpfulness model", at((*HELPFUL_MODEL, "better"), 0.639), False),
        ("Helpfulness model", at((*HELPFUL_MODEL, "better"), None), None),
        ("Helpfulness model", at((*HELPFUL_MODEL[:2], "counts"), {}), None),
        ("Safety model", at(("reward_models", "safety", "accuracy", RATINGS[0]), 0.6), False),
        ("SFT helps", rate_at("sft", "violation_rate", 0.2), True),
        ("SFT helps", rate_at("sft", "violation_rate", 0.198), False),
        ("V1 wins", rate_at("rlhf-v1", "win_rate_ci95", [0.501, 0.6]), True),
        ("V1 wins", rate_at("rlhf-v1", "win_rate_ci95", [0.5, 0.6]), False),
        ("V4 wins", rate_at("rlhf-v4", "win_rate_ci95", [0.6, 0.7]), True),
        ("V4 wins", rate_at("rlhf-v4", "win_rate_ci95", [0.599, 0.7]), False),
        ("V4 wins", rate_at("rlhf-v4", "win_rate_ci95", None), None),
        ("Last version helps", rate_at("rlhf-v4", "violation_rate", 0.31), True),
        ("Last version helps", rate_at("rlhf-v4", "violation_rate", 0.312), False),
        ("Last version refuses", rate_at("rlhf-v4", "false_refusal_rate", 0.1), True),
        ("Last version refuses", rate_at("rlhf-v4", "false_refusal_rate", 0.102), False),
        ("Last version's helpful", rate_at("rlhf-v4", "helpful_rate", 0.31), True),
        ("Last version's helpful", rate_at("rlhf-v4", "helpful_rate", 0.308), False),
        ("Without GAtt, first", at(("gatt", "greedy", "without", "1"), 0.9), True),
        ("Without GAtt, first", at(("gatt", "greedy", "without", "1"), 0.88), False),
        ("Without GAtt, twentieth", at(("gatt", "greedy", "without", "20"), 0.5), True),
        ("Without GAtt, twentieth", at(("gatt", "greedy", "without", "20"), 0.52), False),
        ("With GAtt", at(("gatt", "greedy", "with", "10"), 0.95), True),
        ("With GAtt", at(("gatt", "greedy", "with", "10"), 0.933), False),
        ("With GAtt", at(("gatt", "greedy", "with"), {"1": 1.0}), None),
        ("The last version wins over", at(("ppo", "t1", "ci95"), [0.51, 0.6]), True),
        ("The last version wins over", at(("ppo", "t1", "ci95"), [0.5, 0.6]), False),
        ("The last version wins over", at(("ppo",), {}), None),
        ("Helpful answers after", rate_at("gatt", "helpful_rate", 0.57), True),
        ("Helpful answers after", rate_at("gatt", "helpful_rate", 0.568), False),
        ("Helpful answers after", rate_at("gatt", "helpful_rate", 0.9), True),
        ("Held-out prompts", rate_at("rlhf-v2", "count", {"unsafe": 499}), False),
    ],
)
def test_each_bar_on_both_sides(bar, change, met):
    evaluation = good_evaluation()
    change(evaluation)
    (found,) = [row for row in bars(evaluation) if row.name.startswith(bar)]
    assert found.met is met, found


def test_a_run_that_measured_nothing_says_so_of_every_bar():
    found = bars({})
    assert found and {bar.met for bar in found} == {None}
    assert {bar.value for bar in found} == {"not measured"}
