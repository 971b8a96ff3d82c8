"""Rows of every layout that is read. Run: python -m pytest tests/test_formats.py -v"""

import pytest

from puna.trainers.data.formats import (
    Columns,
    Dialogue,
    Malformed,
    Preference,
    Prompt,
    Unusable,
    parse_dialogue,
    parse_preference,
    parse_prompt,
    parse_text,
    parse_transcript,
)

OURS = Columns()
USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
COMPARED = Columns(a="x", b="y", rating="verdict", a_safe="x_ok", b_safe="y_ok")
VERDICTS = {"x!": "a better", "y": "b slightly_better", "=": "tie", "yes": "safe", "no": "unsafe"}


def test_text_and_its_column() -> None:
    assert parse_text({"text": "abc"}, OURS) == "abc"
    assert parse_text({"content": "abc", "text": 5}, Columns(text="content")) == "abc"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD]},
        {"prompt": "q", "response": "good"},
        {"prompt": [USER], "response": "good"},
    ],
)
def test_dialogue_layouts(row: dict) -> None:
    assert parse_dialogue(row, OURS) == Dialogue([USER, GOOD])


def test_dialogue_with_its_own_columns() -> None:
    columns = Columns(prompt="instruction", response="output")
    row = {"instruction": "q", "output": "good"}
    assert parse_dialogue(row, columns) == Dialogue([USER, GOOD])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
    ],
)
def test_preference_layouts(row: dict) -> None:
    assert parse_preference(row, OURS, {}) == Preference([USER], "good", "bad")


def test_native_preference() -> None:
    row = {
        "messages": [USER],
        "chosen": "good",
        "rejected": "bad",
        "rating": "slightly_better",
        "safety": "both_unsafe",
        "batch": 3,
    }
    expected = Preference([USER], "good", "bad", "slightly_better", "both_unsafe", 3)
    assert parse_preference(row, OURS, {}) == expected


def test_ratings_of_another_scale() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "score": 3}
    columns = Columns(rating="score")
    assert parse_preference(row, columns, {"3": "better"}).rating == "better"
    with pytest.raises(
        Malformed, match=r"'score' is 3, expected significantly_better.*\[ratings\]"
    ):
        parse_preference(row, columns, {})


@pytest.mark.parametrize(
    ("verdict", "x_ok", "y_ok", "expected"),
    [
        ("x!", "yes", "no", Preference([USER], "ax", "by", "better", "chosen_safe")),
        ("x!", True, True, Preference([USER], "ax", "by", "better", "both_safe")),
        ("y", "no", "no", Preference([USER], "by", "ax", "slightly_better", "both_unsafe")),
        ("y", "no", "yes", Preference([USER], "by", "ax", "slightly_better", "chosen_safe")),
    ],
)
def test_answers_a_and_b(verdict: str, x_ok: object, y_ok: object, expected: Preference) -> None:
    row = {"prompt": "q", "x": "ax", "y": "by", "verdict": verdict, "x_ok": x_ok, "y_ok": y_ok}
    assert parse_preference(row, COMPARED, VERDICTS) == expected


def test_hh_transcript() -> None:
    text = "\n\nHuman: a\n\nsecond paragraph Human: still\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert parse_transcript(text) == [
        {"role": "user", "content": "a\n\nsecond paragraph Human: still"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": ""},
    ]


def test_prompts() -> None:
    assert parse_prompt({"messages": [USER], "safety": True}, OURS) == Prompt([USER], True)
    assert parse_prompt({"prompt": "q"}, OURS) == Prompt([USER], False)
    with pytest.raises(Malformed, match="'safety' is \"yes\", expected true or false"):
        parse_prompt({"prompt": "q", "safety": "yes"}, OURS)


HH = "\n\nHuman: {}\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "the user message is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "\n"}, "the assistant message is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": " a"}, "the two answers are the same"),
        ({"prompt": "[INST]", "chosen": "a", "rejected": "b"}, "contains the chat tag"),
        ({"prompt": "q", "chosen": "<<SYS>>", "rejected": "b"}, "contains the chat tag"),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, "not valid Unicode"),
        ({"messages": [USER, USER], "chosen": "a", "rejected": "b"}, "do not alternate$"),
        ({"messages": [USER, GOOD], "chosen": "a", "rejected": "b"}, "not end with a user"),
        ({"chosen": HH.format("q", "a"), "rejected": HH.format("p", "b")}, "differ before"),
        ({"chosen": HH.format("q", "a"), "rejected": "\n\nHuman: q"}, "not end with an assistant"),
        ({"chosen": [], "rejected": []}, "not end with an assistant"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "safety": "chosen_unsafe"},
            "chosen answer is unsafe and the rejected one safe",
        ),
    ],
)
def test_preferences_that_are_skipped(row: dict, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        parse_preference(row, OURS, {})


@pytest.mark.parametrize(
    ("verdict", "x_ok", "y_ok", "reason"),
    [("=", "yes", "yes", "tie"), ("x!", "no", "yes", "chosen answer is unsafe")],
)
def test_comparisons_that_are_skipped(verdict: str, x_ok: str, y_ok: str, reason: str) -> None:
    row = {"prompt": "q", "x": "ax", "y": "by", "verdict": verdict, "x_ok": x_ok, "y_ok": y_ok}
    with pytest.raises(Unusable, match=reason):
        parse_preference(row, COMPARED, VERDICTS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "columns none, expected 'chosen'"),
        ({"chosen": "a", "prompt": "q"}, r"'chosen', 'prompt', expected 'rejected'.*\[columns\]"),
        ({"chosen": "a", "rejected": "b"}, 'no transcript: it begins with "a"'),
        (
            {"prompt": "q", "chosen": 5, "rejected": "b"},
            "'chosen' is 5, expected a string or a list of m",
        ),
        ({"prompt": "q", "chosen": [GOOD, USER], "rejected": "b"}, "holds 2 messages after"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "'prompt' is 7, expected a string"),
        ({"messages": "q", "chosen": "a", "rejected": "b"}, "expected a list of messages"),
        ({"messages": ["q"], "chosen": "a", "rejected": "b"}, r"'messages\[0\]' is \"q\""),
        (
            {"messages": [{"role": "speaker", "content": "q"}], "chosen": "a", "rejected": "b"},
            'has role "speaker", expected system, user or assistant; a recipe.s .roles. maps',
        ),
        (
            {"messages": [{"role": "user", "content": 3}], "chosen": "a", "rejected": "b"},
            "has content 3, expected a string",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "batch": "3"}, "expected a whole number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "safety": "x"}, "expected chosen_safe"),
    ],
)
def test_preferences_that_cannot_be_read(row: dict, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        parse_preference(row, OURS, {})


def test_half_a_mapping_is_refused() -> None:
    with pytest.raises(Malformed, match="maps one of a, b and rating without the others"):
        parse_preference({"prompt": "q", "x": "1"}, Columns(a="x"), {})
