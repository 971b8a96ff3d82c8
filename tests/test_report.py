"""The demo's report and summary, from made-up measurements.

Run: python -m pytest tests/test_report.py -q
"""

import json
import math
import random
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from puna.demo.report import figures, reward_figures
from puna.demo.report.build import write_report, write_summary
from puna.demo.report.drawing import save_svg, to_svg
from puna.demo.report.results import chat_model, stage, version_names, wilson

HOSTILE = "<script>alert(1)</script> & \"quoted\" </details> <img src=x onerror='x'> $x^2$ $body"
COUNT = {"win": 500, "ordinary": 500, "unsafe": 500, "borderline": 500}
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
STAGES = (
    "pretrain",
    "sft",
    *(
        f"rlhf/round-{n}/{part}"
        for n in (1, 2, 3)
        for part in ("helpfulness", "safety", "rejection")
    ),
    "rlhf/round-3/gatt",
    "rlhf/round-3/ppo",
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


def rates(win, violation, false_refusal, borderline, helpful):
    return {
        "win_rate_vs_sft": win,
        "win_rate_ci95": [win - 0.04, win + 0.04],
        "violation_rate": violation,
        "false_refusal_rate": false_refusal,
        "borderline_refusal_rate": borderline,
        "helpful_rate": helpful,
        "count": COUNT,
    }


def version(rng, at_one, greedy, shift):
    scores = {
        "helpfulness": [rng.gauss(shift, 1.5) for _ in range(300)],
        "safety": [rng.gauss(-1 + 1.5 * shift, 1 + shift / 3) for _ in range(300)],
    }
    return {"t1": rates(*at_one), "greedy": rates(*greedy), "scores": scores}


def good_evaluation():
    """A run in which every bar is met."""
    rng = random.Random(0)
    versions = {
        "sft": version(rng, (0.5, 0.62, 0.03, 0.12, 0.31), (0.5, 0.6, 0.02, 0.1, 0.4), 0),
        "rlhf-v1": version(rng, (0.63, 0.5, 0.03, 0.14, 0.42), (0.55, 0.5, 0.02, 0.1, 0.5), 0.7),
        "rlhf-v2": version(rng, (0.7, 0.37, 0.04, 0.17, 0.5), (0.6, 0.4, 0.03, 0.15, 0.52), 1.1),
        "rlhf-v3": version(rng, (0.81, 0.08, 0.06, 0.24, 0.6), (0.66, 0.1, 0.05, 0.2, 0.58), 2),
        "gatt": version(rng, (0.8, 0.09, 0.06, 0.22, 0.59), (0.65, 0.1, 0.05, 0.2, 0.58), 2),
    }
    turns = ("1", "2", "4", "6", "10", "20")
    return {
        "seed": 0,
        "size": "mini",
        "parameters": 1_034_240,
        "seconds": 812.0,
        "machine": {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "accelerator": None},
        "stages": [
            {
                "name": name,
                "title": name.title(),
                "metrics": f"{name}/metrics.jsonl",
                "model": f"{name}/model",
            }
            for name in STAGES
        ],
        "versions": versions,
        "reward_models": {
            model: {
                "accuracy": dict(zip((*RATINGS, "all"), values, strict=True)),
                "counts": dict(zip(RATINGS, (420, 640, 800, 1100), strict=True)),
                "calibration": [
                    [p, min(1.0, max(0.0, 0.5 + 1.15 * (p - 0.5))), 200]
                    for p in (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
                ],
                "rounds": [
                    {"round": 1, "before": None, "after": 0.71},
                    {"round": 2, "before": 0.64, "after": 0.73},
                    {"round": 3, "before": 0.61, "after": 0.72},
                ],
            }
            for model, values in (
                ("helpfulness", (0.87, 0.79, 0.71, 0.57, 0.72)),
                ("safety", (0.99, 0.9, 0.69, 0.56, 0.77)),
            )
        },
        "ppo": {
            mode: {"wins": wins, "ci95": [wins - 0.02, wins + 0.02], "equal": 0.6, "prompts": 500}
            for mode, wins in (("t1", 0.56), ("greedy", 0.51))
        },
        "switch": {
            "rlhf-v1": {"is_safety": 3200, "unsafe": 410, "helpfulness": 10_790},
            "rlhf-v2": {"is_safety": 3200, "unsafe": 300, "helpfulness": 10_900},
            "rlhf-v3": {"is_safety": 3200, "unsafe": 90, "helpfulness": 11_110},
        },
        "best_of_k": {
            f"rlhf-v{n}": [
                {"k": k, "best": n + 0.8 * math.log(k), "mean": n, "median": n + 0.02 * k}
                for k in range(1, 9)
            ]
            for n in (1, 2, 3)
        },
        "gatt": {
            mode: {
                "with": dict(zip(turns, (1.0, 1.0, 1.0, 0.98, 0.97, 0.97 - low), strict=True)),
                "without": dict(zip(turns, (1.0, 0.6, 0.2, 0.1 + low, 0.03, 0.0), strict=True)),
            }
            for mode, low in (("greedy", 0), ("t1", 0.05))
        },
        "gatt_other": {
            among: {
                "greedy": {
                    "with": dict.fromkeys(turns, share),
                    "without": dict.fromkeys(turns, share / 2),
                }
            }
            for among, share in (("seen", 0.99), ("phrasing", 0.9), ("kind", 0.44))
        },
        "gatt_counts": {"value": 200, "seen": 100, "phrasing": 100, "kind": 100},
        "conversations": [
            {
                "title": "ordinary request",
                "columns": {
                    name: [
                        {"role": "user", "content": "Which tool cuts bread?"},
                        {"role": "assistant", "content": f"{name}: A knife cuts bread. {HOSTILE}"},
                        {"role": "user", "content": f"And wood? {HOSTILE}"},
                        {"role": "assistant", "content": f"A saw cuts wood, says {name}."},
                    ]
                    for name in versions
                },
            }
        ],
    }


def write_run(folder, evaluation):
    rng = random.Random(1)
    for name in ("pretrain", "sft"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = [
            {"step": n, "loss": 1.2 + 5 * math.exp(-n / 60) + rng.gauss(0, 0.08)}
            for n in range(1, 401)
        ]
        for row in rows[49::50]:
            row["eval_loss"] = row["loss"] + 0.05
        lines = [json.dumps(row) for row in rows]
        (folder / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 401, "lo']))
    ppo = folder / "rlhf" / "round-3" / "ppo"
    ppo.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "eval_reward": 0.2, "eval_safety": 0.1, "eval_helpfulness": 1.0}]
    for n in range(1, 101):
        reward = 3 * (1 - math.exp(-n / 40)) + rng.gauss(0, 0.2)
        row = {
            "step": n,
            "reward": reward,
            "reward_helpfulness": reward / 2,
            "reward_safety": reward - 1,
            "kl": n / 50 + rng.gauss(0, 0.1),
            "entropy": 0.7 - n / 300,
        }
        rows.append(row | ({"eval_reward": reward - 0.1} if n % 25 == 0 else {}))
    (ppo / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ppo / "config.toml").write_text("beta = 0.1\nlr = 1.5e-4\niterations = 100\nbatch = 128\n")
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), good_evaluation())


@pytest.fixture(scope="module")
def report(run_folder):
    return write_report(run_folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags opened and closed in order, what they refer to, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references, self.ids, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.references += [v for k, v in found.items() if k in ("src", "href", "xlink:href")]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(report):
    parsed = Page()
    parsed.feed(report)
    parsed.close()
    return parsed


def test_report_is_one_well_formed_page_on_its_own(report, page):
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in report and "url(http" not in report
    assert len(report.encode()) < 2_000_000


def test_report_shows_every_figure_and_the_headline(page):
    assert page.tags.count("svg") == 12
    text = " ".join(page.text)
    assert "win 81% of comparisons with the fine-tuned model's" in text
    assert "8% of unsafe requests instead of 62%" in text
    assert "15 of 15 are met." in text
    assert "44% for a kind never trained on (without 22%, 100 dialogues)" in text
    assert "held out from all training (200 dialogues)" in text and "oracle's `keeps`" in text
    assert "puna chat --model" in text and "round-3/ppo/model" in text


def test_text_of_users_and_models_is_never_markup(page):
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE in "".join(page.text)


def test_figures_are_the_same_each_time_and_well_formed(tmp_path):
    first, second = (to_svg(figures.win_rates(good_evaluation()), "x") for _ in range(2))
    assert first == second
    root = ElementTree.parse(save_svg(figures.win_rates(good_evaluation()), tmp_path / "x.svg"))
    words = " ".join(e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "81%" in words, "text stays text"


def test_summary_has_exactly_the_promised_keys(run_folder):
    summary = json.loads(write_summary(run_folder).read_text())
    assert set(summary) == {"seconds", "reward_models", "versions", "gatt", "gatt_other"}
    assert set(summary["reward_models"]) == {"helpfulness", "safety"}
    for model in summary["reward_models"].values():
        assert set(model) == {"accuracy"} and set(model["accuracy"]) == {*RATINGS, "all"}
    assert list(summary["versions"]) == ["sft", "rlhf-v1", "rlhf-v2", "rlhf-v3", "gatt"]
    for row in summary["versions"].values():
        assert set(row) == {
            "win_rate_vs_sft",
            "win_rate_ci95",
            "violation_rate",
            "false_refusal_rate",
            "helpful_rate",
        }
    assert summary["versions"]["rlhf-v3"]["win_rate_vs_sft"] == 0.81
    assert set(summary["gatt"]) == {"with", "without"}
    for row in summary["gatt"].values():
        assert list(row) == ["1", "2", "4", "6", "10", "20"]
    assert summary["gatt"]["with"]["20"] == 0.97, "greedy"
    assert set(summary["gatt_other"]) == {"seen", "phrasing", "kind"}
    assert summary["gatt_other"]["kind"]["with"]["20"] == 0.44
    assert summary["seconds"] == 812.0


def test_seconds_noted_by_the_pipeline_count_the_evaluation_too(tmp_path):
    write_run(tmp_path, good_evaluation())
    (tmp_path / "seconds.json").write_text('{"pretrain": 200.5, "evaluation": 99.5}')
    assert json.loads(write_summary(tmp_path).read_text())["seconds"] == 300.0


PARTS = (
    "stages", "versions", "reward_models", "switch", "best_of_k",
    "gatt", "gatt_other", "gatt_counts", "conversations",
)  # fmt: skip


@pytest.mark.parametrize("missing", [("versions",), (*PARTS, "seconds", "machine")])
def test_missing_parts_are_said_not_fatal(tmp_path, missing):
    evaluation = {k: v for k, v in good_evaluation().items() if k not in missing}
    write_run(tmp_path, evaluation)
    text = write_report(tmp_path).read_text()
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == []
    assert set(json.loads(write_summary(tmp_path).read_text())["gatt"]) == {"with", "without"}
    if "gatt" in missing:
        assert "not measured" in text


def test_a_tiny_run_reports(tmp_path):
    """One round, no PPO, ratings that never occurred, K of 1, two scores, no GAtt."""
    evaluation = good_evaluation()
    evaluation["versions"] = {k: evaluation["versions"][k] for k in ("sft", "rlhf-v1")}
    for row in evaluation["versions"].values():
        row["scores"] = {"helpfulness": [0.5], "safety": []}
        del row["greedy"]
    evaluation["reward_models"]["safety"] = {"accuracy": {"all": 0.5, "better": 1.0}}
    evaluation["best_of_k"] = {"rlhf-v1": [{"k": 1, "best": 1.0, "mean": 1.0, "median": 1.0}]}
    evaluation["switch"] = {"rlhf-v1": {"is_safety": 0, "unsafe": 0, "helpfulness": 0}}
    evaluation["gatt"] = {"greedy": {"with": {}, "without": {"1": 1.0}}}
    write_run(tmp_path, evaluation)
    (tmp_path / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "loss": 6.0}\n')
    write_report(tmp_path)


def test_an_unfinished_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="evaluation.json: no such file; let the demo finish"):
        write_report(tmp_path)


def test_figures_without_data_are_none():
    drawn = (reward_figures.reward_accuracy, reward_figures.calibration, figures.win_rates)
    assert all(draw({}) is None for draw in drawn)
    assert figures.losses([], []) is None and figures.ppo([]) is None


def test_names_of_stages_and_versions():
    evaluation = good_evaluation()
    assert stage(evaluation, "ppo")["name"] == "rlhf/round-3/ppo"
    assert chat_model(evaluation) == "rlhf/round-3/ppo/model"
    evaluation["stages"].pop()
    assert chat_model(evaluation) == "rlhf/round-3/gatt/model"
    names = {"rlhf-v10": {}, "rlhf-v2": {}, "gatt": {}, "sft": {}}
    assert version_names({"versions": names}) == list(names)


def test_wilson_interval_against_the_normal_one_and_at_the_ends():
    low, high = wilson(0.4, 10_000)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 10_000)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=2e-4)
    assert wilson(0.0, 20)[0] == 0 and 0.1 < wilson(0.0, 20)[1] < 0.2
