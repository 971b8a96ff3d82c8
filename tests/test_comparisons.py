"""Run: python -m pytest tests/test_comparisons.py -q"""

import itertools
import json
import math
import signal
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from puna.core.generation.generate import Completion
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.prompts import load_prompts
from puna.trainers.data.readers import read_preferences
from puna.trainers.rl import comparisons
from puna.trainers.rl.comparisons import Variant, Verdict, annotate, sample_pairs, write_rows


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer(tiny / "tokenizer.model")


@pytest.fixture(scope="module")
def prompts(tiny, tokenizer):
    return load_prompts([tiny / "prompts.jsonl"], tokenizer, 100)[0]


def sampled(tiny, tokenizer, prompts, path, **options):
    values = {"max_new_tokens": 8, "seed": 0, "round_index": 1, "device": torch.device("cpu")}
    variants = options.pop("variants", None) or (
        Variant(tiny / "chat", (0.8, 1.2)),
        Variant(tiny / "lm", (0.8, 1.2)),
    )
    count = sample_pairs(path, variants, tokenizer, prompts, 24, **(values | options))
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert count == len(rows)
    return rows


def test_pairs_are_two_different_answers_to_every_prompt_in_turn(
    tiny, tokenizer, prompts, tmp_path
):
    rows = sampled(tiny, tokenizer, prompts, tmp_path / "pairs.jsonl")
    assert 15 < len(rows) <= 24
    assert all(row["a"] and row["b"] and row["a"] != row["b"] for row in rows)
    asked = Counter(json.dumps(row["messages"]) for row in rows)
    known = {json.dumps(p.messages) for p in prompts}
    assert set(asked) <= known and max(asked.values()) <= 2 and len(asked) > 10


def test_the_draws_depend_on_seed_and_round_and_not_on_the_batch(
    tiny, tokenizer, prompts, tmp_path
):
    rows = sampled(tiny, tokenizer, prompts, tmp_path / "a.jsonl")
    assert sampled(tiny, tokenizer, prompts, tmp_path / "b.jsonl", limits={"batch_size": 3}) == rows
    assert sampled(tiny, tokenizer, prompts, tmp_path / "c.jsonl", round_index=2) != rows
    assert sampled(tiny, tokenizer, prompts, tmp_path / "d.jsonl", seed=1) != rows
    (tmp_path / "a.jsonl").write_text("")
    assert sampled(tiny, tokenizer, prompts, tmp_path / "a.jsonl") == []  # there already


def test_which_variant_is_a_is_drawn_and_both_temperatures_are_used(
    tiny, tokenizer, prompts, tmp_path, monkeypatch
):
    """A fake model says its own name and temperature."""
    used = []

    def fake(model, prompts, *, temperature, sample_ids, **_):
        used.append(temperature)
        ids = tokenizer.encode(f"{model} {temperature}", eos=True)
        return [Completion(ids, [], True) for _ in prompts]

    monkeypatch.setattr(comparisons, "open_model", lambda path: path.name)
    monkeypatch.setattr(comparisons.parallel, "load", lambda source, *_, **__: source)
    monkeypatch.setattr(comparisons.parallel, "gathered", nullcontext)
    monkeypatch.setattr(comparisons, "draw_answers", fake)
    rows = sampled(tiny, tokenizer, prompts, tmp_path / "pairs.jsonl")
    assert len(rows) == 24 and set(used) == {0.8, 1.2}
    first = [row["a"].split()[0] for row in rows]
    assert 5 < first.count("chat") < 19
    for row in rows:
        assert {row["a"].split()[0], row["b"].split()[0]} == {"chat", "lm"}
    temperatures = Counter(row[side].split()[1] for row in rows for side in "ab")
    assert min(temperatures.values()) > 12
    for row in rows:  # what gave an answer stands beside it
        for side in "ab":
            model, temperature = row[side].split()
            assert row[f"{side}_model"] == str(tiny / model)
            assert row[f"{side}_temperature"] == float(temperature)
    same = (Variant(tiny / "chat", (0.8, 1.0, 1.2)),) * 2  # V1 has but one model
    rows = sampled(tiny, tokenizer, prompts, tmp_path / "same.jsonl", variants=same)
    met = Counter(tuple(sorted((row["a_temperature"], row["b_temperature"]))) for row in rows)
    assert set(met) == {(0.8, 1.0), (0.8, 1.2), (1.0, 1.2)}
    alone = (Variant(tiny / "chat", (1.0,)),) * 2
    assert sampled(tiny, tokenizer, prompts, tmp_path / "one.jsonl", variants=alone) == []


@pytest.mark.parametrize("answered", [0, 7, 18, 24, 31, 47, 48])
def test_what_an_interrupted_call_has_drawn_is_not_drawn_again(
    answered, tiny, tokenizer, prompts, tmp_path, monkeypatch
):
    """Both models answer 24 prompts, 5 at a time, into a folder that is not there yet; the draw
    fails, as a kill ends it, when so many are answered. The same call then draws the rest."""
    whole = sampled(tiny, tokenizer, prompts, tmp_path / "whole.jsonl", chunk=24)
    real, drawn = comparisons.draw_answers, []
    limit = [answered]

    def counting(model, prompts, **options):
        if len(drawn) + len(prompts) > limit[0]:
            raise KeyboardInterrupt
        rows = zip(options["sample_ids"], options["prompt_ids"], strict=True)
        found = real(model, prompts, **options)
        drawn.extend(rows)
        return found

    monkeypatch.setattr(comparisons, "draw_answers", counting)
    path = tmp_path / "new" / "folder" / "pairs.jsonl"
    if answered < 48:
        with pytest.raises(KeyboardInterrupt):
            sampled(tiny, tokenizer, prompts, path, chunk=5)
        assert not path.exists()
        kept = sum(
            len(file.read_text().splitlines()) for file in path.parent.glob("pairs-drawn-*.jsonl")
        )
        assert answered - 5 < kept <= answered
        limit[0] = 48 + len(drawn) - kept  # each of the others once
    assert sampled(tiny, tokenizer, prompts, path, chunk=5) == whole
    assert set(drawn) == {(side, row) for side in (0, 1) for row in range(24)}
    assert [each.name for each in path.parent.iterdir()] == ["pairs.jsonl"]


def test_a_call_that_is_asked_to_stop_ends_after_its_chunk(
    tiny, tokenizer, prompts, tmp_path, monkeypatch
):
    """Ctrl-C in the first chunk, in the last one of the first model, in the very last one."""
    whole = sampled(tiny, tokenizer, prompts, tmp_path / "whole.jsonl", chunk=12)
    path, real = tmp_path / "pairs.jsonl", comparisons.draw_answers

    def interrupted(model, prompts, **options):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(comparisons, "draw_answers", real)
        return real(model, prompts, **options)

    for stopped in (12, 24, 12, 24):
        monkeypatch.setattr(comparisons, "draw_answers", interrupted)
        with pytest.raises(SystemExit, match=f"stopped after {stopped} prompts; the same command"):
            sampled(tiny, tokenizer, prompts, path, chunk=12)
    monkeypatch.setattr(comparisons, "draw_answers", None)
    assert sampled(tiny, tokenizer, prompts, path, chunk=12) == whole


def test_answers_that_were_edited_meanwhile_are_named(
    tiny, tokenizer, prompts, tmp_path, monkeypatch
):
    path, real = tmp_path / "pairs.jsonl", comparisons.draw_answers

    def once(model, prompts, **options):
        if (tmp_path / "pairs-drawn-1.jsonl").exists():
            raise KeyboardInterrupt
        return real(model, prompts, **options)

    monkeypatch.setattr(comparisons, "draw_answers", once)
    with pytest.raises(KeyboardInterrupt):
        sampled(tiny, tokenizer, prompts, path, chunk=5)
    drawn = tmp_path / "pairs-drawn-1.jsonl"
    drawn.write_text(drawn.read_text().replace('"answer": "', '"answer": "no', 1))
    with pytest.raises(ValueError, match="pairs-drawn-1.jsonl is not what the run wrote"):
        sampled(tiny, tokenizer, prompts, path, chunk=5)


def test_a_verdict_becomes_a_preference_row_that_the_reader_takes(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "red"}]
    drawn = {
        side: [tokenizer.encode(f"{word} {i}", eos=True) for i in range(4)]
        for side, word in (("a", "blue"), ("b", "cup"))
    }
    pairs = [
        {
            "messages": messages, "is_safety": i == 2, "a": f"blue {i}", "b": f"cup {i}",
            "a_ids": drawn["a"][i], "b_ids": drawn["b"][i],
            "a_model": "new", "b_model": "old", "a_temperature": 0.8, "b_temperature": 1,
        }
        for i in range(4)
    ]  # fmt: skip
    write_rows(tmp_path / "pairs.jsonl", pairs)
    verdicts = [
        Verdict(0, "better", None),
        Verdict(1, "significantly_better", "chosen_safe"),
        Verdict(0, "negligibly_better", "both_safe"),
        Verdict(1, "slightly_better", "chosen_unsafe"),
    ]
    files = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"

    def annotator(a, b):
        assert [x.text for x in a] == [f"blue {i}" for i in range(4)]
        assert [x.ids for x in b] == drawn["b"] and [x.is_safety for x in a] == [0, 0, 1, 0]
        assert all(x.prompt_ids[0] == tokenizer.bos_id and x.finished for x in a)
        return verdicts

    with pytest.raises(ValueError, match="3 verdicts for 4 pairs; it must return one"):
        annotate(*files, lambda a, b: verdicts[:3], tokenizer, 3)
    for wrong, said in (
        (Verdict("a", "better", None), "verdict 1 has chosen 'a'; expected one of 0, 1"),
        (Verdict(7, "better", None), "has chosen 7"),
        (Verdict(0, "great", None), "has rating 'great'; expected one of significantly_better"),
        (Verdict(0, "better", "safe"), "has safety 'safe'"),
    ):
        with pytest.raises(ValueError, match=said):
            annotate(*files, lambda a, b, wrong=wrong: [wrong] * 4, tokenizer, 3)
    for given, message in [
        (None, "the annotator gave 'None'; it must return one verdict for each pair"),
        ("abcd", "the annotator gave 'abcd'; it must return one verdict for each pair"),
        (itertools.count(), "gave more than 4 verdicts for 4 pairs"),
        ([None] * 4, "verdict 1 is 'None'; it must be a Verdict of chosen, rating, safety"),
        ([*verdicts[:3], 0], "verdict 4 is '0'; it must be a Verdict"),
        ([("better",)] * 4, "verdict 1 is .*; it must be a Verdict"),
        ([Verdict([0], "better", None)] * 4, r"verdict 1 has chosen \[0\]; expected one of 0, 1"),
        ([Verdict(math.nan, "better", None)] * 4, "verdict 1 has chosen nan; expected one of 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            annotate(*files, lambda a, b, given=given: given, tokenizer, 3)
    assert not files[1].exists()  # so that a right annotator is asked again
    annotate(*files, annotator, tokenizer, 3)
    rows, skipped = read_preferences(tmp_path / "out.jsonl")
    assert [(r.chosen, r.rejected, r.rating, r.safety, r.batch) for r in rows] == [
        ("blue 0", "cup 0", "better", None, 3),
        ("cup 1", "blue 1", "significantly_better", "chosen_safe", 3),
        ("blue 2", "cup 2", "negligibly_better", "both_safe", 3),
    ]
    assert dict(skipped) == {"the chosen answer is unsafe and the rejected one safe": 1}
    assert rows[0].messages == messages
    assert rows[0][-5:-1] == ("new", "old", 0.8, 1.0) and rows[1][-5:-1] == ("old", "new", 1.0, 0.8)
    annotate(*files, None, tokenizer, 3)  # there already


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "rows.jsonl", broken())
    assert not (tmp_path / "rows.jsonl").exists()
