"""Run: python -m pytest tests/test_reward.py -q"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.core import parallel
from puna.core.checkpoint.folder import load_model
from puna.core.packed import score
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import reward
from puna.trainers.data.formats import RATINGS, Columns
from puna.trainers.data.packing import encode_pairs
from puna.trainers.data.readers import read_preferences
from puna.trainers.reward import RewardConfig
from puna.trainers.rl.losses import MARGINS
from puna.trainers.train.run import open_run


def configured(tiny: Path, out: Path, **options) -> RewardConfig:
    values = {
        "model": tiny / "chat",
        "data": [tiny / "preferences.jsonl"],
        "batch": 16,
        "micro_batch": 3,
        "lr": 3e-3,
        "eval_share": 0.25,
        "device": "cpu",
    }
    return RewardConfig(out=out, **(values | options))


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(tiny):
    rows, _ = read_preferences(tiny / "preferences.jsonl")
    found, skipped = encode_pairs(Tokenizer(tiny / "tokenizer.model"), rows, 256)
    assert not skipped
    return found


def started(tiny: Path, out: Path, **options):
    config = configured(tiny, out, **options)
    with open_run(config, tokenizer=None) as run:
        return parallel.load(reward.start_model(config, run), "cpu")


def test_a_chat_model_gets_a_small_fresh_head_and_keeps_the_rest(tiny, tmp_path):
    model, chat = started(tiny, tmp_path), load_model(tiny / "chat")
    assert model.head == "score" and model.score.weight.shape == (1, 24)
    assert 0.1 < model.score.weight.std() < 0.4  # (24 + 1) ** -0.5 = 0.2
    theirs = dict(chat.named_parameters())
    for name, parameter in model.named_parameters():
        assert name == "score.weight" or torch.equal(parameter, theirs[name])
    other = started(tiny, tmp_path / "other", seed=1)
    assert not torch.equal(other.score.weight, model.score.weight)


def test_a_reward_model_goes_on_with_its_own_head(tiny, tmp_path):
    model, before = started(tiny, tmp_path, model=tiny / "safety"), load_model(tiny / "safety")
    assert torch.equal(model.score.weight, before.score.weight)


def test_training_and_scoring_read_the_same_score_at_eos(tiny, pairs):
    model = load_model(tiny / "helpfulness")
    eos = Tokenizer(tiny / "tokenizer.model").eos_id
    batch = reward.pairs_on(torch.device("cpu"), pairs, MARGINS["none"], len(pairs))
    chosen, rejected = reward.pair_scores(model, batch)
    for ours, sequences in ((chosen, [p.chosen for p in pairs]), (rejected, [p[1] for p in pairs])):
        assert all(ids[-1] == eos for ids in sequences)
        torch.testing.assert_close(ours, score(model, sequences, max_tokens=100))
        alone = [model(torch.tensor(ids)[None])[0, -1] @ model.score.weight[0] for ids in sequences]
        torch.testing.assert_close(ours, torch.stack(alone))


@pytest.mark.parametrize("margin", ["none", "small", "large"])
def test_the_first_loss_is_eq_2_with_the_papers_margins(tiny, pairs, tmp_path, margin):
    table = {"none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}[margin]
    config = configured(tiny, tmp_path, margin=margin, batch=48, eval_share=0.0)
    model = started(tiny, tmp_path.with_name(tmp_path.name + "-other"))
    reward.run(config)
    expected = []
    for pair in pairs:
        sides = [score(model, [ids])[0] for ids in (pair.chosen, pair.rejected)]
        difference = sides[0] - sides[1] - table[RATINGS.index(pair.rating)]
        expected.append(torch.log1p(torch.exp(-difference)))
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(float(torch.stack(expected).mean()))


def test_the_safety_loss_is_added_with_its_weight(tiny, pairs, tmp_path):
    config = configured(tiny, tmp_path, safety_weight=0.7, batch=48, eval_share=0.0)
    model = started(tiny, tmp_path.with_name(tmp_path.name + "-other"))
    reward.run(config)
    row = metrics(tmp_path)[0]
    assert row["loss"] == pytest.approx(row["ranking_loss"] + 0.7 * row["safety_loss"])
    expected = []
    for pair in pairs:
        safe = {"chosen_safe": (1, 0), "both_safe": (1, 1), "both_unsafe": (0, 0)}[pair.safety]
        for ids, label in zip((pair.chosen, pair.rejected), safe, strict=True):
            probability = torch.sigmoid(score(model, [ids])[0])
            expected.append(-torch.log(probability if label else 1 - probability))
    assert row["safety_loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@pytest.mark.parametrize("micro_batch", [3, 48])
def test_the_safety_loss_is_the_mean_over_the_labelled_pairs(tiny, pairs, tmp_path, micro_batch):
    """It was once divided by all pairs: with one labelled of ten, a tenth of it was left."""
    rows = [json.loads(row) for row in (tiny / "preferences.jsonl").open()]
    for number, row in enumerate(rows):
        if number % 8:
            row.pop("safety")
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configured(
        tiny, tmp_path / "run", data=[tmp_path / "few.jsonl"], safety_weight=0.7, batch=48,
        micro_batch=micro_batch, eval_share=0.0,
    )  # fmt: skip
    reward.run(config)
    row = metrics(tmp_path / "run")[0]
    model = started(tiny, tmp_path / "start")
    expected = []
    for pair in pairs[::8]:
        safe = {"chosen_safe": (1, 0), "both_safe": (1, 1), "both_unsafe": (0, 0)}[pair.safety]
        for ids, label in zip((pair.chosen, pair.rejected), safe, strict=True):
            probability = torch.sigmoid(score(model, [ids])[0])
            expected.append(-torch.log(probability if label else 1 - probability))
    assert row["safety_loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert row["loss"] == pytest.approx(row["ranking_loss"] + 0.7 * row["safety_loss"])


def test_a_safety_loss_without_a_label_is_refused(tiny, tmp_path):
    row = {"messages": [{"role": "user", "content": "red"}], "chosen": "blue", "rejected": "cup"}
    (tmp_path / "none.jsonl").write_text((json.dumps(row) + "\n") * 4)
    config = configured(
        tiny, tmp_path / "run", data=[tmp_path / "none.jsonl"], safety_weight=0.5, eval_share=0.0
    )
    with pytest.raises(ValueError, match="none of 4 pairs has a safety label; name their column"):
        reward.run(config)


def test_training_ranks_better_and_says_how_well_with_intervals(tiny, tmp_path, capsys):
    config = configured(tiny, tmp_path, epochs=12, batch=6, eval_every=10)
    before = replace(config)
    reward.run(config)
    assert config == before  # a second call continues the same run
    reward.run(config)
    rows = metrics(tmp_path)
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.1
    assert rows[-1]["eval_accuracy"] > 0.6
    assert any(f"eval_accuracy_{rating}" in rows[-1] for rating in RATINGS)
    shown = capsys.readouterr().out
    found = re.search(r"held-out accuracy\s+(\S+) \(95% interval (\S+) to (\S+)\), 12 pairs", shown)
    share, low, high = map(float, found.groups())
    assert share == pytest.approx(rows[-1]["eval_accuracy"], abs=1e-3)
    assert low < share <= high and "slightly better" in shown


def test_what_is_held_out_is_scored_once_for_each_look(tiny, tmp_path, capsys, monkeypatch):
    """At the start, every two steps and after the last; the sentence needs no look of its own,
    but where a kill came between the last step and it."""
    score, finish, scored = reward.scores_of, reward.loop.Run.finish, []

    def watched(model, *args, **options):
        scored.append(1)
        return score(model, *args, **options)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "scores_of", watched)
    reward.run(configured(tiny, tmp_path / "one", batch=12, eval_every=2, save_every=1))
    said = capsys.readouterr().out
    assert len(scored) == len([row for row in metrics(tmp_path / "one") if "eval_accuracy" in row])
    assert len(scored) == 3 and len(metrics(tmp_path / "one")) == 1 + 3
    monkeypatch.setattr(reward.loop.Run, "finish", killed)
    config = configured(tiny, tmp_path / "two", batch=12, eval_every=2, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        reward.run(config)
    monkeypatch.setattr(reward.loop.Run, "finish", finish)
    capsys.readouterr()
    reward.run(config)
    accuracy = re.compile(r"held-out accuracy.*pairs")
    assert accuracy.search(capsys.readouterr().out)[0] == accuracy.search(said)[0]


def test_the_warm_up_is_three_percent_of_the_steps_at_least_five(tiny, tmp_path):
    reward.run(configured(tiny, tmp_path, batch=6))
    rates = [row["lr"] for row in metrics(tmp_path) if "lr" in row]
    assert rates[:5] == pytest.approx([3e-3 * share for share in (0.2, 0.4, 0.6, 0.8, 1)])


def test_a_batch_larger_than_the_data_is_said(tiny, tmp_path, capsys):
    reward.run(configured(tiny, tmp_path, batch=512, eval_share=0.0))
    assert "a batch of 512 exceeds the 48 there are" in capsys.readouterr().out
    assert len(metrics(tmp_path)) == 1


def test_graded_comparisons_of_a_and_b_are_mapped_by_the_recipe(tiny, tmp_path, capsys):
    values = ["a-is-better", "b-is-slightly-better", "tie"]
    rows = [
        {"prompt": f"red {i}", "one": "blue", "two": "cup", "preference": values[i % 3]}
        for i in range(18)
    ]
    (tmp_path / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "data": [tmp_path / "graded.jsonl"],
        "columns": Columns(a="one", b="two", rating="preference"),
        "ratings": {"a-is-better": "a better", "b-is-slightly-better": "b slightly_better"},
    }
    short = {**options, "ratings": {"a-is-better": "a better"}}
    with pytest.raises(ValueError, match=r"graded.jsonl:2: .* is \"b-is-slightly.*\[ratings\]"):
        reward.run(configured(tiny, tmp_path / "run", **short))
    reward.run(configured(tiny, tmp_path / "mapped", **options))
    shown = capsys.readouterr().out
    assert "skipped 6 rows: a tie where a ranking is asked for" in shown
    assert {"eval_accuracy_better", "eval_accuracy_slightly_better"} >= {
        name for name in metrics(tmp_path / "mapped")[-1] if name.startswith("eval_accuracy_")
    }


def test_the_defaults_are_the_papers():
    config = RewardConfig(model=Path("m"), data=[], out=Path("o"))
    assert (config.lr, config.batch, config.epochs, config.margin) == (1e-5, 512, 1, "small")
