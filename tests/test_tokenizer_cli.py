"""`puna tokenizer` as a user calls it. Run: python -m pytest tests/test_tokenizer_cli.py -v"""

import json
from pathlib import Path

import numpy as np
import pytest

from puna.cli.tokenizer import Encode, Inspect, TrainTokenizer, run
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.train.config import parse

TEXT = "the quick brown fox [bold]jumps[/bold] over 12 lazy dogs\n" * 20


@pytest.fixture
def model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "more text"}) + '\n{"text": ""}\n')
    out = tmp_path / "out" / "tokenizer.model"
    arguments = ["--data", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    arguments += ["--output", str(out), "--vocab-size", "300"]
    run(parse(TrainTokenizer, arguments, "puna tokenizer train"))
    printed = capsys.readouterr().out
    assert "skipped 1 row: the text is empty" in printed
    assert "tokenizer.model: 300 pieces" in printed.replace("\n", "")
    return out


def test_encode_shows_ids_and_pieces(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the [bold]fox[/bold] [/]"  # as markup this would be an error
    run(parse(Encode, ["--tokenizer", str(model), "--text", text], "puna tokenizer encode"))
    ids, pieces = capsys.readouterr().out.splitlines()
    tokenizer = Tokenizer(model)
    assert [int(token) for token in ids.split()] == tokenizer.encode(text)
    assert pieces == " ".join(tokenizer.piece(token) for token in tokenizer.encode(text))


def test_encode_writes_a_corpus(model: Path, tmp_path: Path) -> None:
    arguments = ["--tokenizer", str(model), "--data", str(tmp_path / "a.txt")]
    out = tmp_path / "ids.npy"
    run(parse(Encode, [*arguments, "--output", str(out)], "puna tokenizer encode"))
    assert np.load(out).tolist() == Tokenizer(model).encode(TEXT, bos=True, eos=True)


def test_inspect(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokenizer", str(model), "--data", str(tmp_path / "a.txt")]
    run(parse(Inspect, arguments, "puna tokenizer inspect"))
    printed = capsys.readouterr().out
    n_tokens = len(Tokenizer(model).encode(TEXT))
    assert "of these, bytes" in printed and "256" in printed
    assert f"{len(TEXT) / n_tokens:.3f}" in printed


@pytest.mark.parametrize(
    "flags", [{}, {"text": "a", "output": Path("x.npy")}, {"output": Path("x.npy")}]
)
def test_encode_needs_one_thing_to_do(model: Path, flags: dict) -> None:
    with pytest.raises(ValueError, match="either --text, or --data and --output"):
        run(Encode(model, **flags))


def test_train_needs_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the texts with --data"):
        run(TrainTokenizer((), tmp_path / "t.model"))
