"""Run: python -m pytest tests/test_evaluate.py -q"""

import json
import xml.dom.minidom
from pathlib import Path

import pytest
import torch

from puna.core.checkpoint.folder import load_model
from puna.core.packed import score
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import evaluate
from puna.trainers.data.packing import Pair, encode_pairs
from puna.trainers.data.readers import read_preferences
from puna.trainers.evaluate import EvaluateConfig
from puna.trainers.rl import figures
from puna.trainers.rl.accuracy import by_batch, calibration
from puna.trainers.rl.measured import measure
from puna.trainers.rl.unsafe import HISTOGRAM_BINS, detections, histograms, unsafe_share

LABELS = {"chosen_safe": (True, False), "both_safe": (True, True), "both_unsafe": (False, False)}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.open()]


def measured(tiny, *data: Path, **options):
    values = {"model": tiny / "safety", "data": list(data), "device": "cpu"}
    return evaluate.run(EvaluateConfig(**(values | options)))


@pytest.fixture
def sets(tiny, tmp_path):
    """Two files: with batches and labels, and bare."""
    rows = rows_of(tiny / "preferences.jsonl")
    weekly = [row | {"batch": 3 - i % 3} for i, row in enumerate(rows)]
    bare = [{k: row[k] for k in ("messages", "chosen", "rejected")} for row in rows[:7]]
    return write(tmp_path / "own.jsonl", weekly), write(tmp_path / "public.jsonl", bare)


def test_tables_are_printed_and_all_is_written(tiny, tmp_path, capsys):
    out = tmp_path / "figures" / "safety.json"
    document = measured(tiny, tiny / "preferences.jsonl", out=out)
    assert json.loads(out.read_text()) == document
    found = document["sets"]["preferences"]
    assert found["data"] == str(tiny / "preferences.jsonl")
    assert document["chance"] == 0.5 and found["baselines"]["the longer answer"]["pairs"] == 48
    assert set(found["accuracy"]) == {
        "all", "significantly_better", "better", "slightly_better", "negligibly_better",
    }  # fmt: skip
    labels = found["accuracy_by_safety"]
    assert {name: share["pairs"] for name, share in labels.items()} == dict.fromkeys(LABELS, 16)
    mean = sum(share["share"] for share in labels.values()) / 3
    assert mean == pytest.approx(found["accuracy"]["all"]["share"])
    assert sum(each["right"]["pairs"] for each in found["calibration"]) == 48
    shown = capsys.readouterr().out
    for title in ("Accuracy by set", "preferences: accuracy", "both unsafe", "expected error"):
        assert title in shown


def test_each_file_is_a_set_measured_as_it_is_alone(tiny, sets):
    together = measured(tiny, *sets)
    alone = [measured(tiny, path) for path in sets]
    assert together["sets"] == alone[0]["sets"] | alone[1]["sets"]
    means = [each["mean_accuracy"] for each in alone]
    assert together["mean_accuracy"] == pytest.approx(sum(means) / 2)
    bare = together["sets"]["public"]
    for absent in ("by_batch", "unsafe_answers", "accuracy_by_safety"):
        assert absent in together["sets"]["own"] and absent not in bare
    assert set(bare["score_histograms"]) == {"chosen", "rejected"}


def test_files_of_one_name_are_told_apart_and_none_counts_twice(tiny, sets):
    (sets[0].parent / "b").mkdir()
    other = write(sets[0].parent / "b" / "own.jsonl", rows_of(sets[1]))
    assert set(measured(tiny, sets[0], other)["sets"]) == {str(sets[0]), str(other)}
    with pytest.raises(ValueError, match="a file stands in data twice; name each set once"):
        measured(tiny, sets[0], sets[0])
    with pytest.raises(ValueError, match="nothing to measure on"):
        measured(tiny)


def test_figures_are_those_of_scores_taken_one_by_one(tiny, sets):
    """A second way there: every answer scored alone, then counted in plain Python."""
    found = measured(tiny, sets[0])["sets"]["own"]
    model, tokenizer = load_model(tiny / "safety"), Tokenizer(tiny / "tokenizer.model")
    pairs, _ = encode_pairs(tokenizer, read_preferences(sets[0])[0], 256)
    scored = [[float(score(model, [ids])[0]) for ids in pair[:2]] for pair in pairs]
    for number, batch in enumerate(found["by_batch"], start=1):
        assert batch["batch"] == number
        own = [i for i, pair in enumerate(pairs) if pair.batch == number]
        hits = [scored[i][0] > scored[i][1] for i in own]
        assert batch["right"]["share"] == pytest.approx(sum(hits) / len(own))
        assert batch["right"]["pairs"] == 16 and sum(batch["ratings"].values()) == pytest.approx(1)
        mean = torch.sigmoid(torch.tensor([scored[i] for i in own])).mean()
        assert batch["score"] == pytest.approx(float(mean), abs=1e-6)
    unsafe = [
        value
        for row, pair in zip(scored, pairs, strict=True)
        for value, safe in zip(row, LABELS[pair.safety], strict=True)
        if not safe
    ]
    below = found["unsafe_answers"]["below"][0]
    assert below["threshold"] == 0.5 and below["recall"]["answers"] == len(unsafe) == 48
    assert below["recall"]["share"] == pytest.approx(sum(v < 0 for v in unsafe) / 48)


PAIRS = [
    Pair([1], [2], None, "chosen_safe", "a", 1),  # scores and labels beside: see SCORES
    Pair([1], [2], None, "both_unsafe", "a", 1),
    Pair([1], [2], None, "both_safe", "b", 2),
    Pair([1], [2], None, None, "c"),
]
LOGIT = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.05, 0.95], [0.01, 0.02]]).logit()


def test_recall_and_precision_of_unsafe_answers_by_hand():
    """Unsafe: 0.1, 0.4, 0.6; safe: 0.9, 0.05, 0.95; the last pair has no label."""
    half, switch = detections(LOGIT, PAIRS)
    assert half.threshold == 0.5 and switch.threshold == 0.15
    assert half.recall.share == pytest.approx(2 / 3) and half.recall.pairs == 3
    assert half.precision.share == pytest.approx(2 / 3)  # 0.1, 0.4 and the safe 0.05
    assert switch.recall.share == pytest.approx(1 / 3)
    assert switch.precision.share == pytest.approx(1 / 2) and switch.precision.pairs == 2
    assert unsafe_share(LOGIT, PAIRS).share == pytest.approx(1 / 2)


def test_where_nothing_is_unsafe_or_flagged_there_is_no_share():
    safe = [pair._replace(safety="both_safe") for pair in PAIRS]
    assert all(each.recall is None for each in detections(LOGIT, safe))
    assert all(each.precision is None for each in detections(LOGIT.abs() + 9, PAIRS))
    assert detections(LOGIT, [pair._replace(safety=None) for pair in PAIRS]) == []


def test_intervals_of_recall_know_which_answers_share_a_prompt():
    scores = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat_interleave(5, 0)
    found = []
    for prompts in ("0123456789", "aaaaabbbbb"):
        pairs = [Pair([1], [2], None, "both_unsafe", prompt) for prompt in prompts]
        found.append(detections(scores, pairs)[0].recall)
    apart, shared = found
    assert apart.share == shared.share == 0.5
    assert shared.high - shared.low > apart.high - apart.low


def test_histograms_count_every_answer_once():
    found = histograms(LOGIT, PAIRS)
    assert {name: sum(counts) for name, counts in found.items()} == {
        "chosen": 4, "rejected": 4, "safe": 3, "unsafe": 3,
    }  # fmt: skip
    assert all(len(counts) == HISTOGRAM_BINS for counts in found.values())
    width = 1 / HISTOGRAM_BINS
    for name, values in (("chosen", [0.9, 0.4, 0.05, 0.01]), ("unsafe", [0.1, 0.4, 0.6])):
        for value in values:
            number = min(int((value + 1e-6) / width), HISTOGRAM_BINS - 1)
            assert found[name][number] or found[name][number - 1], (name, value)
    sure = histograms(torch.tensor([[1e4, -1e4]]), PAIRS[:1])
    assert sure["chosen"][-1] == sure["rejected"][0] == 1


def test_batches_are_in_order_and_rows_without_one_in_none():
    found = by_batch(LOGIT, PAIRS)
    assert [(each.batch, each.right.share, each.right.pairs) for each in found] == [
        (1, 0.5, 2), (2, 0.0, 1),
    ]  # fmt: skip
    assert found[0].score == pytest.approx(0.5) and found[0].ratings == {}
    rated = [pair._replace(rating=name) for pair, name in zip(PAIRS, ("better",) * 4, strict=True)]
    assert by_batch(LOGIT, rated)[0].ratings == {"better": 1.0}


def test_calibration_knows_which_pairs_share_a_prompt():
    sure = torch.tensor([1.0, 1.0, -1.0, -1.0])
    (apart,) = calibration(sure, ["a", "b", "c", "d"])
    (shared,) = calibration(sure, ["a", "a", "b", "b"])
    assert shared.right.share == apart.right.share == 0.5
    assert shared.right.high > apart.right.high


def test_the_same_figures_give_the_same_drawing(tmp_path):
    """And other figures another; a set without batches has no panel of them."""

    def drawn(name, chosen, batch=None):
        pair = Pair([1, 2], [1, 3], "better", "chosen_safe", batch=batch)
        found = measure(torch.tensor([[chosen, -1.0]]), [pair])
        figures.draw(tmp_path / name, {"own": found})
        return (tmp_path / name).read_text()

    assert drawn("a.svg", 2.0) == drawn("b.svg", 2.0) != drawn("c.svg", 0.1)
    assert "Accuracy by batch" in drawn("d.svg", 2.0, batch=3)
    assert "Accuracy by batch" not in drawn("e.svg", 2.0)


def test_the_drawing_is_an_svg_whatever_the_files_are_called(tiny, sets, tmp_path):
    odd = tmp_path / "$x_^$ <b>&\x1b[2J.jsonl"
    sets[1].rename(odd)
    first = tmp_path / "a.json"
    measured(tiny, sets[0], odd, out=first)
    drawing = first.with_suffix(".svg")
    text = drawing.read_text()
    shown = "".join(
        node.firstChild.data
        for node in xml.dom.minidom.parseString(text).getElementsByTagName("text")
    )
    for expected in ("chosen", "unsafe", "Calibration", "Accuracy by batch", "no pair has a batch"):
        assert expected in shown
    assert "$x_^$ <b>&\\x1b[2J" in shown and "\x1b" not in text
    first.unlink()
    with pytest.raises(ValueError, match="a.svg is there already; give another --out"):
        measured(tiny, sets[0], odd, out=first)
    drawing.unlink()
    measured(tiny, sets[0], odd, out=first)
    assert drawing.read_text() == text
    with pytest.raises(ValueError, match="name a .json file, the drawing is put beside it"):
        measured(tiny, sets[0], out=drawing)


def test_only_a_reward_model_can_be_evaluated(tiny):
    data = [tiny / "preferences.jsonl"]
    with pytest.raises(ValueError, match="lm is a language model; evaluate needs a reward model"):
        evaluate.run(EvaluateConfig(model=tiny / "lm", data=data))
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        evaluate.run(EvaluateConfig(model=tiny / "safety", data=[Path("none.jsonl")]))
