"""Layouts of others: rows made here, in the columns of public data sets.
Run: python -m pytest tests/test_brought_layouts.py -q"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from brought import BAD, GIVEN, GOOD, ROWS, SHAREGPT, USER, WORSE, Q, lines

from puna.cli.main import main
from puna.core.text.chat import encode_dialogue
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import sft
from puna.trainers.data.columns import Columns, ReadingComparisons, ReadingMessages
from puna.trainers.data.readers import (
    read_answered,
    read_dialogues,
    read_ghosts,
    read_preferences,
    read_preprompts,
    read_prompts,
    read_texts,
)
from puna.trainers.reward import RewardConfig
from puna.trainers.train.config import load_recipe

# --- layouts of others

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
    assert skipped["a tie where a ranking is asked for"] == 2 and skipped["unreadable"] == 1


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
    null = lines(tmp_path / "null.jsonl", {"prompt": None, "response": GOOD})
    with pytest.raises(ValueError, match="null.jsonl:1: 'prompt' is null, expected 'messages' or"):
        read_dialogues(null)


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
    assert len(found) == 2 and skipped["unreadable"] == 3
    assert f"skipped 3 rows: unreadable (first {file}:2)" in str(skipped)
    assert f"the first row that cannot be read: {file}:2: 'prompt' is 3" in str(skipped)
    none = lines(tmp_path / "none.jsonl", *[{"prompt": 3, "response": "a"}] * 4)
    with pytest.raises(ValueError, match=r"no usable row: skipped 4 rows.*:1: 'prompt' is 3, exp"):
        read_dialogues(none, ReadingMessages(on_error="skip"))


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


RENAMED = {
    read_texts: {"text": "red"},
    read_dialogues: {"prompt": "red", "response": "blue"},
    read_prompts: {"messages": [USER], "safety": True, "category": "fire"},
    read_preprompts: {"preprompt": "Be safe.", "category": "fire"},
    read_ghosts: {"turns": ["red", "blue"], "instruction": "Be short.", "short": "Short."},
    read_preferences: {
        "prompt": "red", "chosen": "a", "rejected": "b", "rating": "better",
        "safety": "both_safe", "batch": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("read", RENAMED)
def test_every_column_can_have_another_name(read, tmp_path: Path) -> None:
    row = RENAMED[read]
    plain = read(lines(tmp_path / "plain.jsonl", row))[0][0]
    file = lines(tmp_path / "own.jsonl", {f"my {name}": value for name, value in row.items()})
    names = Columns(**{name: f"my {name}" for name in row})
    (found,), skipped = read(file, ReadingComparisons(columns=names))
    where = {"where": f"{file}:1"} if hasattr(plain, "where") else {}
    assert not skipped and found == (plain._replace(**where) if where else plain)


def test_no_column_is_left_out_above() -> None:
    """But those of answers a and b, and what is put into prompts: PREFERENCES and DIALOGUES."""
    elsewhere = {"a", "b", "a_safe", "b_safe", "system", "input"}
    named = {name for row in RENAMED.values() for name in row}
    assert named | elsewhere == {field.name for field in fields(Columns)}


def test_the_prompts_of_transcripts(tmp_path: Path) -> None:
    said = "\n\nHuman: red\n\nAssistant: blue\n\nHuman: cup\n\nAssistant: "
    file = lines(tmp_path / "hh.jsonl", {"chosen": said + "yes", "rejected": said + "no"})
    (prompt,), skipped = read_prompts(file)
    assert [message["content"] for message in prompt.messages] == ["red", "blue", "cup"]
    assert not prompt.is_safety and not skipped


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


# --- the rows of the list of faults, where they are

FAULTS = Path(__file__).resolve().parents[1] / ".." / "shared" / "faults" / "rows"
FOUND = {
    "ultrafeedback.jsonl": (read_preferences, 8), "sharegpt.jsonl": (read_dialogues, 4),
    "empty_system.jsonl": (read_dialogues, 4), "all_empty_system.jsonl": (read_dialogues, 3),
    "toolrole.jsonl": (read_dialogues, 3), "developer.jsonl": (read_dialogues, 3),
    "null_content.jsonl": (read_dialogues, 3), "parts.jsonl": (read_dialogues, 4),
    "shp.jsonl": (read_preferences, 8), "pku.jsonl": (read_preferences, 8),
    "helpsteer.jsonl": (read_preferences, 7), "trl_pc_conv.jsonl": (read_dialogues, 4),
    "trl_explicit.jsonl": (read_preferences, 8), "array.json": (read_dialogues, 3),
    "alpaca.jsonl": (read_dialogues, 8), "dolly_raw.jsonl": (read_dialogues, 4),
    "extra_null.jsonl": (read_dialogues, 4),
}  # fmt: skip


@pytest.mark.shared
@pytest.mark.skipif(not FAULTS.is_dir(), reason=f"no rows at {FAULTS}")
@pytest.mark.parametrize("name", FOUND)
def test_the_rows_of_the_list(name: str) -> None:
    read, used = FOUND[name]
    assert len(read(FAULTS / name)[0]) == used  # type: ignore[operator]


@pytest.mark.shared
@pytest.mark.skipif(not FAULTS.is_dir(), reason=f"no rows at {FAULTS}")
def test_verdicts_of_a_recipe_need_no_grade() -> None:
    how = load_recipe(RewardConfig, FAULTS / "shp_bare.toml")
    how = ReadingComparisons(columns=Columns(**how["columns"]), ratings=how["ratings"])
    rows, skipped = read_preferences(FAULTS / "shp.jsonl", how)
    assert {row.rating for row in rows} == {None} and len(rows) == 8
    assert "read as" not in str(skipped)
