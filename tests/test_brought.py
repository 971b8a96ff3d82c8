"""Data as people bring it: files as they are, layouts of others, memory. Rows are made here, in the
layouts of public data sets. Run: python -m pytest tests/test_brought.py -q"""

import gzip
import importlib
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from puna.cli.main import main
from puna.core.chat import encode_dialogue
from puna.core.tokenizer import Tokenizer
from puna.trainers import sft
from puna.trainers.data import arrays, encoding, files, long_texts
from puna.trainers.data.columns import Columns, Reading, ReadingComparisons, ReadingMessages
from puna.trainers.data.readers import (
    read_answered,
    read_dialogues,
    read_preferences,
    read_prompts,
    read_texts,
)
from puna.trainers.sft import SFTConfig
from puna.trainers.train.inputs import differences, inputs_of

Q, GOOD, BAD = "What does the cat do?", "The cat sees the dog.", "No."
USER = {"role": "user", "content": Q}
GIVEN = {"role": "assistant", "content": GOOD}
WORSE = {"role": "assistant", "content": BAD}
ROWS = [{"prompt": f"{Q} {n}", "response": GOOD} for n in range(5)]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def packed(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    library = pytest.importorskip(files.ZSTD_PACKAGE)
    half = len(data) // 2  # two frames, as tools that append write them
    return library.compress(data[:half]) + library.compress(data[half:])


def parquet(path: Path, rows: list[dict]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.fixture(autouse=True)
def _nothing_copied() -> Iterator[None]:
    files.copied_pipe.cache_clear()
    files.copied_data_set.cache_clear()
    yield


# --- files as they are


FILES = {
    "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "one after the other.json": lambda: packed(ROWS),
    "rows.jsonl.gz": lambda: gzip.compress(packed(ROWS)),
    "rows.json.gz": lambda: gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "rows.jsonl.zst": lambda: zstd(packed(ROWS)),
    "named as none.jsonl": lambda: gzip.compress(packed(ROWS)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    found, skipped = read_dialogues(tmp_path / name)
    assert [row.messages[0]["content"] for row in found] == [row["prompt"] for row in ROWS]
    assert not skipped and found[2].where.startswith(f"{tmp_path / name}:")


def test_parquet(tmp_path: Path) -> None:
    nested = [{"messages": [USER, GIVEN], "id": 1}, {"messages": [USER, WORSE], "id": None}]
    found, skipped = read_dialogues(parquet(tmp_path / "nested.parquet", nested))
    assert [row.messages for row in found] == [[USER, GIVEN], [USER, WORSE]]
    assert found[1].where == f"{tmp_path / 'nested.parquet'}: row 2" and "'id' is" in str(skipped)
    path = parquet(tmp_path / "rows.parquet", ROWS)
    assert len(read_dialogues(path)[0]) == 5
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="rows.parquet is no whole Parquet file .*fetch it again"):
        read_dialogues(path)


def test_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "d" / "deep").mkdir(parents=True)
    lines(tmp_path / "d" / "b.jsonl", ROWS[1])
    lines(tmp_path / "d" / "a.jsonl", ROWS[0])
    (tmp_path / "d" / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(packed(ROWS[2:])))
    for other in ("README.md", ".hidden.jsonl"):
        (tmp_path / "d" / other).write_text("no rows")
    for name in ("d", "d/**/*.jsonl*"):
        found = read_dialogues(tmp_path / name)[0]
        assert [row.messages[0]["content"][-1] for row in found] == list("01234")
    assert len(read_dialogues(tmp_path / "d" / "*.jsonl")[0]) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder without data: no file in it ends with"):
        read_dialogues(tmp_path / "empty")
    with pytest.raises(ValueError, match="no file fits this pattern"):
        read_dialogues(tmp_path / "*.csv")


def fed(path: Path, data: bytes) -> threading.Thread:
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    return writer


@pytest.mark.parametrize(
    "data", [packed(ROWS), json.dumps(ROWS).encode(), gzip.compress(packed(ROWS))]
)
def test_a_pipe_is_read_once_and_looked_at_as_often_as_asked(data: bytes, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    writer = fed(pipe, data)
    first, again = read_dialogues(pipe)[0], read_dialogues(pipe)[0]
    writer.join()
    assert len(first) == 5 and first == again


def test_what_a_pipe_gives_is_pinned(tiny: Path, tmp_path: Path) -> None:
    """The same rows from a pipe of another name are the same run; others are not."""
    pinned = []
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[1:])):
        writer = fed(tmp_path / name, packed(rows))
        config = SFTConfig(model=tiny / "lm", data=[tmp_path / name], out=tmp_path / "out")
        pinned.append(inputs_of(config))
        writer.join()
    assert differences(pinned[0], pinned[1]) == []
    assert "data: c is" in differences(pinned[0], pinned[2])[0]


def test_folders_and_packed_files_are_pinned(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    lines(tmp_path / "d" / "a.jsonl", *ROWS)
    config = SFTConfig(model=tiny / "lm", data=[tmp_path / "d"], out=tmp_path / "out")
    before = inputs_of(config)
    assert before["data"][0]["lines"] == 5 and len(before["model"]) > 1
    lines(tmp_path / "d" / "a.jsonl", *ROWS[:4])
    assert "data: a.jsonl is 4 rows" in differences(before, inputs_of(config))[0]
    lines(tmp_path / "d" / "b.jsonl", ROWS[4])
    assert "data is 2 files where it was 1" in differences(before, inputs_of(config))[0]


def test_standard_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "puna.cli.main", "data", "-", "--kind", "dialogues"]
    done = subprocess.run(command, input=packed(ROWS), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ["rows", "5"] in [line.split() for line in done.stdout.decode().split("\n")]


def test_a_pipe_is_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("puna.core.ranks.world_size", lambda: 2)
    with pytest.raises(ValueError, match="is a pipe, which one process alone can read; write it"):
        read_dialogues(tmp_path / "pipe")


def test_a_terminal_is_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ValueError, match="- stands for what is piped in, and nothing is"):
        read_dialogues("-")


def test_a_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="^hf:a/b is read by the package datasets, which is not"):
        read_dialogues("hf:a/b")
    asked = []

    def load_dataset(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        if name == "a/none":
            raise FileNotFoundError("no such data set\nmore lines")
        return ROWS

    stand_in = types.SimpleNamespace(load_dataset=load_dataset, __version__="4.1.0")
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert len(read_dialogues("hf:a/b")[0]) == len(read_dialogues("hf:a/b:test")[0]) == 5
    assert asked == [("a/b", "train"), ("a/b", "test")]
    with pytest.raises(ValueError, match="cannot be read by the package datasets: no such .*set$"):
        read_dialogues("hf:a/none")
    stand_in.__version__ = "3.6.0"
    with pytest.raises(ValueError, match="datasets 3.6.0 may run code that comes with data"):
        read_dialogues("hf:a/c")


@pytest.mark.parametrize("package", [files.ZSTD_PACKAGE, "pyarrow.parquet"])
def test_a_package_that_is_missing_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows"
    file.write_bytes((files.ZSTANDARD if "zstd" in package else files.PARQUET) + bytes(90))
    monkeypatch.setitem(sys.modules, package, None)
    named = package if "zstd" in package else "pyarrow"
    with pytest.raises(ValueError, match=rf"package {named}, .*not installed: .*puna\[data\]"):
        read_dialogues(file)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_packed_file_that_is_cut_or_damaged(ending: str, tmp_path: Path) -> None:
    rows = [{"prompt": os.urandom(40).hex(), "response": "a"} for _ in range(300)]
    data = gzip.compress(packed(rows)) if ending == "gz" else zstd(packed(rows))
    file = tmp_path / f"rows.jsonl.{ending}"
    harmed = bytearray(data)
    harmed[4:12] = b"\xff" * 8
    for damaged in (bytes(harmed), data[: len(data) // 3], data[:-3]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is cut short or damaged .*fetch it again"):
            read_dialogues(file)


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.json.gz"])
def test_what_is_packed_is_never_unpacked_as_a_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MB of one line in 64 kB: it is read no further than a row may be long."""
    monkeypatch.setattr("puna.core.documents.LONGEST", 1 << 20)
    monkeypatch.setattr(arrays, "LONGEST", 1 << 20)
    file = tmp_path / name
    with gzip.open(file, "wb", compresslevel=1) as bomb:
        bomb.write(b'{"prompt": "')
        for _ in range(64):
            bomb.write(bytes(48 for _ in range(1 << 10)) * (1 << 10))
    tracemalloc.start()
    with pytest.raises(ValueError, match=name):
        read_prompts(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


BROKEN = {
    b'[{"a": "x"}, {"a": ': "rows.json: row 2: not JSON",
    b'[{"a": "x"}': r"the list does not end \(after row 1\)",
    b'[{"a": "x"}] x': "something follows the list",
    b'[{"a": "x"}, 7]': "row 2: a JSON int, expected an object with columns",
    b'[{"a": "x"}, {"a": "\xff"}]': "rows.json: not UTF-8",
    b"[" * 100_000: "row 1: the JSON is nested too deeply",
    b'{"a": 1' + b"0" * 5000 + b"}": "row 1: a number has more than 4,300 digits",
    b"": "no usable row: the file is empty",
}


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_a_list_that_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(data)
    with pytest.raises(ValueError, match=BROKEN[data]):
        read_texts(tmp_path / "rows.json", Reading(columns=Columns(text="a")))


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_list_is_the_same_in_pieces(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f'é\U0001f600 "{n}" ,]}}', "n": [n, -1.5e3, True, None]} for n in range(9)]
    for number, text in enumerate((json.dumps(rows), "\n".join(map(json.dumps, rows)))):
        file = tmp_path / f"{number}.json"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(arrays, "PIECE", piece)
        with file.open("rb") as opened:
            assert [row for _, row in arrays.json_values(opened, "x")] == rows


# --- layouts of others

SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]
DIALOGUES = {
    "ShareGPT": {"conversations": SHAREGPT},
    "Alpaca": {"instruction": Q, "input": "", "output": GOOD},
    "Dolly": {"instruction": Q, "context": "", "response": GOOD},
    "TRL's prompt and completion": {"prompt": [USER], "completion": [GIVEN]},
    "TRL's prompt and completion (": {"prompt": Q, "completion": GOOD},
}
PREFERENCES = {
    "UltraFeedback, binarized": {
        "prompt": Q, "chosen": [USER, GIVEN], "rejected": [USER, WORSE],
        "messages": [USER, GIVEN], "score_chosen": 8.0, "score_rejected": 4.0,
    },
    "SHP": {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0},
    "SHP (": {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
    "PKU-SafeRLHF": {
        "prompt": Q, "response_0": BAD, "response_1": GOOD, "is_response_0_safe": True,
        "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0,
    },
    "HelpSteer2's preferences": {
        "prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": -2,
    },
    "PandaLM": {
        "instruction": Q, "input": "", "response1": BAD, "response2": GOOD,
        "annotator1": 2, "annotator2": 2, "annotator3": 1,
    },
    "a ranking": {
        "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
        "answers": [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}],
    },
}  # fmt: skip
OWN_PREFERENCES = [  # TRL's four, and Anthropic's
    {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    {"prompt": [USER], "chosen": [GIVEN], "rejected": [WORSE]},
    {"chosen": [USER, GIVEN], "rejected": [USER, WORSE]},
    {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
     "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"},
]  # fmt: skip


@pytest.mark.parametrize("name", DIALOGUES)
def test_dialogues_of_others(name: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "d.jsonl", DIALOGUES[name])
    for read in (read_dialogues, read_answered):
        (found,), skipped = read(file)  # type: ignore[operator]
        answer = [] if read is read_dialogues else [GIVEN]
        assert [*found.messages, *answer] == [USER, GIVEN]
        assert f"read as {name.rstrip(' (')}" in str(skipped)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_others(name: str, tmp_path: Path) -> None:
    (found,), skipped = read_preferences(lines(tmp_path / "p.jsonl", PREFERENCES[name]))
    assert (found.messages, found.chosen, found.rejected) == ([USER], GOOD, BAD)
    assert found.rating == ("better" if "HelpSteer2" in name else None)
    assert found.safety == ("both_safe" if "PKU" in name else None)
    assert f"read as {name.rstrip(' (')}" in str(skipped)


@pytest.mark.parametrize("row", OWN_PREFERENCES)
def test_what_is_ours_is_not_announced(row: dict, tmp_path: Path) -> None:
    (found,), skipped = read_preferences(lines(tmp_path / "p.jsonl", row))
    assert (found.messages, found.chosen, found.rejected) == ([USER], GOOD, BAD)
    assert not skipped


def test_trl_without_a_prompt(tmp_path: Path) -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    (found,), skipped = read_preferences(lines(tmp_path / "p.jsonl", row))
    assert (found.chosen, found.rejected) == ("blue.", "green.")
    assert found.messages == [{"role": "user", "content": "The sky is "}]
    assert "whose common beginning is the prompt" in str(skipped)
    with pytest.raises(ValueError, match="is no transcript"):
        read_preferences(lines(tmp_path / "q.jsonl", {"chosen": "blue", "rejected": "green"}))


def test_rows_of_helpsteer_2_are_compared_in_pairs(tmp_path: Path) -> None:
    grades = [(Q, BAD, 1), (Q, GOOD, 4), ("alone", "a", 2), ("even", "a", 2), ("even", "b", 2)]
    rows = [{"prompt": p, "response": r, "helpfulness": h} for p, r, h in grades]
    (found,), skipped = read_preferences(lines(tmp_path / "p.jsonl", *rows))
    assert (found.messages, found.chosen, found.rejected, found.rating) == ([USER], GOOD, BAD, None)
    assert dict(skipped) == {
        "no row beside it has the same prompt": 1, "a tie where a ranking is asked for": 1,
    }  # fmt: skip


def test_every_two_answers_of_a_ranking_are_compared(tmp_path: Path) -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("c", 3), ("a", 1), ("b", 1))]
    (*found,), _ = read_preferences(lines(tmp_path / "p.jsonl", {"prompt": Q, "answers": answers}))
    assert [(each.chosen, each.rejected) for each in found] == [("a", "c"), ("b", "c")]
    (prompt,), _ = read_prompts(tmp_path / "p.jsonl")
    assert prompt.messages == [USER]


TREE = [  # (id, parent, role, text, rank)
    ("1", None, "prompter", "q1", None), ("2", "1", "assistant", "worse", 1),
    ("3", "1", "assistant", "best", 0), ("4", "3", "prompter", "q2", 0),
    ("5", "4", "assistant", "end", None), ("6", "2", "prompter", "q3", None),
    ("7", None, "prompter", "nobody answers", None),
]  # fmt: skip


def oasst() -> list[dict]:
    names = ("message_id", "parent_id", "role", "text", "rank")
    return [dict(zip(names, each, strict=True)) for each in TREE]


def as_trees(rows: list[dict]) -> list[dict]:
    by_id = {row["message_id"]: {**row, "replies": []} for row in rows}
    for row in by_id.values():
        if row["parent_id"] is not None:
            by_id[row["parent_id"]]["replies"].append(row)
    roots = [row for row in by_id.values() if row["parent_id"] is None]
    return [{"message_tree_id": row["message_id"], "prompt": row} for row in roots]


@pytest.mark.parametrize("trees", [False, True])
def test_trees_of_oasst(trees: bool, tmp_path: Path) -> None:
    rows = as_trees(oasst()) if trees else oasst()
    file = lines(tmp_path / "o.jsonl", *rows)
    (thread,), skipped = read_dialogues(file)
    assert [each["content"] for each in thread.messages] == ["q1", "best", "q2", "end"]
    assert "read as OASST" in str(skipped)
    (pair,), _ = read_preferences(file)
    assert (pair.messages[0]["content"], pair.chosen, pair.rejected) == ("q1", "best", "worse")
    assert [each.messages[0]["content"] for each in read_prompts(file)[0]] == [
        "q1", "nobody answers",
    ]  # fmt: skip


def test_the_majority_of_annotators(tmp_path: Path) -> None:
    base = PREFERENCES["PandaLM"]
    rows = [base, base | {"annotator1": 0}, base | {"response1": True}, base | {"annotator2": [1]}]
    file = lines(tmp_path / "p.jsonl", *rows)
    with pytest.raises(ValueError, match="p.jsonl:3: 'response1' is true, expected a string"):
        read_preferences(file)
    (*found,), skipped = read_preferences(file, ReadingComparisons(on_error="skip"))
    assert len(found) == 1
    assert skipped["a tie where a ranking is asked for"] == 2 and skipped["it cannot be read"] == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"history": Q}, Q),
        ({"conversations": SHAREGPT[:1]}, Q),
        ({"instruction": "Say it.", "input": "the cat", "output": "x"}, "Say it.\n\nthe cat"),
        (PREFERENCES["UltraFeedback, binarized"], Q),
    ],
)
def test_prompts_of_others(row: dict, expected: str, tmp_path: Path) -> None:
    (found,), skipped = read_prompts(lines(tmp_path / "q.jsonl", row))
    assert found.messages == [{"role": "user", "content": expected}]
    assert "read as " in str(skipped)


def test_what_is_mapped_comes_first(tmp_path: Path) -> None:
    row = PREFERENCES["PKU-SafeRLHF"] | {"is_response_1_safe": False}
    how = ReadingComparisons(
        columns=Columns(a="response_0", b="response_1", rating="safer_response_id"),
        ratings={"0": "a", "1": "b"},
    )
    (found,), skipped = read_preferences(lines(tmp_path / "p.jsonl", row), how)
    assert (found.chosen, found.rating, found.safety) == (BAD, None, None)
    assert "read as" not in str(skipped)
    own = lines(tmp_path / "own.jsonl", OWN_PREFERENCES[0])  # a file beside it, in our layout
    (found,), skipped = read_preferences(own, how)
    assert found.chosen == GOOD and "read as Puna's own layout" in str(skipped)


# --- messages as others write them


def test_parts_roles_and_what_has_no_place(tmp_path: Path) -> None:
    def part(text: str) -> dict:
        return {"type": "text", "text": text}

    image = {"type": "image_url", "image_url": {"url": "x"}}
    rows = [
        {"messages": [{**USER, "content": [part("a"), part("b")]}, GIVEN]},
        {"messages": [{**USER, "content": [part("a"), image]}, GIVEN]},
        {"messages": [USER, {"role": "assistant", "content": None}]},
        {"messages": [USER, GIVEN, {"role": "tool", "content": "sun"}, GIVEN]},
        {"messages": [{"role": "developer", "content": "x"}, USER, GIVEN]},
        {"messages": [{"role": "system", "content": " "}, USER, GIVEN]},
    ]
    found, skipped = read_dialogues(lines(tmp_path / "d.jsonl", *rows))
    assert [row.messages for row in found] == [
        [{**USER, "content": "a\nb"}, GIVEN], [USER, GIVEN]
    ]  # fmt: skip
    assert dict(skipped) == {
        "a message has a part that is no text (image_url)": 1,
        "a message has no content": 1,
        "a message has the role tool": 1,
        "a message has the role developer": 1,
    }


def test_null_is_no_column(tmp_path: Path) -> None:
    row = {"messages": None, "prompt": Q, "response": GOOD}
    (found,), _ = read_dialogues(lines(tmp_path / "d.jsonl", row))
    assert found.messages == [USER, GIVEN]


def test_roles_of_ones_own(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "A", "content": Q}, {"role": "B", "content": GOOD}]}]
    file = lines(tmp_path / "d.jsonl", *rows)
    with pytest.raises(ValueError, match=r"d.jsonl:1: 'messages\[0\]' has role \"A\".*\[roles\]"):
        read_dialogues(file)
    (found,), skipped = read_dialogues(file, ReadingMessages(roles={"A": "user", "B": "assistant"}))
    assert found.messages == [USER, GIVEN] and not skipped


def test_rows_that_cannot_be_read_are_counted_where_asked(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    good = json.dumps(ROWS[0])
    file.write_text(f'{good}\n{{"prompt": 3, "response": "a"}}\nno json\n[1]\n{good}\n')
    with pytest.raises(ValueError, match="d.jsonl:2: 'prompt' is 3"):
        read_dialogues(file)
    found, skipped = read_dialogues(file, ReadingMessages(on_error="skip"))
    assert len(found) == 2 and skipped["it cannot be read"] == 3
    assert f"the first row that cannot be read: {file}:2: 'prompt' is 3" in str(skipped)


def test_columns_and_ratings_on_the_command_line(tmp_path: Path, tiny: Path, capsys) -> None:
    """`[columns]` for prompts and for pretraining text, which had none."""
    texts = lines(tmp_path / "t.jsonl", *[{"content": "red cup blue tree " * 9}] * 6)
    common = ["--device", "cpu", "--batch", "1", "--context", "64"]
    command = ["pretrain", "--data", str(texts), "--tokenizer", str(tiny / "tokenizer.model")]
    command += ["--out", str(tmp_path / "base"), "--steps", "1", "--eval-share", "0", *common]
    assert main(command) == 1
    assert "expected 'text'" in capsys.readouterr().err
    assert main([*command, "--columns.text", "content", "--amend"]) == 0
    prompts = lines(tmp_path / "q.jsonl", {"question": "red"}, {"question": "blue"})
    (tmp_path / "cols.toml").write_text('[columns]\nprompt = "question"\n')
    command = ["sample", str(tmp_path / "cols.toml"), "--policy", str(tiny / "chat"), "--device"]
    command += ["cpu", "--prompts", str(prompts), "--samples", "1", "--max-new-tokens", "2"]
    assert main([*command, "--out", str(tmp_path / "drawn")]) == 0
    assert len((tmp_path / "drawn" / "samples.jsonl").read_text().split("\n")) == 3


def test_long_dialogues_are_cut_where_asked(tiny: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    rows = [ROWS[0], {"prompt": "red", "response": "blue " * 300}, {"prompt": "cup " * 300,
            "response": "x"}]  # fmt: skip
    file = lines(tmp_path / "d.jsonl", *rows)
    found = read_dialogues(file)[0]
    kept = sft.pack(tokenizer, found, 128)
    assert kept.skipped.first == {"longer than the 128 tokens of a row": f"{file}:2"}
    whole = sft.pack(tokenizer, found, 128, truncate=True)
    said = f"cut 2 to the 128 tokens of a row (first {file}:2)"
    assert whole.skipped.notes == [said]
    assert dict(whole.skipped) == {"no token to learn": 1}  # its prompt alone fills the row
    ids, weights = encode_dialogue(tokenizer, found[1].messages)
    batch = whole.batch(range(len(whole)))
    row = int((batch.weights > 0).sum(1).argmax())
    assert batch.tokens[row].tolist() == ids[:128]
    assert batch.weights[row].tolist() == weights[1:129]


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
