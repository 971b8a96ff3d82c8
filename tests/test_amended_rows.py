"""An amended run goes on behind the rows that it has seen, whatever it now takes them in.

Run: python -m pytest tests/test_amended_rows.py -q
"""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.trainers import ppo, pretrain, reward, sft
from puna.trainers.data import visits
from puna.trainers.data.visits import rows_at
from puna.trainers.train.plan import of_epochs, of_steps
from puna.trainers.train.state import Visited

COMMON = {"device": "cpu", "lr": 1e-3, "schedule": "constant", "save_every": 2, "keep": 9}


class Folder:
    """What a plan asks of a run."""

    path = "run"

    def __init__(self, step=0, visited=None):
        self.step, self.visited = step, visited


@given(st.integers(1, 40), st.integers(1, 3), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_every_row_is_seen_once_an_epoch_through_all_batches(rows, epochs, batches):
    seen, folder = Counter(), Folder()
    for place, batch in enumerate(batches):
        plan = of_epochs(rows, epochs, batch, folder)
        assert plan.steps >= folder.step
        until = plan.steps if place == len(batches) - 1 else (folder.step + plan.steps) // 2
        for step in range(folder.step, until):
            seen.update(int(row) for row in rows_at(rows, 3, plan.places(step)))
        folder = Folder(until, folder.visited_after(until))
    assert seen == dict.fromkeys(range(rows), epochs)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_steps_go_on_behind_each_other(rows, first, second, done):
    folder = Folder()
    before = of_steps(rows, 20, first, folder)
    places = [place for step in range(done) for place in before.places(step)]
    folder = Folder(done, folder.visited_after(done))
    after = of_steps(rows, 20, second, folder)
    places += [place for step in range(done, after.steps) for place in after.places(step)]
    assert places == list(range(done * first + (20 - done) * second))


def test_other_rows_are_gone_into_as_far(capsys):
    plan = of_epochs(30, 2, 5, Folder(4, Visited(10, 20)))  # half an epoch of 20 rows
    assert plan.places(4) == range(15, 20) and plan.steps == 4 + 9
    assert "30 rows where there were 20: it goes on 0.5 epochs into them" in capsys.readouterr().out
    assert of_epochs(30, 1, 5, Folder(4, None)).places(4) == range(20, 25)  # an older checkpoint


@pytest.fixture
def seen(monkeypatch):
    """(rows, places) of each batch that is asked for."""
    found = []

    def watched(rows, seed, places):
        found.append((rows, places))
        return rows_at(rows, seed, places)

    for module in (visits, reward, sft.next_token):
        monkeypatch.setattr(module, "rows_at", watched)
    return found


def stages(tiny):
    """One of each stage that takes its data in batches, and what an amendment changes."""
    chat = {"model": tiny / "chat", "epochs": 2}
    return {
        "sft": (sft, sft.SFTConfig, {**chat, "data": [tiny / "dialogues.jsonl"], "row_tokens": 32}),
        "reward": (reward, reward.RewardConfig, {**chat, "data": [tiny / "preferences.jsonl"]}),
        "pretrain": (
            pretrain,
            pretrain.PretrainConfig,
            {"tokenizer": tiny / "tokenizer.model", "data": [tiny / "text.jsonl"], "context": 32,
             "size": "mini"},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "reward", "pretrain"])
@pytest.mark.parametrize("batches", [(4, 8), (8, 2)])
def test_of_every_stage(tiny, tmp_path, seen, stage, batches):
    module, cls, options = stages(tiny)[stage]
    config = cls(out=tmp_path / "run", **COMMON, **options, batch=batches[0])
    module.run(config)
    done = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    (rows,) = {rows for rows, _ in seen}
    kept = [int(path.name[5:]) for path in (config.out / "checkpoints").iterdir()]
    for number in kept:
        if number > done // 2:
            shutil.rmtree(config.out / "checkpoints" / f"step-{number:06d}")
    last = max(number for number in kept if number <= done // 2)
    before = [place for _, places in seen[:last] for place in places]
    seen.clear()
    (config.out / "finished.json").unlink()
    module.run(replace(config, batch=batches[1], amend=True))
    assert len(seen[0][1]) == batches[1]
    after = [place for _, places in seen for place in places]
    epochs = 2 if stage != "pretrain" else 1
    assert before + after == list(range(rows * epochs))


def test_prompts_of_ppo(tiny, tmp_path, monkeypatch):
    asked = []

    def watched(place, count, seed):
        asked.append(place)
        return draw(place, count, seed)

    draw = ppo.draw
    monkeypatch.setattr(ppo, "draw", watched)
    config = ppo.PPOConfig(
        policy=tiny / "chat", prompts=[tiny / "prompts.jsonl"], out=tmp_path / "run", device="cpu",
        critic="policy", iterations=3, batch=4, minibatch=4, max_new_tokens=4, lr=1e-4,
        save_every=1, keep=9,
    )  # fmt: skip
    reward_of = lambda answers: [float(len(each.text)) for each in answers]  # noqa: E731
    ppo.run(config, reward=reward_of)
    assert asked == list(range(12))
    asked.clear()
    ppo.run(replace(config, iterations=5, batch=8, amend=True), reward=reward_of)
    assert asked == list(range(8, 8 + 3 * 8))  # the last checkpoint is that of iteration 2


def test_what_comes_in_order_stays(tiny, tmp_path):
    halves = (tiny / "dialogues.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, rows in zip(files, (halves[:24], halves[24:]), strict=True):
        file.write_text("".join(rows))
    config = sft.SFTConfig(
        model=tiny / "chat", data=files, out=tmp_path / "run", **COMMON, in_order=True, epochs=1,
        batch=2, row_tokens=32,
    )  # fmt: skip
    sft.run(config)
    for change in ({"epochs": 2}, {"in_order": False}, {"data": files[::-1]}):
        with pytest.raises(ValueError, match="cannot change on the way where rows come in order"):
            sft.run(replace(config, **change, amend=True))
    sft.run(config)  # the amendment is taken back
