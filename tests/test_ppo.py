"""Run: python -m pytest tests/test_ppo.py -q"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puna.core.checkpoint.folder import load_model, save_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.tokenizer import train_tokenizer
from puna.trainers import ppo
from puna.trainers.data.prompts import draw
from puna.trainers.ppo import PPOConfig
from puna.trainers.train.config import to_toml
from puna.trainers.train.plan import of_steps

WORDS = ["red", "blue", "cup", "tree", "sing", "give", "lamp", "nine", "moon", "fish"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, two reward models and prompts on disk, all tiny and random."""
    root = tmp_path_factory.mktemp("world")
    texts = [f"{a} {b} {c}." for a in WORDS for b in WORDS for c in WORDS]
    tokenizer = train_tokenizer(texts + ["[INST] [/INST]"] * 9, root / "t.model", vocab_size=320)
    shape = ModelConfig(16, 2, 2, 1, 24, vocab_size=tokenizer.vocab_size, context=64)
    for seed, (name, head) in enumerate(
        [("policy", "lm"), ("helpfulness", "score"), ("safety", "score")]
    ):
        model = Transformer(shape, head)
        model.init_weights(seed)
        save_model(root / name, model, root / "t.model")
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {b}"}], "safety": a == "red"}
        for a in WORDS
        for b in WORDS
    ]
    text = [json.dumps(row) + "\n" for row in rows]
    (root / "prompts.jsonl").write_text("".join(text[:80]))
    (root / "held_out.jsonl").write_text("".join(text[80:]))
    return root


def configured(world: Path, out: Path, **options) -> PPOConfig:
    values = {
        "policy": world / "policy",
        "helpfulness": world / "helpfulness",
        "safety": world / "safety",
        "prompts": [world / "prompts.jsonl"],
        "out": out,
        "iterations": 5,
        "batch": 8,
        "minibatch": 4,
        "lr": 1e-3,
        "critic_lr": 2e-3,
        "critic_warmup": 1,
        "max_new_tokens": 6,
        "save_every": 2,
        "eval_every": 2,
        "device": "cpu",
    }
    return PPOConfig(**(values | options))


def metrics(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def whole(world):
    """A finished run, with held-out prompts."""
    out = world / "whole"
    ppo.run(configured(world, out, eval_prompts=[world / "held_out.jsonl"]))
    return out


def test_the_defaults_are_the_papers():
    """Trap 13 among them: clip 1.0 and Adam's eps 1e-5."""
    config = PPOConfig(
        policy=Path("p"), helpfulness=Path("h"), safety=Path("s"), prompts=[], out=Path("o")
    )
    assert (config.lr, config.schedule, config.warmup_steps) == (1e-6, "constant", 0)
    assert (config.batch, config.minibatch, config.iterations) == (512, 64, 400)
    assert (config.ratio_clip, config.beta) == (0.2, 0.01)
    assert (config.beta1, config.beta2, config.eps) == (0.9, 0.95, 1e-5)
    assert (config.weight_decay, config.clip) == (0.1, 1.0)
    assert (config.combine, config.safety_threshold, config.whiten) == ("switch", 0.15, True)


def test_a_run_logs_what_one_needs_to_see(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    wanted = (
        "reward", "reward_helpfulness", "reward_safety", "branch_is_safety", "branch_unsafe",
        "branch_helpfulness", "kl", "kl_token_k1", "kl_token_k3", "answer_tokens", "unfinished",
        "explained_variance", "value_loss", "critic_grad_norm",
    )  # fmt: skip
    for row in rows[1:]:
        assert all(math.isfinite(row[name]) for name in wanted)
        assert row["branch_is_safety"] + row["branch_unsafe"] + row["branch_helpfulness"] == 8
    assert all(
        name in rows[2]
        for name in (
            "ratio",
            "approx_kl",
            "clip_fraction",
            "entropy",
            "policy_loss",
            "policy_grad_norm",
        )
    )
    assert "ratio" not in rows[1] and rows[1]["lr"] == 0.0  # the critic's warm-up
    assert "eval_reward" in rows[0] and "eval_reward" in rows[4]
    assert abs(rows[1]["kl"]) < 1e-4 and rows[5]["kl_token_k3"] > 0


def test_a_run_writes_readable_samples(whole):
    file = whole / "samples" / "step-000002.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    assert len(rows) == 8
    assert rows[0]["messages"][0]["role"] == "user" and isinstance(rows[0]["answer"], str)


def test_the_finished_model_is_the_trained_policy(world, whole):
    before = load_model(world / "policy").state_dict()
    after = load_model(whole / "model").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (whole / "model" / "tokenizer.model").exists()
    assert (
        ppo.run(configured(world, whole, eval_prompts=[world / "held_out.jsonl"]))
        == whole / "model"
    )


def test_trap_12_the_critic_is_its_own_model_with_a_fresh_head_and_is_checkpointed(world, whole):
    checkpoint = whole / "checkpoints" / "step-000004"
    critic = load_model(checkpoint / "training" / "critic")
    assert critic.head == "score"
    judge = load_model(world / "helpfulness")
    assert not torch.equal(critic.score.weight, judge.score.weight)
    for name in ("model", "critic"):
        state = load_file(checkpoint / "training" / f"{name}-optimizer.safetensors")
        steps = {value.item() for key, value in state.items() if key.endswith(".step")}
        assert steps == ({6.0} if name == "model" else {8.0})  # one warm-up iteration of two steps


@pytest.mark.parametrize("start", ["helpfulness", "policy"])
def test_trap_12_the_fresh_head_is_small(world, tmp_path, start):
    config = configured(world, tmp_path / start, critic=start)
    with ppo.open_run(config, tokenizer=world / "t.model") as folder:
        stage = ppo.open_stage(config, folder, ppo.Tokenizer(world / "t.model"), None)
    source, critic = load_model(world / start), stage.critic.model
    assert torch.equal(critic.model.norm.weight, source.model.norm.weight)
    assert torch.equal(critic.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert critic is not stage.reward.models["helpfulness"]
    spread = critic.score.weight.square().mean().sqrt().item()
    assert spread == pytest.approx(17**-0.5, rel=0.5)
    for frozen in (stage.reference, *stage.reward.models.values()):
        assert not any(p.requires_grad for p in frozen.parameters())


def test_a_run_killed_at_any_moment_continues_exactly(world, whole, tmp_path):
    """kill -9 of a real process, some iterations after a checkpoint; then the same command."""
    config = configured(world, tmp_path / "killed", eval_prompts=[world / "held_out.jsonl"])
    recipe = tmp_path / "ppo.toml"
    recipe.write_text(to_toml(config))
    command = [sys.executable, "-m", "puna.trainers.ppo", str(recipe)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = config.out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 4:  # iteration 3, checkpoint 2
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (config.out / "model").exists()
    with log.open("a") as file:
        file.write('{"step": 4, "rew')  # a row that the kill cut short
    final = ppo.run(config)
    assert metrics(config.out) == metrics(whole)
    ours, theirs = load_model(final).state_dict(), load_model(whole / "model").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resuming_reads_policy_critic_and_both_optimizers(world, whole, tmp_path):
    """Stop after a checkpoint by deleting what came later, in a copy of the finished run."""
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    (out / "finished.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-000004")
    config = configured(world, out, eval_prompts=[world / "held_out.jsonl"])
    ppo.run(config)
    assert metrics(out) == metrics(whole)


def test_trap_14_every_rank_gets_its_share_of_each_mini_batch(world, tmp_path):
    config = configured(world, tmp_path)
    plan = of_steps(80, 9, config.batch)
    whole = ppo.rank_prompts(config, plan, 3, rank=0, ranks=1)
    parts = [ppo.rank_prompts(config, plan, 3, rank, 2) for rank in range(2)]
    for number in range(2):
        mini = whole[number * 4 : number * 4 + 4]
        dealt = [parts[rank][number * 2 : number * 2 + 2] for rank in range(2)]
        assert sorted(mini) == sorted(dealt[0] + dealt[1])


def test_trap_14_each_epoch_is_a_fresh_shuffle_of_all_prompts():
    epochs = [[draw(e * 10 + i, 10, seed=4) for i in range(10)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(i, number) for i in range(10)]
    assert [i for i, _ in epochs[0]] != [i for i, _ in epochs[1]]
    assert [i for i, _ in epochs[0]] != [draw(i, 10, seed=5)[0] for i in range(10)]


def test_bad_sizes_are_refused_with_a_way_out(world, tmp_path):
    config = configured(world, tmp_path / "x")
    with pytest.raises(ValueError, match="batch 10 is not a multiple of minibatch 4"):
        ppo.run(replace(config, batch=10))
    with pytest.raises(ValueError, match="patience needs eval_prompts"):
        ppo.run(replace(config, patience=2))
    with pytest.raises(ValueError, match="max_new_tokens 64 leaves no room"):
        ppo.run(replace(config, max_new_tokens=64))
    with pytest.raises(ValueError, match="temperature is 0"):
        ppo.run(replace(config, temperature=0.0))


def test_models_with_different_tokenizers_are_refused(world, tmp_path):
    shutil.copytree(world / "safety", tmp_path / "other")
    texts = [f"{b} {a} {a}." for a in WORDS for b in reversed(WORDS)] * 9
    train_tokenizer(texts, tmp_path / "other" / "tokenizer.model", vocab_size=300)
    config = configured(world, tmp_path / "x", safety=tmp_path / "other")
    with pytest.raises(ValueError, match="has another tokenizer than"):
        ppo.run(config)


def test_two_ranks_give_the_numbers_of_one(world, whole, tmp_path):
    config = configured(world, tmp_path / "ranks", eval_prompts=[world / "held_out.jsonl"])
    recipe = tmp_path / "ppo.toml"
    recipe.write_text(to_toml(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "puna.trainers.ppo", str(recipe)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for ours, theirs in zip(metrics(config.out), metrics(whole), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=1e-4, rel=1e-4), (ours["step"], name)


def count_red(answers):
    return [answer.text.count("red") - 0.1 * len(answer.ids) for answer in answers]


def test_a_reward_function_takes_the_place_of_the_reward_models(world, tmp_path):
    config = configured(world, tmp_path / "own", helpfulness=None, safety=None, critic="policy")
    final = ppo.run(config, count_red)
    rows = metrics(config.out)
    assert load_model(final).head == "lm" and len(rows) == 5
    assert all(math.isfinite(row["reward"]) for row in rows)
    assert not any(name.startswith("branch_") or name == "reward_safety" for name in rows[0])
    samples = [json.loads(row) for row in (config.out / "samples/step-000000.jsonl").open()]
    assert all(s["score"] <= s["answer"].count("red") for s in samples)


def test_one_reward_model_scores_everything_and_two_may_be_added(world, tmp_path):
    alone = configured(world, tmp_path / "alone", safety=None, iterations=2)
    ppo.run(alone)
    added = configured(world, tmp_path / "added", combine="sum", iterations=2, unfinished="keep")
    ppo.run(added)
    assert "reward_safety" not in metrics(alone.out)[0]
    row = metrics(added.out)[0]
    assert row["reward"] == pytest.approx(
        row["reward_helpfulness"] + row["reward_safety"], abs=1e-5
    )


def test_what_scores_must_be_clear_and_a_broken_score_stops_before_training(world, tmp_path):
    own = {"helpfulness": None, "safety": None}
    with pytest.raises(ValueError, match="name a reward model"):
        ppo.run(configured(world, tmp_path / "a", **own, critic="policy"))
    with pytest.raises(ValueError, match="leave their paths out"):
        ppo.run(configured(world, tmp_path / "b"), count_red)
    with pytest.raises(ValueError, match='the critic starts from .* set critic to "policy"'):
        ppo.run(configured(world, tmp_path / "c", **own), count_red)
    config = configured(world, tmp_path / "d", **own, critic="policy")
    with pytest.raises(RuntimeError, match="the reward gave no finite score for 8 of 8 answers"):
        ppo.run(config, lambda answers: [math.nan] * len(answers))
    assert not metrics(config.out) if (config.out / "metrics.jsonl").exists() else True


def test_from_prompt_to_optimizer_step_in_at_most_ten_files(world, tmp_path):
    """What a reader of an iteration opens in trainers/, counted while one runs."""
    root = Path(ppo.__file__).resolve().parent
    files = set()

    def watch(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.resolve().is_relative_to(root):
            files.add(str(path.resolve().relative_to(root)))

    config = configured(world, tmp_path / "run")
    with ppo.open_run(config, tokenizer=world / "t.model") as folder:
        stage = ppo.open_stage(config, folder, ppo.Tokenizer(world / "t.model"), None)
        sys.setprofile(watch)
        try:
            ppo.learn(stage, folder, 1, ppo.look(stage, 1))
        finally:
            sys.setprofile(None)
    assert "rl/update.py" in files and len(files) <= 10, sorted(files)
