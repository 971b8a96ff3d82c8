"""A model whose scores or logits are NaN stops a stage before it trains, and is named.

Run: python -m pytest tests/test_models_at_fault.py -q
"""

import math
import shutil

import pytest
import torch

from puna.core.checkpoint.folder import load_model, save_model
from puna.trainers import evaluate, gatt, ppo, rejection, rlhf
from puna.trainers.evaluate import EvaluateConfig
from puna.trainers.rl.config import PPOConfig, RLHFConfig
from puna.trainers.rl.rollout import Rollout, answer_values

SAMPLED = {"max_new_tokens": 6, "batch": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """The models of `tiny`, and of each a ruined one: all weights of its head are NaN."""
    root = tmp_path_factory.mktemp("ruined")
    for name in ("chat", "helpfulness", "safety"):
        shutil.copytree(tiny / name, root / name)
        model = load_model(root / name, device="cpu")
        with torch.no_grad():
            model.head_weight[:] = math.nan
        save_model(root / f"ruined-{name}", model, tiny / "tokenizer.model")
    for name in ("prompts.jsonl", "preferences.jsonl"):
        shutil.copy(tiny / name, root / name)
    return root


def models(world, ruined):
    """Options that name the three models, one of them ruined."""
    roles = {"policy": "chat", "helpfulness": "helpfulness", "safety": "safety"}
    return {
        role: world / (f"ruined-{name}" if role == ruined else name)
        for role, name in roles.items()
    } | {"prompts": [world / "prompts.jsonl"]}  # fmt: skip


AT_FAULT = {
    "policy": "the policy cannot be sampled from: its logits hold NaN",
    "helpfulness": "the helpfulness reward model gave no finite score for",
    "safety": "the safety reward model gave no finite score for",
}


@pytest.mark.parametrize("ruined", AT_FAULT)
def test_rejection_stops_before_it_trains(world, tmp_path, ruined):
    config = rejection.RejectionConfig(
        **models(world, ruined), **SAMPLED, samples=2, out=tmp_path / "out"
    )
    with pytest.raises((ValueError, RuntimeError), match=AT_FAULT[ruined]):
        rejection.run(config)
    assert not (config.out / "selected.jsonl").exists() and not (config.out / "model").exists()
    samples = config.out / "samples.jsonl"
    assert not samples.exists() or "NaN" not in samples.read_text()


def test_so_does_a_pool_that_is_scored_again(world, tmp_path, monkeypatch):
    good = rejection.RejectionConfig(
        **models(world, None), **SAMPLED, samples=2, epochs=1, out=tmp_path / "first"
    )
    rejection.run(good)
    pool = good.out / "selected.jsonl"
    config = rejection.RejectionConfig(
        **models(world, "safety"), **SAMPLED, samples=2, pools=[pool], out=tmp_path / "second"
    )
    monkeypatch.setattr(rejection, "sample_all", lambda *_: None)  # the pool alone is scored
    with pytest.raises(RuntimeError, match=AT_FAULT["safety"]):
        rejection.run(config)


@pytest.mark.parametrize("ruined", AT_FAULT)
def test_ppo_names_the_model_and_not_the_learning_rate(world, tmp_path, ruined):
    config = PPOConfig(
        **models(world, ruined), **SAMPLED, minibatch=4, iterations=2, critic="policy",
        out=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=AT_FAULT[ruined]) as raised:
        ppo.run(config)
    assert "learning rate" not in str(raised.value)
    assert not (config.out / "model").exists()


def test_ghost_attention_names_the_folder(world, tmp_path):
    (tmp_path / "ghosts.jsonl").write_text('{"turns": ["hello"], "instruction": "be kind"}\n')
    config = gatt.GAttConfig(
        model=world / "ruined-chat", dialogues=[tmp_path / "ghosts.jsonl"], max_new_tokens=4,
        device="cpu", out=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match="ruined-chat cannot be sampled from"):
        gatt.run(config)


def test_a_critic_without_values_is_named(world):
    critic = load_model(world / "ruined-helpfulness", device="cpu")
    ids, one = [1, 5], torch.ones(1)
    rollout = Rollout([ids], [ids], torch.tensor([2]), torch.zeros(1, 2), one.bool())
    with pytest.raises(RuntimeError, match="the critic gave no finite score for 1 of 1 answer;"):
        answer_values(critic, rollout, max_tokens=99)


def test_evaluate_names_the_folder(world, tmp_path):
    out = tmp_path / "figures.json"
    config = EvaluateConfig(
        model=world / "ruined-safety", data=[world / "preferences.jsonl"], out=out, device="cpu"
    )
    with pytest.raises(RuntimeError, match="ruined-safety gave no finite score for 48 of 48 pairs"):
        evaluate.run(config)
    assert not out.exists()


def test_rlhf_measures_no_accuracy_of_such_a_model(world, tmp_path):
    shutil.copy(world / "preferences.jsonl", tmp_path / "helpfulness.jsonl")
    judges = {"helpfulness": world / "ruined-helpfulness"}
    version = rlhf.Version(
        1, world / "chat", judges, tmp_path / "selected.jsonl", (), world / "chat"
    )
    prompts = {
        f"{name}prompts": [world / "prompts.jsonl"] for name in ("", "helpfulness_", "safety_")
    }
    config = RLHFConfig(model=world / "chat", out=tmp_path, device="cpu", **prompts)
    with pytest.raises(RuntimeError, match="ruined-helpfulness gave no finite score for"):
        rlhf.accuracy_of(config, version, tmp_path)
