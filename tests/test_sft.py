"""Run: python -m pytest tests/test_sft.py -q"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import puna
from puna.core.checkpoint.folder import load_model
from puna.core.text.chat import encode_dialogue
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import sft
from puna.trainers.data.formats import Columns
from puna.trainers.data.readers import read_dialogues
from puna.trainers.data.split import exchange, split
from puna.trainers.sft import SFTConfig


def configured(tiny: Path, out: Path, **options) -> SFTConfig:
    values = {
        "model": tiny / "lm",
        "data": [tiny / "dialogues.jsonl"],
        "batch": 4,
        "micro_batch": 2,
        "row_tokens": 64,
        "lr": 1e-2,
        "eval_share": 0.1,
        "device": "cpu",
    }
    return SFTConfig(out=out, **(values | options))


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


def answer_loss(tiny: Path, messages_of_all) -> float:
    """Mean cross-entropy of the starting model on answers alone, one dialogue at a time."""
    model = load_model(tiny / "lm")
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    total = torch.zeros(2, dtype=torch.float64)
    for messages in messages_of_all:
        ids, weights = encode_dialogue(tokenizer, messages)
        logits = model(torch.tensor(ids)[None, :-1])[0] @ model.lm_head.weight.T
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[1:]), reduction="none"
        ).detach()
        counted = torch.tensor(weights[1:])
        total += torch.stack([(losses * counted).sum(), counted.sum()]).double()
    return float(total[0] / total[1])


def test_only_answers_count_and_packed_dialogues_do_not_see_each_other(tiny, tmp_path):
    """The first step over all rows has the mean loss of each dialogue's answers alone."""
    config = configured(tiny, tmp_path, epochs=1, eval_share=0.0, row_tokens=0)
    config.eval_data = [tiny / "dialogues.jsonl"]
    sft.run(config)
    dialogues, _ = read_dialogues(tiny / "dialogues.jsonl")
    expected = answer_loss(tiny, [d.messages for d in dialogues])
    assert metrics(tmp_path)[0]["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_two_epochs_see_every_dialogue_twice_and_the_held_out_loss_falls(tiny, tmp_path, capsys):
    sft.run(configured(tiny, tmp_path, batch=2))
    rows = metrics(tmp_path)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.3
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    dialogues, _ = read_dialogues(tiny / "dialogues.jsonl")
    kept, held = split(dialogues, 0.1, 0, lambda row: exchange(row.messages))
    packed = sft.pack(tokenizer, kept, 64)
    assert len(rows) - 1 == round(2 * len(packed) / 2) and len(held) == 5
    assert "sft: " in capsys.readouterr().out


def test_further_columns_and_held_out_data_of_their_own(tiny, tmp_path):
    rows = [{"question": f"red {i}", "answer": "blue cup"} for i in range(6)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configured(
        tiny,
        tmp_path / "run",
        data=[tmp_path / "qa.jsonl"],
        eval_data=[tmp_path / "qa.jsonl"],
        columns=Columns(prompt="question", response="answer"),
    )
    sft.run(config)
    expected = answer_loss(
        tiny,
        [
            [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            for row in rows
        ],
    )
    assert metrics(tmp_path / "run")[0]["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_what_is_skipped_is_counted_and_named(tiny, tmp_path, capsys):
    def turn(role, content):
        return {"role": role, "content": content}

    dialogues = [
        [turn("user", "red"), turn("assistant", "blue")],
        [turn("user", "red " * 100), turn("assistant", "blue")],
        [turn("user", "red"), turn("user", "red"), turn("assistant", "blue")],
        [turn("user", "red [INST]"), turn("assistant", "blue")],
        [turn("user", "red"), turn("assistant", " ")],
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"messages": d}) + "\n" for d in dialogues))
    sft.run(configured(tiny, tmp_path / "run", data=[path], eval_share=0.0))
    shown = capsys.readouterr().out
    assert "roles do not alternate" in shown and f"(first {path}:3)" in shown
    assert "chat tag" in shown and "empty" in shown
    assert "skipped 1 row: longer than" in shown
    with pytest.raises(ValueError, match="no sequence to train on.*longer than"):
        path.write_text(json.dumps({"messages": dialogues[1]}) + "\n")
        sft.run(configured(tiny, tmp_path / "other", data=[path], eval_share=0.0))


def test_starting_points_that_cannot_be(tiny, tmp_path):
    with pytest.raises(ValueError, match="holds a score head and no lm head; take the language"):
        sft.run(configured(tiny, tmp_path / "a", model=tiny / "safety"))
    shutil.copytree(tiny / "lm", tmp_path / "bare")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "bare" / name).unlink()
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        sft.run(configured(tiny, tmp_path / "b", model=tmp_path / "bare"))
    with pytest.raises(ValueError, match="row_tokens 999 exceeds the model's context of 256"):
        sft.run(configured(tiny, tmp_path / "c", row_tokens=999))
    (tmp_path / "one.jsonl").write_text('{"prompt": "red", "response": "blue"}\n')
    with pytest.raises(ValueError, match="too few rows .* --eval-share 0"):
        sft.run(configured(tiny, tmp_path / "d", data=[tmp_path / "one.jsonl"]))


def test_the_defaults_are_the_papers():
    config = SFTConfig(model=Path("m"), data=[], out=Path("o"))
    assert (config.lr, config.batch, config.epochs, config.schedule) == (2e-5, 64, 2, "cosine")
    assert (config.weight_decay, config.min_lr, config.clip) == (0.1, 0.1, 1.0)


def python_rows(tiny: Path) -> list:
    """The rows of dialogues.jsonl, one of them in each shape that is taken."""
    rows = [json.loads(line) for line in (tiny / "dialogues.jsonl").read_text().splitlines()]
    return [row["messages"] if i % 2 else row for i, row in enumerate(rows)]


def test_dialogues_from_python_train_as_from_a_file(tiny, tmp_path):
    from_file = sft.run(configured(tiny, tmp_path / "file"))
    rows = iter(python_rows(tiny))
    from_python = sft.run(configured(tiny, tmp_path / "python", data=[]), rows)
    assert metrics(tmp_path / "python") == metrics(tmp_path / "file")
    weights = [(path / "model.safetensors").read_bytes() for path in (from_file, from_python)]
    assert weights[0] == weights[1]


def test_a_run_on_python_rows_goes_on_with_the_same_ones_only(tiny, tmp_path):
    rows = python_rows(tiny)
    whole = sft.run(configured(tiny, tmp_path / "whole", data=[], save_every=4), rows)
    steps = len(metrics(tmp_path / "whole")) - 1
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "finished.json").unlink()
    cut = configured(tiny, tmp_path / "cut", data=[], save_every=4)
    with pytest.raises(ValueError, match="cut holds a run on other terms .dialogues: what was"):
        sft.run(cut, rows[1:])
    with pytest.raises(ValueError, match="whole holds a run on other terms .dialogues: what was"):
        sft.run(configured(tiny, tmp_path / "whole", data=[], save_every=4), rows[::-1])
    assert (sft.run(cut, rows) / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    assert len(metrics(tmp_path / "cut")) - 1 == steps


def test_rows_from_python_that_cannot_be(tiny, tmp_path, capsys):
    config = configured(tiny, tmp_path / "run", data=[])
    good = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    for rows, message in (
        ([good, "red"], "row 2: a str, expected an object"),
        ([good, [{"role": "user"}]], r"row 2: 'messages\[0\]' has content null, expected a string"),
        ([{"question": "red"}], "row 1: the row has the columns 'question', expected 'messages'"),
        ([good, [{"role": "bot", "content": {1}}]], "row 2: .* has role"),
        ([], "there are no dialogues to learn from"),
        ([good[:1]], "the dialogues: no usable row: skipped 1 row: the dialogue does not end"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            sft.run(config, rows)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    others = [[{"role": "user", "content": f"red {n}"}, good[1]] for n in range(40)]
    sft.run(config, [good[:1], *others])
    assert "skipped 1 row: the dialogue does not end" in capsys.readouterr().out
    with pytest.raises(ValueError, match="from config.data and from Python, too; leave one out"):
        sft.run(configured(tiny, tmp_path / "both"), [good])
    with pytest.raises(
        ValueError, match="no dialogues to learn from; name their files with --data"
    ):
        sft.run(configured(tiny, tmp_path / "none", data=[]))


def test_a_loss_of_ones_own_is_minimised_and_reported(tiny, tmp_path):
    def doubled(model, batch):
        loss, sums = puna.next_token_loss(model, batch)
        return 2 * loss, {**sums, "plain": loss}

    sft.run(configured(tiny, tmp_path / "plain", clip=1e9))
    sft.run(configured(tiny, tmp_path / "doubled", clip=1e9), loss=doubled)
    plain, own = metrics(tmp_path / "plain"), metrics(tmp_path / "doubled")
    assert own[1]["loss"] == 2 * own[1]["plain"] == 2 * plain[1]["loss"]
    assert own[1]["grad_norm"] == pytest.approx(2 * plain[1]["grad_norm"], rel=1e-5)
    assert own[0]["eval_loss"] == 2 * own[0]["eval_plain"] == 2 * plain[0]["eval_loss"]


@pytest.mark.parametrize(
    "wrong", [lambda loss: loss, lambda loss: (loss[None], {}), lambda loss: (loss, {"a": 1.0})]
)
def test_a_loss_that_returns_something_else_is_told_what_to_return(tiny, tmp_path, wrong):
    def loss(model, batch):
        return wrong(puna.next_token_loss(model, batch)[0])

    with pytest.raises(ValueError, match="the loss must return two things"):
        sft.run(configured(tiny, tmp_path), loss=loss)
