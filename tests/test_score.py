"""`puna score`: rewards of texts, read from rows or from the command line.
Run: python -m pytest tests/test_score.py -q"""

import json
import math

import pytest
import torch

import puna
from puna.cli.main import main
from puna.core.checkpoint.folder import load_model
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import score
from puna.trainers.score import ScoreConfig

PROMPT = [{"role": "user", "content": "red cup"}]


def dialogue(answer: str) -> list:
    return [*PROMPT, {"role": "assistant", "content": answer}]


def file_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_keep_their_columns_and_get_eq_4(tiny, tmp_path, capsys):
    """Both scores are those of `puna.load(...).score`, the switch is written out here."""
    texts = ["blue", "give nine moon", "old fish lamp red"]
    rows = [{"messages": dialogue(text), "safety": n == 0} for n, text in enumerate(texts)]
    data = file_of(tmp_path / "d.jsonl", *rows, {"prompt": "q", "response": "blue", "id": 7})
    judges = {name: puna.load(tiny / name) for name in ("helpfulness", "safety")}
    dialogues = [row["messages"] for row in rows]
    dialogues.append([{"role": "user", "content": "q"}, {"role": "assistant", "content": "blue"}])
    raw = {name: judge.score(dialogues) for name, judge in judges.items()}
    cut = sum(sorted(1 / (1 + math.exp(-x)) for x in raw["safety"][1:])[:2]) / 2
    config = ScoreConfig(
        model=tiny / "helpfulness", safety=tiny / "safety", data=[data], device="cpu", batch=3,
        safety_threshold=cut, out=tmp_path / "out.jsonl",
    )  # fmt: skip
    found = score.run(config)
    assert found == [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found[3]["id"] == 7 and found[0]["messages"] == rows[0]["messages"]
    branches = []
    for number, row in enumerate(found):
        helpful, safe = (raw[name][number] for name in ("helpfulness", "safety"))
        assert row["scores"]["helpfulness"] == pytest.approx(helpful, abs=1e-5)
        assert row["scores"]["safety"] == pytest.approx(safe, abs=1e-5)
        unsafe = 1 / (1 + math.exp(-safe)) < cut
        branch = "is_safety" if number == 0 else "unsafe" if unsafe else "helpfulness"
        expected = helpful if branch == "helpfulness" else safe
        assert row["score"] == pytest.approx(expected, abs=1e-5) and row["branch"] == branch
        assert row["sigmoid"] == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-5)
        branches.append(branch)
    assert set(branches) == {"is_safety", "unsafe", "helpfulness"}
    shown = capsys.readouterr().out
    assert "Scores of 4 answers" in shown and "helpfulness" in shown and "'id'" in shown


def test_one_text_from_the_command_line(tiny, capsys):
    arguments = ["--prompt", "red cup", "--answer", "blue", "--device", "cpu"]
    assert main(["score", "--model", str(tiny / "safety"), *arguments]) == 0
    expected = puna.load(tiny / "safety").score(dialogue("blue"))
    assert f"{expected:.3f}" in capsys.readouterr().out


def test_a_sample_is_read_by_its_ids(tiny, tmp_path):
    """An answer that was cut off has no EOS, which its text alone would be given."""
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    ids = tokenizer.encode("blue")
    sample = {"messages": PROMPT, "is_safety": True, "answer": "blue", "tokens": ids}
    data = file_of(tmp_path / "s.jsonl", sample)
    (row,) = score.run(ScoreConfig(model=tiny / "safety", data=[data], device="cpu"))
    model = load_model(tiny / "safety")
    prompt = tokenizer.encode("[INST] red cup [/INST]", bos=True)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt + ids]))[0, -1] @ model.score.weight[0]).item()
    assert row["score"] == pytest.approx(expected, abs=1e-5)
    assert row == {**sample, "score": row["score"], "sigmoid": row["sigmoid"]}
    file_of(data, {**sample, "answer": "other words"})
    with pytest.raises(ValueError, match=r"s.jsonl:1: the ids do not spell the answer; .* text"):
        score.run(ScoreConfig(model=tiny / "safety", data=[data]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safety": "yes"}, "'safety' is \"yes\", expected true or false"),
        ({"answer": "a", "tokens": [], "is_safety": True}, r"tokens is \[\], expected ids"),
        ({"answer": "a", "tokens": [3]}, "is_safety is missing, expected true or false"),
    ],
)
def test_a_row_that_cannot_be_read(tiny, tmp_path, changes, message):
    data = file_of(tmp_path / "d.jsonl", {"messages": dialogue("blue"), **changes})
    with pytest.raises(ValueError, match=f"d.jsonl:1: {message}"):
        score.run(ScoreConfig(model=tiny / "safety", data=[data]))


def test_quantiles():
    values = torch.tensor([float(n) for n in range(11)])[torch.randperm(11)]
    assert score.spread(values) == ["5.000", "0.000", "1.000", "5.000", "9.000", "10.000"]
