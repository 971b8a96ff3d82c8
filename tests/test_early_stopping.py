"""When PPO ends, and which policy it gives.

Run: python -m pytest tests/test_early_stopping.py -q
"""

# ruff: noqa: F811 (a fixture that is imported is an argument of each test)
import shutil
from dataclasses import replace

import pytest
import torch
from test_ppo import configured, metrics, whole, world  # noqa: F401

from puna.core.checkpoint.folder import load_model
from puna.trainers import ppo
from puna.trainers.rl import early_stopping
from puna.trainers.rl.early_stopping import best, collapse, exceeds, is_best, out_of_patience
from puna.trainers.train.kinds import Kind, kinds_of


def test_early_stopping_takes_the_best_model(world, tmp_path, monkeypatch):
    rewards = iter([0.0, 2.0, 1.0, 1.5, 1.5])
    monkeypatch.setattr(ppo, "evaluate", lambda stage: {"eval_reward": next(rewards)})
    saved = []
    save_best = early_stopping.save_best

    def watched(folder, policy):
        saved.append({k: v.clone() for k, v in policy.state_dict().items()})
        save_best(folder, policy)

    monkeypatch.setattr(early_stopping, "save_best", watched)
    held = [world / "held_out.jsonl"]
    config = configured(
        world, tmp_path / "run", eval_prompts=held, patience=2, eval_every=1, iterations=9
    )
    final = load_model(ppo.run(config)).state_dict()
    rows = metrics(config.out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("best_reward") for row in rows] == [None, 0.0, 2.0, None]
    assert len(saved) == 2  # the first model, and the one after the first iteration
    assert all(torch.equal(final[name], saved[1][name]) for name in final)


def test_where_nothing_is_better_the_first_model_stays(world, tmp_path, monkeypatch):
    rewards = iter([3.0, 2.0, 1.0, 1.5])
    monkeypatch.setattr(ppo, "evaluate", lambda stage: {"eval_reward": next(rewards)})
    held = [world / "held_out.jsonl"]
    config = configured(world, tmp_path / "run", eval_prompts=held, patience=3, eval_every=1)
    final, first = (load_model(p).state_dict() for p in (ppo.run(config), world / "policy"))
    assert all(torch.equal(final[name], first[name]) for name in first)


def test_patience():
    rows = [{"eval_reward": r, "kl": 0.1} for r in (1.0, 3.0, 2.0)]
    assert out_of_patience(rows, 0) is None
    assert out_of_patience(rows, 2) is None
    assert "no better held-out reward in 1" in out_of_patience(rows, 1)


def test_the_best_policy_is_judged_by_what_is_held_out_and_within_the_limit():
    start = {"reward": 1.0, "kl": 1e-6}
    assert is_best([], start, 1e-9)  # what PPO begins with
    rows = [{"step": 0, "eval_reward": 1.0}, {**start, "best_reward": 1.0, "eval_reward": 3.0}]
    assert best(rows) is rows[1]
    assert is_best(rows, {"reward": 0.0, "kl": 0.2}, 0.5)  # 3.0 held out
    assert not is_best(rows, {"reward": 0.0, "kl": 0.6}, 0.5)
    assert "KL of 0.6 nats an answer exceeds max_kl 0.5" in exceeds(rows, {"kl": 0.6}, 0.5)
    assert exceeds(rows, {"kl": 0.6}, None) is None and exceeds([], {"kl": 0.6}, 0.5) is None
    rows[1].pop("eval_reward")
    assert not is_best(rows, {"reward": 9.0, "kl": 0.2}, None)  # not measured after this iteration
    sampled = [{**start, "best_reward": 1.0}]  # nothing is held out
    assert is_best(sampled, {"reward": 1.1, "kl": 0.2}, None)
    assert not is_best(sampled, {"reward": 1.0, "kl": 0.2}, None)


def test_a_high_kl_ends_the_run_before_its_step_and_what_is_kept_is_within_the_limit(
    world, tmp_path, capsys
):
    """It once ended after the step that followed, with that model."""
    limit = 0.02
    config = configured(
        world, tmp_path / "run", max_kl=limit, lr=1e-2, iterations=20, eval_every=1, critic_warmup=0
    )
    model = load_model(ppo.run(config))
    rows = metrics(config.out)
    assert 2 <= len(rows) < 20 and rows[-1]["kl"] > limit and "policy_loss" not in rows[-1]
    within = [row for row in rows if row["kl"] <= limit or row["step"] == 1]
    kept = max((row for row in within), key=lambda row: row["reward"])
    assert best(rows) == kept
    said = capsys.readouterr().out
    assert f"stopped before iteration {len(rows)}: the KL of" in said
    assert f"took the policy after iteration {kept['step'] - 1}, with reward" in said
    again = replace(config, out=tmp_path / "again")  # what it samples has the KL of its row
    with ppo.open_run(again, tokenizer=world / "t.model") as folder:
        stage = ppo.open_stage(again, folder, ppo.Tokenizer(world / "t.model"), None)
        stage.policy.model.load_state_dict(model.state_dict())
        assert ppo.look(stage, kept["step"] - 1).row["kl"] == pytest.approx(kept["kl"], rel=1e-5)


def test_a_run_to_its_end_gives_the_last_policy_only_where_it_is_within_the_limit(world, tmp_path):
    free = configured(world, tmp_path / "free", lr=1e-2, iterations=1, critic_warmup=0)
    limited = configured(
        world, tmp_path / "limited", lr=1e-2, iterations=1, critic_warmup=0, max_kl=1e-5
    )
    moved, kept, start = (
        load_model(path).state_dict()
        for path in (ppo.run(free), ppo.run(limited), world / "policy")
    )
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    assert all(torch.equal(kept[name], start[name]) for name in start)


def test_a_collapse_is_said_and_the_best_policy_kept(world, tmp_path, monkeypatch, capsys):
    row = {"answer_tokens": 20.0, "unfinished": 0.1, "entropy": 1.0}
    assert collapse([row] * 9) is None
    for name, value, said in (
        ("answer_tokens", 3.0, "answers are 3.0 tokens long where they were 20.0"),
        ("unfinished", 0.7, "70% of the answers do not end where 10% did not"),
        ("entropy", 1e-4, "the entropy is 1.0e-04 nats a token"),
    ):
        bad = {**row, name: value}
        assert collapse([row, row, bad, bad]) is None  # one batch may be odd
        assert said in collapse([row, row, bad, bad, bad])
    rollout_metrics, lengths = ppo.rollout_metrics, iter([6.0, *[0.1] * 3, 6.0, *[0.1] * 5])
    monkeypatch.setattr(
        ppo, "rollout_metrics", lambda *a: rollout_metrics(*a) | {"answer_tokens": next(lengths)}
    )
    config = configured(world, tmp_path / "run", iterations=20)
    ppo.run(config)
    assert len(metrics(config.out)) == 4
    assert "stopped after iteration 4: answers are 0.1 tokens long" in capsys.readouterr().out
    going_on = configured(world, tmp_path / "on", iterations=6, stop_on_collapse=False)
    ppo.run(going_on)
    assert len(metrics(going_on.out)) == 6


def test_a_run_whose_best_policy_is_gone_says_so(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "copy" / "best")
    with pytest.raises(ValueError, match="best is missing; give another --out"):
        ppo.run(configured(world, tmp_path / "copy", eval_prompts=[world / "held_out.jsonl"]))


def test_the_rhythm_that_decides_which_policy_is_kept_takes_an_amendment(world):
    assert kinds_of(ppo.PPOConfig)["eval_every"] is Kind.AMENDED
    assert kinds_of(ppo.PPOConfig)["save_every"] is Kind.FREE
    with pytest.raises(ValueError, match="eval_every"):
        ppo.run(configured(world, world / "x", eval_every=0))
