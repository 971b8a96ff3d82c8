"""The readers, on made and on real files. Run: python -m pytest tests/test_data.py -v"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from puna.trainers.data.columns import Columns, ReadingComparisons
from puna.trainers.data.readers import (
    Skipped,
    read_dialogues,
    read_preferences,
    read_prompts,
    read_texts,
)
from puna.trainers.train.config import parse

SHARED = Path(
    os.environ.get("PUNA_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
)
real = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real inputs at {SHARED}"),
]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_texts(text)[0] == ["one\ntwo\n"]
    rows, skipped = read_texts(write(tmp_path / "a.jsonl", {"text": "x"}, {"text": " "}))
    assert rows == ["x"]
    assert dict(skipped) == {"the text is empty": 1}
    assert skipped.first == {"the text is empty": f"{tmp_path / 'a.jsonl'}:2"}


def test_skipped_rows_are_counted_and_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "response": ""},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"prompt": "q", "response": " "},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}]},
    )
    rows, skipped = read_dialogues(path)
    assert len(rows) == 1
    assert str(skipped).splitlines() == [
        f"skipped 2 rows: the assistant message is empty (first {path}:2)",
        f"skipped 1 row: the roles do not alternate (first {path}:3)",
        f"skipped 1 row: the dialogue has no user message (first {path}:5)",
        f"skipped 1 row: the dialogue does not end with an assistant message (first {path}:6)",
    ]


def test_merged_counts_keep_the_first_place() -> None:
    one, two = Skipped(), Skipped()
    one.add("tie", "a:1")
    two.add("tie", "b:7")
    two.add("empty", "b:9")
    one.merge(two)
    assert one == {"tie": 2, "empty": 1}
    assert one.first == {"tie": "a:1", "empty": "b:9"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "q", "safety": 1}', r":3: 'safety' is 1, expected true or false"),
        (b'{"prompt": "q', r":3: not JSON \(Unterminated string starting at column 12\)"),
        (b'{"prompt": "q"', r":3: not JSON \(.*column \d+\); expected one JSON object a line"),
        (b'["q"]', r":3: a JSON list, expected one object a line"),
        (b'{"prompt": "\xff"}', r":3: not UTF-8"),
        (b"[" * 100_000, r":3: the JSON is nested too deeply"),
    ],
)
def test_a_row_that_cannot_be_read(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "q"}\n\n' + line + b"\n")  # a blank line is no row
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_files_without_a_usable_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="no usable row: the file is empty"):
        read_prompts(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="no usable row: skipped 1 row: the user message is empty"):
        read_prompts(write(tmp_path / "one.jsonl", {"prompt": ""}))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="the file is empty"):
        read_texts(tmp_path / "empty.txt")
    (tmp_path / "bad.txt").write_bytes(b"a\nb\xff")
    with pytest.raises(ValueError, match=r"bad.txt:2: not UTF-8"):
        read_texts(tmp_path / "bad.txt")


RECIPE = """
data = "ours.jsonl"
[columns]
a = "one"
b = "two"
rating = "verdict"
[ratings]
"1-wins" = "a better"
"2-wins" = "b significantly_better"
"""


@dataclass(kw_only=True)
class Config(ReadingComparisons):
    data: Path


def test_a_recipe_maps_columns_and_ratings(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    data = write(
        tmp_path / "d.jsonl",
        {"prompt": "q", "one": "x", "two": "y", "verdict": "1-wins"},
        {"prompt": "q", "one": "x", "two": "y", "verdict": "2-wins"},
    )
    arguments = [str(tmp_path / "recipe.toml"), "--data", str(data), "--columns.prompt", "prompt"]
    config = parse(Config, arguments, "test")
    rows, _ = read_preferences(config.data, config)
    assert [(row.chosen, row.rating) for row in rows] == [
        ("x", "better"),
        ("y", "significantly_better"),
    ]
    (tmp_path / "typo.toml").write_text(RECIPE.replace("rating =", "ratng ="))
    with pytest.raises(ValueError, match="unknown key 'ratng'; did you mean rating"):
        parse(Config, [str(tmp_path / "typo.toml")], "test")


class TestReal:
    pytestmark = real

    def test_hh(self) -> None:
        for name, used, counts in [
            ("helpful", 595, {"differ before": 3, "message is empty": 1, "not alternate": 1}),
            ("harmless", 598, {"message is empty": 2}),
        ]:
            rows, skipped = read_preferences(SHARED / "preferences" / f"hh_{name}-base_600.jsonl")
            assert len(rows) == used
            assert sum(skipped.values()) == 600 - used
            for part, count in counts.items():
                assert sum(n for reason, n in skipped.items() if part in reason) == count

    def test_hh_transcripts_lose_nothing(self) -> None:
        """The messages, written again as a transcript, are the file's own text but for spaces."""
        path = SHARED / "preferences" / "hh_helpful-base_600.jsonl"
        rows, _ = read_preferences(path)
        speakers = {"user": "Human", "assistant": "Assistant"}
        written = {
            "".join(f"{speakers[m['role']]}:{m['content']}" for m in row.messages)
            + f"Assistant:{row.chosen}"
            for row in rows
        }
        sources = [json.loads(line)["chosen"] for line in path.read_text().splitlines()]
        squeezed = Counter("".join(source.split()) for source in sources)
        assert all("".join(text.split()) in squeezed for text in written)

    def test_graded_comparisons(self) -> None:
        path = SHARED / "preferences" / "tulu1_graded.jsonl"
        columns = Columns(
            a="completion_a",
            b="completion_b",
            rating="preference",
            a_safe="completion_a_is_acceptable",
            b_safe="completion_b_is_acceptable",
        )
        ratings = {"tie": "tie", "yes": "safe", "no": "unsafe"}
        for side in "ab":
            ratings[f"{side}-is-better"] = f"{side} better"
            ratings[f"{side}-is-slightly-better"] = f"{side} slightly_better"
        rows, skipped = read_preferences(path, ReadingComparisons(columns=columns, ratings=ratings))
        source = [json.loads(line) for line in path.read_text().splitlines()]
        ties = sum(row["preference"] == "tie" for row in source)
        assert sorted(skipped.values()) == [1, 2, ties]
        assert len(rows) == len(source) - ties - 3
        verdicts = Counter(row.rating for row in rows)
        assert verdicts == {"better": 346, "slightly_better": 425}

    def test_instructions_and_text(self) -> None:
        rows, skipped = read_dialogues(SHARED / "instruct" / "dolly_hh_1000.jsonl")
        assert (len(rows), len(skipped)) == (1000, 0)
        (text,), skipped = read_texts(SHARED / "text" / "tinyshakespeare.txt")
        assert (len(text), len(skipped)) == (1_115_394, 0)
