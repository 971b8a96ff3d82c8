"""`puna data`, and long texts.
Run: python -m pytest tests/test_brought_looks.py -q"""

import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from brought import BAD, GIVEN, GOOD, SHAREGPT, USER, Q, lines

from puna.cli.main import main
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data import encoding, long_texts

# --- puna data


def test_puna_data_says_what_is_read(tmp_path: Path, tiny: Path, capsys) -> None:
    wrong = {"role": "assistant", "content": "bad \x1b[31m", "weight": 0}
    rows = [
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT]},
        {"conversations": [*SHAREGPT, {"from": "tool", "value": "x"}]},
        {"conversations": [USER, wrong, USER, GIVEN]},
        {"conversations": [{"from": "human", "value": "red " * 400}, SHAREGPT[1]]},
    ]
    file = lines(tmp_path / "d.jsonl", *rows)
    assert main(["data", str(file), "--row", "2", "--model", str(tiny / "lm")]) == 0
    said = capsys.readouterr().out
    for expected in (
        "dialogues: ShareGPT (conversations)",
        f"skipped 1 row: a message has the role tool (first {file}:2)",
        f"skipped 1 row: longer than the context of 256 tokens (first {file}:4)",
        "How long the rows are",
    ):
        assert expected in said
    cells = [line.split() for line in said.split("\n")]
    assert ["rows", "2"] in cells and ["skipped", "2"] in cells
    assert "\x1b" not in said and "x1b" in said
    shown = said[said.index("as a model sees it") :]
    context, learned = shown[: shown.index("learned")], shown[shown.index("learned") :]
    assert "bad" in context and "sees the dog" in learned.replace("\n", "")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a b c"}, "texts"),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD}, "preferences"),
        ({"messages": [USER]}, "prompts"),
        ({"messages": [USER, GIVEN]}, "dialogues"),
        ({"prompt": Q}, "prompts"),
    ],
)
def test_puna_data_finds_the_kind(row: dict, kind: str, tmp_path: Path, tiny: Path, capsys) -> None:
    file = lines(tmp_path / "d.jsonl", row)
    for more in ([], ["--model", str(tiny / "tokenizer.model")]):
        assert main(["data", str(file), *more]) == 0
        assert f"{kind}: Puna's own layout" in capsys.readouterr().out
    assert main(["data", str(file), "--row", "9"]) == 1
    assert "row is 9 and there are 1" in capsys.readouterr().err
    assert main(["data", str(lines(tmp_path / "x.jsonl", {"x": 1}))]) == 1
    assert "which no layout has" in capsys.readouterr().err


INSIDE = r"row 1: .*; if the rows are in 'data' \(2 objects\), save that list alone"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"text": "a"},]', "a comma follows the last row, 1, and no other row; take"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "no comma follows row 1 of the list"),
        ("a.json", b'[,{"text": "a"}]', r"row 1: not JSON \(Expecting value"),
        ("a.json", b'[{"text": "a"},,{"text": "b"}]', r"row 2: not JSON \(Expecting value"),
        ("a.json", b'[{"text": "a"},', r"the list does not end \(after row 1\)"),
        ("a.json", b'{"text": "a"},{"text": "b"}', r"row 2: not JSON .*one object after the other"),
        ("a.json", b'{"data": [{"text": "a"}, {"text": "b"}]}', INSIDE),
        ("a.jsonl", b'[\n{"text": "a"}\n]', "a JSON list .*; give it a name that ends in .json"),
        ("a.jsonl", b'[{"text": "a"}]', "a JSON list .*; give it a name that ends in .json"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "a.json is UTF-16, expected UTF-8 text"),
        ("a.txt", "some text".encode("utf-16"), "a.txt is UTF-16, expected UTF-8 text"),
        ("a.csv", b"text,more\na,b\n", "a.csv is a table; save it as .jsonl or .parquet"),
        ("tokenizer.json", b'{"model": {}}', "tokenizer.json belongs to a model and is no data"),
        ("inputs.json", b"{}", "inputs.json belongs to a run and is no data; name .*samples.jsonl"),
    ],
)
def test_what_is_no_data_is_called_by_its_name(
    name: str, data: bytes, message: str, tmp_path: Path, tiny: Path, capsys
) -> None:
    """Whoever reads it: the look, and a stage."""
    (tmp_path / name).write_bytes(data)
    pretrain = ["--size", "mini", "--tokenizer", str(tiny / "tokenizer.model")]
    for words in (
        ["data", str(tmp_path / name)],
        ["pretrain", *pretrain, "--data", str(tmp_path / name), "--out", str(tmp_path / "out")],
    ):
        assert main(words) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert re.search(message, said), said


def test_a_models_files_are_no_data(tmp_path: Path, tiny: Path, capsys) -> None:
    """Its folder, a folder that holds it, its tokenizer and its weights."""
    shutil.copytree(tiny / "lm", tmp_path / "all" / "lm")
    lines(tmp_path / "all" / "d.jsonl", {"text": "a"})
    for place, said in (
        ("all/lm", "holds .*/config.json, which belongs to a model and is no data"),
        ("all", "holds .*/all/lm/config.json, which belongs to a model"),
        ("all/lm/tokenizer.model", "tokenizer.model is binary and no rows, which come as .jsonl"),
        ("all/lm/model.safetensors", "is binary and no rows.*; a model or a tokenizer is named"),
    ):
        assert main(["data", str(tmp_path / place)]) == 1
        assert re.search(said, capsys.readouterr().err)


# --- long texts

TEXT = "The cat  sees the dog.\n\n  Two\tspaces, é 日本語 1234 <s> \n" * 400


@pytest.mark.parametrize("piece", [1, 10, 333])
def test_a_text_in_pieces_has_the_ids_of_the_whole(
    piece: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    assert long_texts.signs(tokenizer) == " \n"
    monkeypatch.setattr(long_texts, "PIECE", piece)
    for text in (TEXT[: 40 * piece], "no\nspace\n" * piece, "nothing" * 9, " " * 99, "a\n", "a "):
        arrays_of = [*long_texts.ids_in_pieces(tokenizer, text, np.uint16)]
        assert np.concatenate(arrays_of).tolist() == tokenizer.encode(text)
    assert len([*long_texts.cut(TEXT, " \n")]) > 30


def test_a_vocabulary_across_words_is_not_cut(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["new york is new york and new york"] * 50), vocab_size=60,
        model_prefix=str(tmp_path / "m"), model_type="bpe", split_by_whitespace=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert " " not in long_texts.signs(Tokenizer(tmp_path / "m.model"))


def test_memory_for_a_text(tiny: Path, tmp_path: Path) -> None:
    """A few bytes a byte; in one call it took 46."""
    file = tmp_path / "long.txt"
    file.write_text("the red cup is in the blue tree\n" * 250_000)  # 8 MB
    size = file.stat().st_size
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    tracemalloc.start()
    found = encoding.encode_file(tmp_path / "ids.npy", tokenizer, encoding.Texts([file]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.documents == 1 and found.tokens > size / 8
    assert peak < 14 * size
