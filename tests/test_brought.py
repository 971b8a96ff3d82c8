"""Data as people bring it: files as they are, compressed or not, folders, patterns, pipes.
Run: python -m pytest tests/test_brought.py -q"""

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

import pytest
from brought import GIVEN, ROWS, USER, WORSE, lines

from puna.trainers.data import arrays, files
from puna.trainers.data.columns import Columns, Reading
from puna.trainers.data.readers import (
    read_dialogues,
    read_prompts,
    read_texts,
)
from puna.trainers.sft import SFTConfig
from puna.trainers.train.inputs import differences, inputs_of


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
    "data",
    [packed(ROWS), json.dumps(ROWS).encode(), gzip.compress(packed(ROWS), mtime=0)],
    ids=["lines", "array", "gzip"],
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
