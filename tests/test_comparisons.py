"""Run: python -m pytest tests/test_comparisons.py -q"""

import json
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from puna.core.tokenizer import Tokenizer
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
    assert sampled(tiny, tokenizer, prompts, tmp_path / "b.jsonl", batch_size=3) == rows
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
        return [tokenizer.encode(f"{model} {temperature}", eos=True) for _ in prompts]

    monkeypatch.setattr(comparisons, "open_model", lambda path: path.name)
    monkeypatch.setattr(comparisons.parallel, "load", lambda source, *_, **__: source)
    monkeypatch.setattr(comparisons.parallel, "gathered", nullcontext)
    monkeypatch.setattr(comparisons, "sample_everywhere", fake)
    rows = sampled(tiny, tokenizer, prompts, tmp_path / "pairs.jsonl")
    assert len(rows) == 24 and set(used) == {0.8, 1.2}
    first = [row["a"].split()[0] for row in rows]
    assert 5 < first.count("chat") < 19
    for row in rows:
        assert {row["a"].split()[0], row["b"].split()[0]} == {"chat", "lm"}
    temperatures = Counter(row[side].split()[1] for row in rows for side in "ab")
    assert min(temperatures.values()) > 12


def test_a_verdict_becomes_a_preference_row_that_the_reader_takes(tmp_path):
    messages = [{"role": "user", "content": "red"}]
    pairs = [{"messages": messages, "a": f"blue {i}", "b": f"cup {i}"} for i in range(4)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    verdicts = iter(
        [
            Verdict(0, "better", None),
            Verdict(1, "significantly_better", "chosen_safe"),
            Verdict(0, "negligibly_better", "both_safe"),
            Verdict(1, "slightly_better", "chosen_unsafe"),
        ]
    )
    annotate(tmp_path / "pairs.jsonl", tmp_path / "out.jsonl", lambda m, a, b: next(verdicts), 3)
    rows, skipped = read_preferences(tmp_path / "out.jsonl")
    assert [(r.chosen, r.rejected, r.rating, r.safety, r.batch) for r in rows] == [
        ("blue 0", "cup 0", "better", None, 3),
        ("cup 1", "blue 1", "significantly_better", "chosen_safe", 3),
        ("blue 2", "cup 2", "negligibly_better", "both_safe", 3),
    ]
    assert dict(skipped) == {"the chosen answer is unsafe and the rejected one safe": 1}
    assert rows[0].messages == messages
    annotate(tmp_path / "pairs.jsonl", tmp_path / "out.jsonl", None, 3)  # there already


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "rows.jsonl", broken())
    assert not (tmp_path / "rows.jsonl").exists()
