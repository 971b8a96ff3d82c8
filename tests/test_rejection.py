"""Run: python -m pytest tests/test_rejection.py -q"""

import json
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

from puna.core import parallel
from puna.core.checkpoint.folder import load_model, save_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.chat import encode_prompt
from puna.core.text.tokenizer import Tokenizer, train_tokenizer
from puna.trainers import rejection
from puna.trainers.rejection import RejectionConfig
from puna.trainers.rl import sampling
from puna.trainers.rl.best_of import best_few, prompt_key, read_samples, write_samples
from puna.trainers.train.config import to_toml
from puna.trainers.train.next_token import next_token_loss

WORDS = ["red", "blue", "cup", "tree", "sing", "give", "lamp", "nine", "moon", "fish"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy that stops soon, a smaller student, two reward models, prompts: all random."""
    root = tmp_path_factory.mktemp("world")
    texts = [f"{a} {b} {c}." for a in WORDS for b in WORDS for c in WORDS]
    tokenizer = train_tokenizer(texts + ["[INST] [/INST]"] * 9, root / "t.model", vocab_size=320)
    shape = ModelConfig(16, 2, 2, 1, 24, vocab_size=tokenizer.vocab_size, context=64)
    small = replace(shape, dim=8, n_layers=1, ffn_dim=12)
    folders = [
        ("policy", "lm", shape),
        ("helpfulness", "score", shape),
        ("safety", "score", shape),
        ("student", "lm", small),
    ]
    for seed, (name, head, config) in enumerate(folders):
        model = Transformer(config, head)
        model.init_weights(seed)
        if name == "policy":
            with torch.no_grad():  # EOS is likely after anything
                direction = torch.ones(16)
                model.lm_head.weight[2] = 0.3 * direction
                model.model.embed_tokens.weight.add_(0.5 * direction)
        save_model(root / name, model, root / "t.model")
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {b}"}], "safety": a == "red"}
        for a in WORDS[:3]
        for b in WORDS[:7]
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def configured(world: Path, out: Path, **options) -> RejectionConfig:
    values = {
        "policy": world / "policy",
        "helpfulness": world / "helpfulness",
        "safety": world / "safety",
        "prompts": [world / "prompts.jsonl"],
        "out": out,
        "samples": 4,
        "chunk": 4,
        "max_new_tokens": 8,
        "batch": 2,
        "micro_batch": 2,
        "lr": 1e-3,
        "save_every": 2,
        "device": "cpu",
    }
    return RejectionConfig(**(values | options))


def losses(out: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(world):
    rejection.run(configured(world, world / "whole"))
    return world / "whole"


def test_k_answers_to_each_prompt_are_sampled_and_scored(world, whole):
    samples = read_samples(whole / "samples.jsonl")
    assert [(s["prompt"], s["sample"]) for s in samples] == [
        (i, k) for i in range(21) for k in range(4)
    ]
    tokenizer = Tokenizer(world / "t.model")
    judges = {name: load_model(world / name) for name in ("helpfulness", "safety")}
    for one in samples[::9]:
        ids = encode_prompt(tokenizer, one["messages"]) + one["tokens"]
        for name, judge in judges.items():
            hidden = judge(torch.tensor([ids]))[0, -1]
            expected = (hidden @ judge.score.weight[0]).item()
            assert one["scores"][name] == pytest.approx(expected, abs=1e-4)
        unsafe = one["is_safety"] or one["scores"]["safety"] < -1.7346
        assert one["score"] == one["scores"]["safety" if unsafe else "helpfulness"]


def test_the_best_finished_answer_to_each_prompt_is_selected(whole):
    samples = read_samples(whole / "samples.jsonl")
    selected = read_samples(whole / "selected.jsonl")
    for one in selected:
        rivals = [
            s["score"]
            for s in samples
            if s["prompt"] == one["prompt"] and s["finished"] and s["answer"]
        ]
        assert one["score"] == max(rivals)
    report = json.loads((whole / "selection.json").read_text())
    assert (report["prompts"], report["kept"]) == (21, len(selected))
    assert [row["k"] for row in report["by_k"]] == [1, 2, 3, 4]
    assert report["by_k"][-1]["best"] > report["by_k"][0]["best"]


@torch.no_grad()
def loss_on(rows, folder: Path) -> float:
    return next_token_loss(load_model(folder), rows.batch(range(len(rows))))[0].item()


def test_fine_tuning_is_on_the_ids_drawn_and_the_answers_alone(world, whole):
    tokenizer = Tokenizer(world / "t.model")
    selected = read_samples(whole / "selected.jsonl")
    rows = rejection.pack(tokenizer, selected, 64)
    batch = rows.batch(range(len(rows)))
    assert batch.weights.sum().item() == sum(len(s["tokens"]) for s in selected)
    learned = sorted(batch.targets[batch.weights > 0].tolist())
    assert learned == sorted(token for s in selected for token in s["tokens"])
    assert loss_on(rows, whole / "model") < loss_on(rows, world / "policy")


def test_a_smaller_student_learns_from_the_teachers_answers(world, tmp_path):
    config = configured(world, tmp_path / "run", student=world / "student")
    final = rejection.run(config)
    assert load_model(final).config.dim == 8
    selected = read_samples(config.out / "selected.jsonl")
    rows = rejection.pack(Tokenizer(world / "t.model"), selected, 64)
    assert loss_on(rows, final) < loss_on(rows, world / "student")


def test_selected_answers_that_are_absent_are_named_before_anything_is_made(world, tmp_path):
    options = {"helpfulness": None, "safety": None, "prompts": []}
    config = configured(world, tmp_path / "run", selected=tmp_path / "selcted.jsonl", **options)
    with pytest.raises(ValueError, match="selcted.jsonl: no such file; name the selected.jsonl"):
        rejection.run(config)
    assert not config.out.exists()


def test_a_student_that_cannot_be_shared_out_is_refused_before_sampling(
    world, tmp_path, monkeypatch
):
    def check(shape, replicate, tp):
        if shape.dim == 8:
            raise ValueError("the student cannot be shared out")

    monkeypatch.setattr(parallel, "check", check)
    config = configured(world, tmp_path / "run", student=world / "student")
    with pytest.raises(ValueError, match="the student cannot"):
        rejection.run(config)
    assert not (config.out / "samples.jsonl").exists()


def test_the_best_few_are_handed_on(whole):
    pool, selected = (read_samples(whole / f"{name}.jsonl") for name in ("pool", "selected"))
    fresh = read_samples(whole / "samples.jsonl")
    assert pool == best_few(fresh, 4) and len(pool) > len(selected)
    assert {(s["prompt"], s["sample"]) for s in selected} <= {
        (s["prompt"], s["sample"]) for s in pool
    }


def test_earlier_rounds_stay_in_the_pool_and_are_scored_again(world, whole, tmp_path):
    """Old scores do not count: an old sample wins only by what today's models say."""
    tokenizer = Tokenizer(world / "t.model")
    old = read_samples(whole / "selected.jsonl")
    boast = [{**s, "score": 1e6, "helpfulness": 1e6, "safety": 1e6} for s in old]
    extra = {**boast[0], "messages": [{"role": "user", "content": "moon fish"}]}
    write_samples(tmp_path / "pool.jsonl", [*boast, extra], mode="w")
    config = configured(world, tmp_path / "run", pools=[tmp_path / "pool.jsonl"], round=2)
    rejection.run(config)
    fresh = read_samples(config.out / "samples.jsonl")
    selected = {prompt_key(s["messages"]): s for s in read_samples(config.out / "selected.jsonl")}
    assert prompt_key(extra["messages"]) in selected  # a prompt of an earlier round alone
    assert max(s["score"] for s in selected.values()) < 1e5
    judge = load_model(world / "helpfulness")
    for one in old:
        best = selected[prompt_key(one["messages"])]
        rivals = [
            s["score"]
            for s in fresh
            if s["messages"] == one["messages"] and s["finished"] and s["answer"]
        ]
        assert best["score"] == pytest.approx(max([one["score"], *rivals]), abs=1e-4)
        if (
            best["round"] == 1
            and not best["is_safety"]
            and best["score"] == best["scores"]["helpfulness"]
        ):
            ids = encode_prompt(tokenizer, best["messages"]) + best["tokens"]
            hidden = judge(torch.tensor([ids]))[0, -1]
            assert best["score"] == pytest.approx((hidden @ judge.score.weight[0]).item(), abs=1e-4)
    report = json.loads((config.out / "selection.json").read_text())
    assert set(report["kept_by_round"]) == {"1", "2"}


def test_sampling_goes_on_where_a_kill_left_it(world, whole, tmp_path, monkeypatch):
    """Two whole chunks, a part of a third and half a line: the same samples in the end."""
    config = configured(world, tmp_path / "run")
    config.out.mkdir()
    for name in ("config.toml", "inputs.json"):
        shutil.copy(whole / name, config.out / name)
    lines = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    (config.out / "samples.jsonl").write_text("".join(lines[: 2 * 16 + 5]) + lines[40][:30])
    watched = []
    sample_chunk = sampling.sample_chunk

    def watch(*arguments):
        watched.append(list(arguments[4]))
        return sample_chunk(*arguments)

    monkeypatch.setattr(sampling, "sample_chunk", watch)
    rejection.run(config)
    assert watched[0] == [8, 9, 10, 11] and len(watched) == 4
    assert (config.out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert losses(config.out) == losses(whole)


@pytest.mark.parametrize("moment", ["samples.jsonl", "metrics.jsonl"])
def test_a_run_killed_in_either_stage_continues_exactly(world, whole, tmp_path, moment):
    config = configured(world, tmp_path / "run")
    recipe = tmp_path / "rejection.toml"
    recipe.write_text(to_toml(config))
    command = [sys.executable, "-m", "puna.trainers.rejection", str(recipe)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (config.out / moment).exists():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rejection.run(config)
    assert (config.out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert losses(config.out) == losses(whole)


def test_two_ranks_sample_and_train_as_one(world, whole, tmp_path):
    config = configured(world, tmp_path / "ranks")
    recipe = tmp_path / "rejection.toml"
    recipe.write_text(to_toml(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "puna.trainers.rejection", str(recipe)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    ours, theirs = (read_samples(out / "samples.jsonl") for out in (config.out, whole))
    assert [s["tokens"] for s in ours] == [s["tokens"] for s in theirs]
    assert losses(config.out) == pytest.approx(losses(whole), abs=1e-5)


def test_what_cannot_work_is_refused(world, whole, tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens 64 leaves no room"):
        rejection.run(configured(world, tmp_path / "a", max_new_tokens=64))
    with pytest.raises(ValueError, match="no answer of 84 is finished; raise max_new_tokens"):
        shutil.copytree(world / "policy", tmp_path / "endless")
        model = load_model(world / "policy")
        with torch.no_grad():
            model.lm_head.weight[2] *= -9
        save_model(tmp_path / "endless", model, world / "t.model")
        rejection.run(configured(world, tmp_path / "b", policy=tmp_path / "endless"))
    foreign = [{**s, "answer": "other words"} for s in read_samples(whole / "selected.jsonl")]
    write_samples(tmp_path / "pool.jsonl", foreign, mode="w")
    with pytest.raises(ValueError, match="pool.jsonl:1: the ids do not spell the answer"):
        rejection.run(configured(world, tmp_path / "c", pools=[tmp_path / "pool.jsonl"]))


def test_the_finished_run_is_left_alone(world, whole):
    assert rejection.run(configured(world, whole)) == whole / "model"


def test_an_empty_pool_is_named(world, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    config = configured(world, tmp_path / "run", pools=[tmp_path / "empty.jsonl"])
    with pytest.raises(ValueError, match="empty.jsonl: there is no sample in it; leave it out"):
        rejection.run(config)
