"""What may change on the way, changed: nothing is compared with what it is no measure of, and
nothing is said that is not so. Run: python -m pytest tests/test_amendments.py -q"""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.core.checkpoint.folder import load_model, save_model
from puna.core.text.tokenizer import train_tokenizer
from puna.trainers import ppo, reward, sft
from puna.trainers.train.config import parse

COMMON = {"device": "cpu", "lr": 1e-3, "batch": 4, "epochs": 1, "save_every": 2, "keep": 9}


def rows(out: Path) -> list[dict]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


def lengths(answers) -> list[float]:
    return [float(len(each.text)) for each in answers]


def low(answers) -> list[float]:
    return [-100.0 - len(each.text) for each in answers]


@pytest.fixture
def config(tiny, tmp_path):
    return ppo.PPOConfig(
        policy=tiny / "chat", prompts=[tiny / "prompts.jsonl"], out=tmp_path / "run", device="cpu",
        eval_prompts=[tiny / "prompts.jsonl"], eval_count=4, eval_every=2, patience=2,
        critic="policy", iterations=4, batch=4, minibatch=4, max_new_tokens=6, lr=1e-3,
        save_every=2, keep=9,
    )  # fmt: skip


def test_ppo_looks_for_the_best_anew_where_rewards_are_others(config, capsys):
    ppo.run(config, reward=lengths)
    before = rows(config.out)
    assert max(row.get("best_reward", 0.0) for row in before) > 0
    (config.out / "finished.json").unlink()
    asked = replace(config, iterations=8, amend=True)
    ppo.run(asked, reward=low)
    said = capsys.readouterr().out
    assert "rewards are others from here on; the best policy is looked for anew" in said
    found = rows(config.out)
    (place,) = [place for place, row in enumerate(found) if "anew" in row]
    assert found[place]["step"] == 2 and found[place]["eval_reward"] < -99
    kept = [row["best_reward"] for row in found[place + 1 :] if "best_reward" in row]
    assert (
        kept and max(kept) < -99 and found[place + 1]["best_reward"] == found[place]["eval_reward"]
    )
    # Patience counts from there on: two more looks at least.
    assert found[-1]["step"] >= 6


def test_and_it_does_so_after_a_kill(config, monkeypatch):
    ppo.run(config, reward=lengths)
    (config.out / "finished.json").unlink()
    asked = replace(config, iterations=8, amend=True)
    learn = ppo.learn
    monkeypatch.setattr(ppo, "learn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ppo.run(asked, reward=low)
    monkeypatch.setattr(ppo, "learn", learn)
    ppo.run(replace(asked, amend=False), reward=low)
    found = rows(config.out)
    assert [row["anew"] for row in found if "anew" in row] == [1]
    kept = [row["best_reward"] for row in found if "best_reward" in row]
    assert kept[-1] < -99


def test_a_model_of_another_tokenizer_is_refused(tiny, tmp_path):
    options = {**COMMON, "model": tiny / "chat", "data": [tiny / "dialogues.jsonl"]}
    config = sft.SFTConfig(out=tmp_path / "run", row_tokens=32, **options)
    sft.run(config)
    draw = random.Random(0)
    texts = ["".join(draw.choices("jkpqvxyz ", k=60)) for _ in range(300)]
    train_tokenizer(texts, tmp_path / "other.model", vocab_size=330)
    save_model(tmp_path / "other", load_model(tiny / "lm"), tmp_path / "other.model")
    shutil.copytree(tmp_path / "run", before := tmp_path / "before")
    amended = replace(config, model=tmp_path / "other", epochs=2, amend=True)
    with pytest.raises(ValueError, match="was trained with another tokenizer than .*other"):
        sft.run(amended)
    for file in before.rglob("*.json*"):
        assert (tmp_path / "run" / file.relative_to(before)).read_bytes() == file.read_bytes()
    sft.run(replace(amended, model=tiny / "lm"))


def test_another_start_changes_nothing_whatever_its_head(tiny, tmp_path, capsys):
    options = {**COMMON, "data": [tiny / "preferences.jsonl"], "eval_share": 0.2}
    config = reward.RewardConfig(out=tmp_path / "run", model=tiny / "chat", **options)
    reward.run(config)
    for model in ("lm", "safety"):
        config = replace(config, model=tiny / model, epochs=config.epochs + 1, amend=True)
        reward.run(config)
        assert "'model' changed nothing: the weights are those of step-" in capsys.readouterr().out


def test_a_copied_or_moved_runs_own_recipe_is_of_its_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        f"--model {tiny}/chat --data {tiny}/dialogues.jsonl --row-tokens 32 --epochs 1 --out run"
    )
    sft.run(parse(sft.SFTConfig, [*words.split(), "--device", "cpu"], "sft"))
    weights = {name: value.clone() for name, value in load_model("run/model").state_dict().items()}
    shutil.copytree("run", "copy")
    config = parse(sft.SFTConfig, ["copy/config.toml", "--epochs", "2", "--amend"], "sft")
    assert config.out == Path("copy")
    (tmp_path / "copy" / "finished.json").unlink()
    sft.run(config)
    for name, value in load_model("run/model").state_dict().items():
        assert torch.equal(value, weights[name])
    assert parse(sft.SFTConfig, ["copy/config.toml", "--out", "new"], "sft").out == Path("new")
    shutil.copy("run/config.toml", "mine.toml")  # a recipe of somebody's own
    assert parse(sft.SFTConfig, ["mine.toml"], "sft").out == Path("run")
