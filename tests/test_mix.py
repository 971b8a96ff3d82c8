"""Rows mixed in, files in order, rows held out of each batch.
Run: python -m pytest tests/test_mix.py -q"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.text.tokenizer import Tokenizer
from puna.trainers import reward, rlhf, sft
from puna.trainers.data.mix import draw_share, mixed
from puna.trainers.data.readers import Skipped
from puna.trainers.data.split import split_batches
from puna.trainers.data.visits import epoch_order, rows_in_order
from puna.trainers.reward import RewardConfig
from puna.trainers.sft import SFTConfig
from puna.trainers.train import next_token


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def comparison(prompt: str, **more) -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "chosen": "red cup", "rejected": "blue", **more}


def dialogue(prompt: str, answer: str) -> dict:
    return {"prompt": prompt, "response": answer}


@given(st.integers(1, 200), st.integers(0, 400), st.floats(0, 0.95), st.integers(0, 5))
def test_a_share_is_what_it_says_and_nothing_is_taken_twice(own, others, share, seed):
    taken = draw_share(range(others), own, share, seed)
    assert len(set(taken)) == len(taken) and taken == sorted(taken)
    if len(taken) < others:
        assert abs(len(taken) - share * (own + len(taken))) <= 1  # half a row, times 1 / (1 - s)
    assert taken == draw_share(range(others), own, share, seed)
    assert set(draw_share(range(others), own, share / 2, seed)) <= set(taken)


def test_a_draw_is_uniform_and_depends_on_the_seed():
    counts = Counter(i for seed in range(600) for i in draw_share(range(20), 10, 1 / 3, seed))
    assert sum(counts.values()) == 3000  # 5 of 20 each time: 150 of each, deviation 10.6
    assert min(counts.values()) > 100 and max(counts.values()) < 200
    assert draw_share(range(9), 3, None, 0) == list(range(9))
    assert draw_share(range(9), 3, 0.0, 0) == []


def test_what_the_mix_came_to_is_said():
    def said(own, others, held, share):
        skipped = Skipped()
        found = mixed(own, others, held, share, 0, lambda row: row, skipped)
        return found, skipped.notes[0]

    found, note = said(["a"] * 30, list("bcdefghijk"), [], 0.1)
    assert len(found) == 33 and found[:30] == ["a"] * 30
    assert note == "mix: 30 own rows and 3 of 10 others, 9.1%"
    found, note = said(["a"] * 30, list("bcde"), ["c"], 0.5)
    assert found[30:] == list("bde")  # c is held out
    assert note.startswith("mix: 30 own rows and 3 of 4 others, 9.1% of all where 50.0% is asked")
    assert note.endswith(
        "none counts twice; 1 other left out for beginning as one that is held out"
    )


def trained_pairs(monkeypatch, config: RewardConfig, out: Path) -> tuple[list, list]:
    """(pairs trained on, pairs held out) of a run that is not trained."""
    seen = {}

    def fit(title, folder, network, batch_at, steps, objective, config, *looks):
        seen["batches"] = [piece for step in range(steps) for piece in batch_at(step)]
        raise KeyboardInterrupt

    loaded = reward.load_pairs
    monkeypatch.setattr(reward.loop, "fit", fit)
    monkeypatch.setattr(
        reward, "load_pairs", lambda *a: seen.setdefault("pairs", loaded(*a)) and seen["pairs"]
    )
    with pytest.raises(KeyboardInterrupt):
        reward.run(config)
    pairs, held = seen["pairs"]
    assert sum(int(piece.weights.sum()) for piece in seen["batches"]) == len(pairs)
    return pairs, held


def test_a_reward_model_is_trained_on_the_share_asked_for(tiny, tmp_path, monkeypatch, capsys):
    own = write(tmp_path / "own.jsonl", [comparison(f"old {i}") for i in range(20)])
    rows = [comparison(f"new {i}") for i in range(40)] + [comparison(f"old {i}") for i in range(20)]
    public = write(tmp_path / "public.jsonl", rows)
    values = {"model": tiny / "chat", "data": [own], "mix": [public], "device": "cpu", "batch": 8}
    for share, expected in ((0.5, 16), (0.2, 4), (0.0, 0), (None, 56)):
        config = RewardConfig(
            out=tmp_path / f"run-{share}", mix_share=share, eval_share=0.2, **values
        )
        with monkeypatch.context() as patch:
            pairs, held = trained_pairs(patch, config, config.out)
        assert len(held) == 4 and len(pairs) == 16 + expected
        assert not {pair.prompt for pair in pairs} & {pair.prompt for pair in held}
        shown = capsys.readouterr().out
        assert f"mix: 16 own rows and {expected} of 60 others" in shown
        assert "4 others left out for beginning as one that is held out" in shown


def test_a_mixed_run_goes_on_as_if_it_had_not_stopped(tiny, tmp_path):
    own = tiny / "preferences.jsonl"
    other = write(tmp_path / "o.jsonl", [comparison(f"new {i}") for i in range(60)])
    options = {
        "model": tiny / "chat", "data": [own], "mix": [other], "mix_share": 0.25, "batch": 8,
        "device": "cpu", "save_every": 3, "lr": 1e-3,
    }  # fmt: skip
    reward.run(RewardConfig(out=tmp_path / "whole", **options))
    stopped = []

    def stop_after(run, step, networks, *, keep, save=reward.loop.Run.save):
        save(run, step, networks, keep=keep)
        stopped.append(step)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward.loop.Run, "save", stop_after)
        with pytest.raises(KeyboardInterrupt):
            reward.run(RewardConfig(out=tmp_path / "cut", **options))
    assert stopped == [3]
    with pytest.raises(ValueError, match="on other terms .mix_share"):
        reward.run(RewardConfig(out=tmp_path / "cut", **(options | {"mix_share": 0.5})))
    reward.run(RewardConfig(out=tmp_path / "cut", **options))
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    losses = [[json.loads(row)["loss"] for row in text.splitlines() if "loss" in row]
              for text in (whole, cut)]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_other_dialogues_are_mixed_in_by_share(tiny, tmp_path, monkeypatch, capsys):
    own = write(tmp_path / "own.jsonl", [dialogue(f"old {i}", "cup") for i in range(27)])
    other = write(tmp_path / "other.jsonl", [dialogue(f"new {i}", "moon") for i in range(50)])
    seen = []
    packed = sft.pack
    monkeypatch.setattr(
        sft, "pack", lambda tok, rows, *a, **k: seen.append(rows) or packed(tok, rows, *a, **k)
    )
    options = {"model": tiny / "lm", "data": [own], "mix": [other], "device": "cpu", "epochs": 1}
    sft.run(SFTConfig(out=tmp_path / "run", mix_share=0.1, eval_share=0.0, **options))
    asked = Counter(row.messages[0]["content"].split()[0] for row in seen[0])
    assert asked == {"old": 27, "new": 3}
    assert "mix: 27 own rows and 3 of 50 others, 10.0%" in capsys.readouterr().out


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 9),
)
def test_rows_in_order_finish_a_part_before_the_next(sizes, epochs, batch, seed):
    """Each part's visits are its epochs, shuffled each, and nothing comes before its turn."""
    total = sum(sizes) * epochs
    starts = range(0, total, batch)
    batches = [range(start, min(start + batch, total)) for start in starts]
    found = [int(row) for places in batches for row in rows_in_order(sizes, epochs, seed, places)]
    expected, first = [], 0
    for size in sizes:
        for epoch in range(epochs):
            expected += [first + int(row) for row in epoch_order(size, seed, epoch)]
        first += size
    assert found == expected


def test_files_are_learned_in_order(tiny, tmp_path, monkeypatch, capsys):
    public = write(tmp_path / "public.jsonl", [dialogue(f"old {i}", "cup") for i in range(30)])
    own = write(tmp_path / "own.jsonl", [dialogue(f"new {i}", "moon") for i in range(11)])
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    steps = []
    real = next_token.row_batches

    def watched(*args, **kwargs):
        batch_at = real(*args, **kwargs)
        return lambda step: steps.append(batch_at(step)) or steps[-1]

    monkeypatch.setattr(next_token, "row_batches", watched)
    config = SFTConfig(
        out=tmp_path / "run", model=tiny / "lm", data=[public, own], in_order=True, epochs=2,
        batch=2, micro_batch=1, row_tokens=40, eval_share=0.1, device="cpu",
    )  # fmt: skip
    sft.run(config)
    answers = [
        text.split()
        for step in steps
        for piece in step
        for row in range(len(piece.tokens))
        if piece.weights[row].any()
        for text in [tokenizer.decode(piece.tokens[row].tolist())]
    ]
    kinds = ["cup" if "cup" in row else "moon" for row in answers]
    assert not any("cup" in row and "moon" in row for row in answers)
    assert kinds == sorted(kinds) and set(kinds) == {"cup", "moon"}
    prompts = Counter(
        f"{word} {row[i + 1]}" for row in answers for i, word in enumerate(row[:-1])
        if word in ("old", "new")
    )  # fmt: skip
    assert set(prompts.values()) == {2} and len(prompts) == 41 - 4
    assert "sft: rows in order: " in capsys.readouterr().out


def test_in_order_needs_files_and_no_mix(tiny, tmp_path):
    values = {"out": tmp_path, "model": tiny / "lm", "in_order": True}
    rows = [tiny / "dialogues.jsonl"]
    for options in ({"data": rows}, {"data": rows * 2, "mix": rows}, {}):
        with pytest.raises(ValueError, match="in_order takes the files of data one after the"):
            SFTConfig(**values, **options)


def test_each_batch_gives_up_to_so_many_rows_and_never_more_than_half():
    draw = random.Random(0)
    rows = [(draw.randrange(60), week) for week, size in ((1, 100), (2, 30), (3, 8), (None, 40))
            for _ in range(size)]  # fmt: skip
    kept, held = split_batches(rows, 10, 0, lambda row: row[0], lambda row: row[1])
    assert Counter(kept) + Counter(held) == Counter(rows)
    assert not {prompt for prompt, _ in kept} & {prompt for prompt, _ in held}
    counts = Counter(week for _, week in held)
    assert 8 <= counts[1] <= 10 and counts[2] <= 10 and counts[3] <= 4
    again = split_batches(rows, 10, 0, lambda row: row[0], lambda row: row[1])
    assert again == (kept, held)
    alone = [(i, week) for i, (_, week) in enumerate(rows)]
    _, held = split_batches(alone, 10, 1, lambda row: row[0], lambda row: row[1])
    assert Counter(week for _, week in held) == {1: 10, 2: 10, 3: 4}


def test_what_was_held_out_stays_so_when_batches_follow():
    """Each week a run goes on from the last one's model with all batches so far."""
    draw = random.Random(1)
    rows = [(draw.randrange(5000), week) for week in range(1, 7) for _ in range(200)]
    before: set = set()
    for week in range(1, 7):
        known = [row for row in rows if row[1] <= week]
        kept, held = split_batches(known, 20, 3, lambda row: row[0], lambda row: row[1])
        assert {row[1] for row in held} == set(range(1, week + 1))
        assert {row for row in held if row[1] < week} == before
        before = set(held)


def test_accuracy_is_told_by_batch(tiny, tmp_path, capsys):
    rows = [comparison(f"red {i}", batch=1 + i % 2) for i in range(40)]
    data = write(tmp_path / "weeks.jsonl", rows)
    options = {
        "model": tiny / "chat", "data": [data], "eval_per_batch": 6, "batch": 8, "device": "cpu"
    }  # fmt: skip
    reward.run(RewardConfig(out=tmp_path / "run", **options))
    shown = capsys.readouterr().out
    assert "28 pairs; 4 steps" in shown
    for line in ("held-out accuracy", "  batch 1 ", "  batch 2 "):
        assert any(each.startswith(line) for each in shown.splitlines()), line
    with pytest.raises(ValueError, match="no row has a batch to hold some of it out; name its"):
        reward.run(
            RewardConfig(out=tmp_path / "o", **(options | {"data": [tiny / "preferences.jsonl"]}))
        )
    with pytest.raises(ValueError, match="eval_data is held out already"):
        RewardConfig(out=tmp_path / "p", **options, eval_data=[data])


def test_the_loop_reads_the_files_of_a_mix_before_it_begins(tiny, tmp_path):
    """Not when the annotators are done, days later."""
    prompts = [tiny / "prompts.jsonl"]
    config = rlhf.RLHFConfig(
        out=tmp_path / "o", model=tiny / "chat", prompts=prompts, helpfulness_prompts=prompts,
        safety_prompts=prompts, ppo_versions=0, device="cpu", max_new_tokens=8,
        helpfulness={"mix": [str(tmp_path / "none.jsonl")], "mix_share": 0.5},
    )  # fmt: skip
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        rlhf.run(config)
    assert not (tmp_path / "o").exists()
