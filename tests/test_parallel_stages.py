"""Each stage on two processes writes the metrics that it writes on one.

The ranks run one stage after the other, each through its own `main` with the arguments of a command
line.
"""

import functools
import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import succeed

from puna.core import ranks
from puna.core.checkpoint.folder import load_model, save_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer, train_tokenizer
from puna.trainers import rlhf
from puna.trainers.rl.comparisons import Verdict
from puna.trainers.rl.rewards import Answer
from puna.trainers.train.config import parse

WORDS = "red blue green cat dog bird runs sleeps sings why how where big small old new".split()
RATED = ("significantly_better", "better", "slightly_better", "negligibly_better")
SAFETY = ("chosen_safe", "both_safe", "both_unsafe")

COMMON = ["--save-every", "1000", "--lr", "1e-3", "--device", "cpu"]
STAGES: dict[str, list[str]] = {
    "pretrain": (
        "--data {0}/text.jsonl --tokenizer {0}/tokenizer.model --size mini --context 64 --batch 4 "
        "--micro-batch 1 --steps 10 --eval-share 0.1"
    ).split(),
    "sft": "--model {0}/lm --data {0}/dialogues.jsonl --batch 4 --micro-batch 1 --epochs 2".split(),
    "reward": (
        "--model {0}/lm --data {0}/preferences.jsonl --batch 8 --micro-batch 2 --epochs 2 "
        "--safety-weight 0.5"
    ).split(),
    "ppo": (
        "--policy {0}/lm --helpfulness {0}/helpfulness --safety {0}/safety "
        "--prompts {0}/prompts.jsonl --eval-prompts {0}/prompts.jsonl --iterations 10 --batch 8 "
        "--minibatch 4 --max-new-tokens 6 --micro-batch-tokens 64 --eval-count 5"
    ).split(),
    # 11 prompts in chunks of 5: in the last chunk a rank has none
    "rejection": (
        "--policy {0}/lm --helpfulness {0}/helpfulness --safety {0}/safety --samples 3 --chunk 5 "
        "--prompts {0}/eleven.jsonl --max-new-tokens 6 --batch 2 --micro-batch 1 --epochs 3 "
        "--row-tokens 40"
    ).split(),
    # 7 tagged prompts in chunks of 3
    "distill": (
        "--policy {0}/lm --safety {0}/safety --prompts {0}/prompts.jsonl --max-new-tokens 6 "
        "--preprompts {0}/preprompts.jsonl --mix {0}/mix.jsonl --chunk 3 --batch 2 "
        "--micro-batch 1 --epochs 6 --row-tokens 80"
    ).split(),
    "gatt": (
        "--model {0}/lm --dialogues {0}/ghosts.jsonl --mix {0}/mix.jsonl --samples 2 "
        "--max-new-tokens 6 --batch 2 --micro-batch 1 --epochs 3 --targets 2"
    ).split(),
}
SHARED = ("ppo", "gatt", "distill")  # whose two ranks share one model while sampling
TOGETHER = ("pretrain", "sft", "reward", "ppo")  # whose ranks work on the same rows, two by two
TP = {
    2: "--parallel.tp 2 --parallel.checkpointing full --parallel.offload".split(),
    4: "--parallel.tp 2".split(),
}
LOOP = """
out = "{1}"
model = "{0}/lm"
prompts = ["{0}/eleven.jsonl"]
helpfulness_prompts = ["{0}/eleven.jsonl"]
safety_prompts = ["{0}/prompts.jsonl"]
versions = 2
ppo_versions = 1
helpfulness_pairs = 21
safety_pairs = 21
chunk = 8
max_new_tokens = 6
device = "cpu"
sampling_tp = {2}
reward = {{ batch = 4, micro_batch = 2, lr = 1e-3 }}
rejection = {{ samples = 3, batch = 2, micro_batch = 1, lr = 1e-3, row_tokens = 40 }}
ppo = {{ iterations = 2, batch = 4, minibatch = 2, lr = 1e-3 }}
"""
TIMED = ("second", "tok/s", "per_second")


def arguments(stage: str, inputs: Path, out: Path) -> list[str]:
    every = ["--eval-every", "5"] * (stage in TOGETHER)  # the others hold nothing out
    return [*(a.format(inputs) for a in STAGES[stage]), *COMMON, *every, "--out", str(out)]


def run_stage(stage: str, argv: list[str]) -> None:
    """The stage's own `main`, as `python -m puna.trainers.<stage>` calls it."""
    before = sys.argv
    sys.argv = [stage, *argv]
    try:
        if stage == "rlhf":
            annotators = {"helpfulness": longer, "safety": longer}
            rlhf.run(parse(rlhf.RLHFConfig, argv, stage), annotators)
        else:
            module = importlib.import_module(f"puna.trainers.{stage.split('-')[0]}")
            status = module.main()
            assert status == 0, f"{stage} ended with {status}"
    finally:
        sys.argv = before


def longer(a: Sequence[Answer], b: Sequence[Answer]) -> list[Verdict]:
    """The longer answer is better."""
    pairs = zip(a, b, strict=True)
    return [Verdict(int(len(y.text) > len(x.text)), "better", "both_safe") for x, y in pairs]


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 7)))


def message(role: str, draw: random.Random) -> dict[str, str]:
    return {"role": role, "content": sentence(draw)}


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def end_often(model: Transformer, eos_id: int) -> None:
    """Let an untrained model draw EOS about every fourth time: one channel is always on."""
    model.model.embed_tokens.weight[:, 0] = 4.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[eos_id, 0] = 1.2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny files of every kind, a tokenizer and three models."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = random.Random(0)
    write(folder / "text.jsonl", ({"text": sentence(draw)} for _ in range(300)))
    for name, count in (("dialogues", 60), ("mix", 8)):
        dialogues = ([message("user", draw), message("assistant", draw)] for _ in range(count))
        write(folder / f"{name}.jsonl", ({"messages": d} for d in dialogues))
    write(
        folder / "preferences.jsonl",
        (
            {
                "messages": [message("user", draw)],
                "chosen": sentence(draw),
                "rejected": sentence(draw),
                "rating": draw.choice(RATED),
                "safety": draw.choice(SAFETY),
            }
            for _ in range(44)
        ),
    )
    prompts = ({"messages": [message("user", draw)], "safety": i % 3 == 0} for i in range(20))
    write(folder / "prompts.jsonl", prompts)
    eleven = ({"messages": [message("user", draw)]} for _ in range(11))
    write(folder / "eleven.jsonl", eleven)
    ghosts = (
        {"turns": [sentence(draw) for _ in range(3)], "instruction": "bark"} for _ in "1234567"
    )
    write(folder / "ghosts.jsonl", ghosts)
    write(folder / "preprompts.jsonl", ({"preprompt": sentence(draw)} for _ in range(3)))
    tokenizer = folder / "tokenizer.model"
    train_tokenizer([" ".join(WORDS)] * 20, tokenizer, vocab_size=300)
    config = ModelConfig(36, 2, 6, 2, 50, Tokenizer(tokenizer).vocab_size, context=96)
    for seed, name in enumerate(("lm", "helpfulness", "safety")):
        model = Transformer(config, "lm" if name == "lm" else "score")
        model.init_weights(seed)
        if name == "lm":
            end_often(model, Tokenizer(tokenizer).eos_id)
        save_model(folder / name, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def two(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of all stages on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    jobs = together(inputs, folder, 2) | {
        stage: arguments(stage, inputs, folder / stage) + ["--sampling-tp", "2"] * (stage in SHARED)
        for stage in STAGES
    }
    jobs["rlhf"] = [str(folder / "rlhf.toml")]
    (folder / "rlhf.toml").write_text(LOOP.format(inputs, folder / "rlhf", 2))
    on_ranks(2, folder, jobs)
    return folder


@pytest.fixture(scope="module")
def four(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of four ranks, of which two work on the same rows each."""
    folder = tmp_path_factory.mktemp("four")
    jobs = together(inputs, folder, 4)
    jobs["ppo-tp"] += ["--sampling-tp", "2"]
    on_ranks(4, folder, jobs)
    return folder


def together(inputs: Path, folder: Path, ranks: int) -> dict[str, list[str]]:
    return {
        f"{stage}-tp": arguments(stage, inputs, folder / f"{stage}-tp") + TP[ranks]
        for stage in TOGETHER
    }


def on_ranks(number: int, folder: Path, jobs: dict[str, list[str]]) -> None:
    """Run the stages on so many ranks."""
    succeed(number, run_stages, jobs, folder=folder, seconds=900)


@pytest.fixture(scope="module")
def one(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A stage's run on one rank."""
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def alone(stage: str) -> Path:
        run_stage(stage, arguments(stage, inputs, folder / stage))
        return folder / stage

    return alone


def test_a_run_goes_on_in_another_layout(inputs: Path, tmp_path: Path) -> None:
    """In the same one with the same numbers to the last bit."""
    same = ["--schedule", "constant", "--save-every", "4"]
    tp, copies = ["--parallel.tp", "2"], ["--parallel.replicate", "2"]

    def sft(name: str, epochs: str, *more: str) -> list[str]:
        own = [word if word != "2" or flag != "--epochs" else epochs for flag, word in flags]
        return [*own, *same, *more, "--out", str(tmp_path / name)]

    words = arguments("sft", inputs, tmp_path)[:-2]
    words = [word for word in words if word not in ("--save-every", "1000")]
    flags = list(zip(["", *words], words, strict=False))
    first = {"half": sft("half", "1", *tp), "plain": sft("plain", "1"), "all": sft("all", "2", *tp)}
    on_ranks(2, tmp_path, {f"sft-{name}": argv for name, argv in first.items()})
    layouts = {"same": tp, "sharded": [], "copies": copies}
    for name in layouts:
        shutil.copytree(tmp_path / "half", tmp_path / name)
    again = {name: sft(name, "2", "--amend", *layout) for name, layout in layouts.items()}
    again["plain"] = sft("plain", "2", "--amend", *tp)
    on_ranks(2, tmp_path, {f"sft-{name}": argv for name, argv in again.items()})
    expected = metrics(tmp_path / "all")
    assert len(expected) > len(metrics(tmp_path / "half")) > 5
    assert metrics(tmp_path / "same") == expected
    for name in ("sharded", "copies", "plain"):
        assert_same_rows(metrics(tmp_path / name), expected)


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run, without what depends on the clock."""
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMED)} for row in rows]


def assert_same_rows(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        for name, value in other.items():
            close = pytest.approx(value, rel=1e-5, abs=1e-5)
            assert row[name] == close, f"{name} at step {row['step']}"


def assert_same_run(found: Path, expected: Path) -> None:
    assert len(metrics(expected)) >= 10
    assert_same_rows(metrics(found), metrics(expected))
    weights = dict(load_model(expected / "model").named_parameters())
    for name, parameter in load_model(found / "model").named_parameters():
        torch.testing.assert_close(parameter, weights[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_write_the_metrics_of_one(
    two: Path, one: Callable[[str], Path], stage: str
) -> None:
    assert_same_run(two / stage, one(stage))


@pytest.mark.parametrize("stage", TOGETHER)
@pytest.mark.parametrize("ranks", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_ranks_that_work_on_the_same_rows_write_the_metrics_of_one(
    request: pytest.FixtureRequest, one: Callable[[str], Path], ranks: str, stage: str
) -> None:
    assert_same_run(request.getfixturevalue(ranks) / f"{stage}-tp", one(stage))


def test_two_ranks_go_through_the_versions_as_one(inputs: Path, two: Path, tmp_path: Path) -> None:
    (tmp_path / "rlhf.toml").write_text(LOOP.format(inputs, tmp_path / "rlhf", 1))
    run_stage("rlhf", [str(tmp_path / "rlhf.toml")])
    one, other = tmp_path / "rlhf", two / "rlhf"
    runs = sorted(path.parent.relative_to(one) for path in one.rglob("metrics.jsonl"))
    assert len(runs) == 7  # twice two reward models and rejection sampling; PPO
    for run in runs:
        assert_same_rows(metrics(other / run), metrics(one / run))
    for name in ("helpfulness-pairs.jsonl", "safety-pairs.jsonl", "rejection/selected.jsonl"):
        assert answers(other / "round-2" / name) == answers(one / "round-2" / name)


def answers(path: Path) -> list[list[Any]]:
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    return [[row.get(key) for key in ("messages", "a", "b", "answer")] for row in rows]


def run_stages(jobs: dict[str, list[str]]) -> None:
    torch.set_num_threads(1)
    ranks.init()
    leave, ranks.close = ranks.close, lambda: None  # a group cannot be joined twice
    for stage, argv in jobs.items():
        run_stage(stage, argv)
    leave()
