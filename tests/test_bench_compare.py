"""What `puna bench compare` says of two runs.

Run: python -m pytest tests/test_bench_compare.py -q
"""

import copy
import importlib
import json
import typing

import pytest

from puna.benchmarks.compare import compare
from puna.cli.main import VERBS, main, with_names
from puna.core.errors import UserError
from puna.trainers.train.arguments import several_valued

CARD = {"processor": "some CPU", "threads": 2, "commit": "abc"}


def row(provider, value, spread=0.02, **keys):
    half = value * spread / 2
    named = {"bench": "train", "shape": "demo", "batch": 8, "dtype": "fp32"} | keys
    return named | {
        "provider": provider, "value": value, "p20": value - half, "p80": value + half,
        "unit": "tok/s",
    }  # fmt: skip


RUN = {
    "machine": CARD,
    "rows": [
        row("puna", 1000.0),
        row("transformers", 500.0),
        row("puna", 90.0, bench="decode"),
        row("llama.cpp", 100.0, bench="decode"),
        row("puna", 5.0, bench="kernel", operation="rope", direction="forward"),
    ],
}


@pytest.fixture
def files(tmp_path):
    """Writes a run, changed by a function of its rows, beside the first one."""
    before = tmp_path / "before.json"
    before.write_text(json.dumps(RUN))

    def after(change, name="after.json"):
        document = copy.deepcopy(RUN)
        change(document)
        (tmp_path / name).write_text(json.dumps(document))
        return before, tmp_path / name

    return after


def scaled(factor, *numbers):
    def change(document):
        for number in numbers or range(len(document["rows"])):
            for name in ("value", "p20", "p80"):
                document["rows"][number][name] *= factor

    return change


def verdicts(changes):
    return {(c.key[0], c.key[-1]): c.verdict for c in changes}


def test_the_same_run_is_as_before(files, capsys):
    assert set(verdicts(compare(*files(lambda _: None))).values()) == {"as before"}
    assert "none of Puna's became slower" in capsys.readouterr().out


def test_a_fifth_slower_is_found_and_named(files):
    with pytest.raises(UserError, match=r"train demo 8 fp32 \(puna\) is slower") as found:
        compare(*files(scaled(0.8, 0)))
    assert "decode" not in str(found.value)


def test_a_slow_day_falls_on_the_peers_too(files):
    def slow_day(document):
        scaled(0.7, 0, 1)(document)

    changes = compare(*files(slow_day))
    assert verdicts(changes)["train", "puna"] == "as before"
    assert verdicts(changes)["train", "transformers"] == "slower"


def test_what_only_the_peers_gained_is_a_loss(files):
    with pytest.raises(UserError, match="decode demo 8 fp32"):
        compare(*files(scaled(1.2, 3)))


def test_noise_is_what_both_runs_show(files):
    def noisy(document):
        scaled(0.8, 0)(document)
        document["rows"][0]["p20"] *= 0.7
        document["rows"][0]["p80"] *= 1.3

    assert verdicts(compare(*files(noisy)))["train", "puna"] == "as before"


def test_faster_is_no_error(files):
    assert verdicts(compare(*files(scaled(1.3, 0))))["train", "puna"] == "faster"


def test_a_row_that_became_wrong_or_went_is_an_error(files):
    def wrong(document):
        document["rows"][4] |= {"value": None, "p20": None, "p80": None, "failed": "1 off fp64"}

    with pytest.raises(UserError, match="rope forward demo 8 fp32 .puna. 1 off fp64"):
        compare(*files(wrong))
    with pytest.raises(UserError, match="decode demo 8 fp32 .puna. is not there"):
        compare(*files(lambda document: document["rows"].pop(2)))


def test_two_machines_are_not_compared(files):
    def other(document):
        document["machine"]["processor"] = "another"

    with pytest.raises(ValueError, match="two machines .processor: some CPU, another"):
        compare(*files(other))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"machine": {}, "rows": 3}', '{"machine": {}, "rows": [{}]}', "x"]
)
def test_what_is_no_result_is_one_sentence(files, tmp_path, text, capsys):
    before, _ = files(lambda _: None)
    (tmp_path / "no.json").write_text(text)
    assert main(["bench", "compare", str(before), str(tmp_path / "no.json")]) != 0
    said = capsys.readouterr().err.strip()
    assert "no.json" in said and "\n" not in said


def test_options_without_their_names():
    compared, converted = VERBS["bench compare"], VERBS["convert"]
    assert with_names(compared, ["a", "b"]) == ["--before", "a", "--after", "b"]
    assert with_names(compared, ["a", "--after", "b"]) == ["--before", "a", "--after", "b"]
    assert with_names(converted, ["--source", "a"]) == ["--source", "a"]
    assert with_names(converted, ["a", "b", "--dtype", "fp16"])[-2:] == ["--dtype", "fp16"]
    assert with_names(VERBS["sft"], ["recipe.toml"]) == ["recipe.toml"]
    assert with_names(compared, ["--after", "b", "a"]) == ["--after", "b", "--before", "a"]
    assert with_names(compared, ["--before=a", "b"]) == ["--before=a", "--after", "b"]
    between = ["--source", "a", "--dtype", "fp16", "--target", "b"]
    assert with_names(converted, ["a", "--dtype", "fp16", "b"]) == between
    first = ["--dtype", "fp16", "--source", "a", "--target", "b"]
    assert with_names(converted, ["--dtype", "fp16", "a", "b"]) == first


@pytest.mark.parametrize("verb", [verb for verb in VERBS.values() if verb.named], ids=str)
def test_what_has_options_without_names_has_no_flag_that_takes_none_or_swallows_them(verb):
    cls = getattr(importlib.import_module(verb.module), verb.config)
    hints = typing.get_type_hints(cls)
    assert set(verb.named) <= set(hints) and bool not in hints.values()
    for name in (many := several_valued(cls)):
        words = [f"--{name}", "a", "b", "c"]
        assert with_names(verb, words, many) == words
        assert with_names(verb, ["x", *words], many) == [f"--{verb.named[0]}", "x", *words]


@pytest.mark.parametrize(
    "rate", ["100", float("nan"), float("inf"), 10**400, True, 0, -3.0, 1e-320, [1], {"a": 1}]
)
def test_a_rate_that_is_none_is_one_sentence(files, rate, capsys):
    def odd(document):
        document["rows"][0] |= {"value": rate, "p20": rate, "p80": rate}

    before, after = files(odd)
    assert main(["bench", "compare", str(before), str(after)]) == 1
    said = capsys.readouterr().err.strip()
    assert "after.json: row 1: p20 is " in said and "\n" not in said


def test_rows_that_cannot_be_compared_are_one_sentence(files):
    with pytest.raises(ValueError, match="row 1: value 1000.0 is not between p20"):
        compare(*files(lambda document: document["rows"][0].update(p80=1.0)))
    with pytest.raises(ValueError, match="row 6 is of what an earlier row is"):
        compare(*files(lambda document: document["rows"].append(document["rows"][0])))


def test_nothing_in_common_is_not_good_news(tmp_path, files):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"machine": CARD, "rows": []}))
    before, _ = files(lambda _: None)
    for pair in ((empty, before), (empty, empty)):
        with pytest.raises(ValueError, match="timed nothing alike"):
            compare(*pair)


def test_text_of_a_file_is_shown_as_it_is(files, capsys):
    def odd(document):
        document["rows"][1] |= {"unit": "[/b]:smile:\x1b[31m"}

    compare(*files(odd))
    assert "[/b]:smile:\\x1b[31m" in capsys.readouterr().out
