"""Every recipe parses, holds the paper's numbers, and takes three steps at full width.

The steps run on fake tensors (shapes without memory) under a fake process group of 64 ranks, so
that the whole path is walked with real shapes: FSDP2, the stage's own loss, backward, AdamW. Two
blocks stand for all; that a full-depth model has the right parameters is checked beside it.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from puna.core import ops, parallel
from puna.core.checkpoint.source import fresh
from puna.core.config import parameter_count, size
from puna.core.model import Transformer
from puna.core.parameters import parameter_shapes
from puna.trainers import reward
from puna.trainers.capacity.plan import DoesNotFit, PlanConfig
from puna.trainers.capacity.plan import run as run_plan
from puna.trainers.data.packing import PackedRows, Pair, pair_batch
from puna.trainers.rl import update
from puna.trainers.rl.losses import MARGINS
from puna.trainers.rl.rollout import Rollout
from puna.trainers.rlhf import check as check_rlhf
from puna.trainers.train import loop, next_token
from puna.trainers.train.config import from_values, load_recipe
from puna.trainers.train.layout import Parallel
from puna.trainers.train.plan import check_shares
from puna.trainers.train.recipes import known_recipes, read_recipe

ROOT = Path(__file__).parent.parent / "recipes"
RECIPES = known_recipes()
# What each recipe said when there was a whole file for each stage at each size.
WRITTEN_OUT = json.loads((Path(__file__).parent / "data" / "recipes.json").read_text())
SIZES = ("7b", "13b", "34b", "70b")
STAGES = "pretrain sft reward_helpfulness reward_safety rejection ppo gatt distill rlhf".split()
CLASSES = {
    "pretrain": "PretrainConfig",
    "sft": "SFTConfig",
    "reward": "RewardConfig",
    "rejection": "RejectionConfig",
    "ppo": "PPOConfig",
    "gatt": "GAttConfig",
    "distill": "DistillConfig",
    "rlhf": "RLHFConfig",
}
EXAMPLES = {"shakespeare": "pretrain", "dolly": "sft", "hh": "reward", "tulu1": "reward"}
ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1, "clip": 1.0}
PAPER: dict[str, dict[str, Any]] = {
    "pretrain": {
        "row_tokens": 4096,
        "batch": 1024,
        "schedule": "cosine",
        "warmup_steps": 2000,
        "min_lr": 0.1,
        **ADAMW,
    },
    "sft": {
        "lr": 2e-5,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "batch": 64,
        "row_tokens": 4096,
        "epochs": 2,
    },
    "reward_helpfulness": {
        "epochs": 1,
        "batch": 512,
        "schedule": "cosine",
        "min_lr": 0.1,
        "mix_share": 0.5,
        **ADAMW,
    },
    "reward_safety": {
        "epochs": 1,
        "batch": 512,
        "schedule": "cosine",
        "min_lr": 0.1,
        "mix_share": 0.1,
        **ADAMW,
    },
    "rejection": {"temperature": 1.2},
    "ppo": {
        "lr": 1e-6,
        "schedule": "constant",
        "batch": 512,
        "minibatch": 64,
        "ratio_clip": 0.2,
        "iterations": 400,
        **ADAMW,
    },
    "gatt": {"shorten": 0.5},
    "distill": {"lr": 2e-5, "batch": 64, "row_tokens": 4096},
    "rlhf": {"versions": 5, "ppo_versions": 1},
}
# by stage and field, in the order of SIZES
BY_SIZE: dict[str, dict[str, tuple[float, ...]]] = {
    "pretrain": {"lr": (3e-4, 3e-4, 1.5e-4, 1.5e-4)},
    "reward_helpfulness": {"lr": (1e-5, 1e-5, 1e-5, 5e-6)},
    "reward_safety": {"lr": (1e-5, 1e-5, 1e-5, 5e-6)},
    "ppo": {"beta": (0.01, 0.01, 0.005, 0.005)},
}
PARAMETERS = (6_738_415_616, 13_015_864_320, 33_743_970_304, 68_976_648_192)


def class_of(recipe: str) -> Any:
    """The Config that a recipe is for."""
    stem = Path(recipe).stem.split("_")[0]
    stage = EXAMPLES.get(stem, stem)  # examples are called after their data
    stage = EXAMPLES.get(stage, stage)
    return getattr(importlib.import_module(f"puna.trainers.{stage}"), CLASSES[stage])


def config_of(recipe: str) -> Any:
    """The recipe with its stage's Config; ValueError for a key that it does not have."""
    cls = class_of(recipe)
    return from_values(cls, load_recipe(cls, ROOT / recipe))


def test_each_size_has_a_recipe_for_each_stage() -> None:
    expected = {f"{name}/{stage}.toml" for name in SIZES for stage in STAGES}
    assert expected <= set(RECIPES)


@pytest.mark.parametrize("recipe", [name for name in WRITTEN_OUT if "b/rlhf" not in name])
def test_bases_and_overlays_say_what_was_written_out(recipe: str) -> None:
    assert read_recipe(ROOT / recipe) == WRITTEN_OUT[recipe]


@pytest.mark.parametrize("name", SIZES)
def test_the_loop_does_what_was_written_out_and_stops_ppo_early(name: str) -> None:
    """Its tables hold more than before: what each stage is told is the same but for patience,
    which they had forgotten."""
    before, now = WRITTEN_OUT[f"{name}/rlhf.toml"], read_recipe(ROOT / name / "rlhf.toml")
    tables = ("reward", "safety", "rejection", "ppo")
    assert set(before) == set(now) and set(tables) <= set(now)
    assert all(before[key] == now[key] for key in before if key not in tables)

    def told(values: dict[str, Any]) -> list[Any]:
        common = {"max_new_tokens": values["max_new_tokens"]}
        return [
            from_values(class_of("reward.toml"), values["reward"]),
            from_values(class_of("reward.toml"), values["reward"] | values["safety"]),
            from_values(class_of("rejection.toml"), common | values["rejection"]),
            from_values(class_of("ppo.toml"), common | values["ppo"]),
        ]

    old, new = told(before), told(now)
    assert (old[-1].patience, new[-1].patience) == (0, 5)
    old[-1].patience = 5
    assert old == new


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_parses(recipe: str) -> None:
    config = config_of(recipe)
    if recipe.endswith("rlhf.toml"):
        paths = ["prompts", "helpfulness_prompts", "safety_prompts", "eval_prompts"]
        paths += ["gatt_dialogues"] if config.gatt_version else []
        config = dataclasses.replace(
            config, out=Path("o"), model=Path("m"), **{name: [Path("p")] for name in paths}
        )
        check_rlhf(config)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SIZES)
def test_recipe_has_the_papers_numbers(name: str, stage: str) -> None:
    config = config_of(f"{name}/{stage}.toml")
    expected = dict(PAPER[stage])
    for field, values in BY_SIZE.get(stage, {}).items():
        expected[field] = values[SIZES.index(name)]
    assert {field: getattr(config, field) for field in expected} == expected
    if stage == "pretrain":
        assert config.size == name
        assert config.batch * config.row_tokens == 4 * 2**20
        assert config.steps * config.batch * config.row_tokens == pytest.approx(2e12, rel=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_loop_uses_the_stages_numbers(name: str) -> None:
    """The tables of rlhf.toml say nothing else than the stages' own recipes."""
    config = config_of(f"{name}/rlhf.toml")
    for table, recipe in (
        ("reward", "reward_helpfulness"),
        ("safety", "reward_safety"),
        ("rejection", "rejection"),
        ("ppo", "ppo"),
    ):
        alone = config_of(f"{name}/{recipe}.toml")
        values = dict(getattr(config, table))
        for field, value in values.pop("parallel").items():
            assert getattr(alone.parallel, field) == value
        assert values == {field: getattr(alone, field) for field in values}


@pytest.mark.parametrize(("name", "count"), list(zip(SIZES, PARAMETERS, strict=True)))
def test_full_size_has_the_papers_parameters(name: str, count: int) -> None:
    shapes = parameter_shapes(size(name), "lm")
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    assert parameter_count(size(name)) == count
    assert len(shapes) == 9 * size(name).n_layers + 3


@contextmanager
def fake_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int) -> Iterator[None]:
    """A process group that sends nothing, and tensors without memory, for GPUs: what a CPU would
    multiply in bf16 by itself is cast as there.

    Literal inputs keep their values (`CONSTANT_NUMEL_LIMIT`), since the losses look at them: which
    rows count, where sequences begin.
    """

    def really(function: Any) -> Any:
        """Meshes are of real tensors."""

        def called(*arguments: Any, **options: Any) -> Any:
            with unset_fake_temporarily():
                return function(*arguments, **options)

        return called

    monkeypatch.setattr(ops, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(parallel, "init_device_mesh", really(parallel.init_device_mesh))
    joined = staticmethod(really(DeviceMesh._concatenate))
    monkeypatch.setattr(DeviceMesh, "_concatenate", joined)
    monkeypatch.setattr(DeviceMesh, "mesh", property(really(DeviceMesh.mesh.fget)))
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 1 << 20)
    monkeypatch.setattr(torch, "arange", lambda *a, **_: torch.tensor(list(range(*a))))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with FakeTensorMode() as mode:
            mode.cache_enabled = False  # it forgets values
            yield
    finally:
        parallel.close()


def language_step(config: Any, model: Transformer) -> None:
    rows = PackedRows([([1] * 33, [0.0] * 8 + [1.0] * 25)] * 4, 64, vocab_size=32000)
    loss, _ = next_token.OBJECTIVE.loss(model, rows.batch([0] * config.micro_batch))
    loss.backward()


def reward_step(config: Any, model: Transformer) -> None:
    pair = Pair([1] * 32, [2] * 32, "better", "chosen_safe")
    batch = pair_batch([pair] * config.micro_batch, MARGINS[config.margin])
    loss, _ = reward.objective(config.safety_weight).loss(model, batch)
    loss.backward()


def experience() -> update.Experience:
    floats, whole = torch.tensor([[-1.0] * 16] * 2), torch.tensor([[True] * 16] * 2)
    lengths = torch.tensor([16, 16])
    rollout = Rollout([[1] * 16] * 2, [[5] * 16] * 2, lengths, floats, whole[:, 0])
    return update.Experience(rollout, floats[:, 0], floats, floats, floats, floats, whole)


def ppo_pass(config: Any, model: Transformer) -> None:
    totals = update.Totals(torch.device("cpu"))
    if model.head == "lm":
        # not the first pass: that one asserts on values, which fake tensors have not
        update.policy_pass(model, experience(), config, 32.0, totals, first=False)
    else:
        update.critic_pass(model, experience(), config, 32.0, totals)


def three_steps(name: str, head: str, config: Any, step: Any) -> dict[str, torch.Size]:
    """Build, shard and train a fake model of this size; returns this rank's shapes."""
    shape = dataclasses.replace(size(name), n_layers=2)
    model = loop.load(fresh(shape, 0, head), config)
    optimizer = loop.make_optimizer(model, config)
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    for number in range(3):
        step(config, model)
        loop.set_learning_rate(optimizer, loop.learning_rate(number, 3, config))
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32
            assert parameter.grad is not None and parameter.grad.shape == before[name], name
        optimizer.zero_grad(set_to_none=True)
    return {name: p.to_local().shape for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "replicate", "tp"),
    [(64, 2, 8), pytest.param(2048, 1, 2, marks=pytest.mark.slow)],  # four minutes
)
def test_dry_run_of_ranks_that_work_on_the_same_rows(
    ranks: int, replicate: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70B; on 2,048 ranks, which are more than a batch of 1,024 has rows."""
    config = config_of("70b/pretrain.toml")
    config.device, config.parallel.replicate, config.parallel.tp = "cpu", replicate, tp
    with fake_ranks(monkeypatch, ranks):
        check_shares(config.batch, tp)
        local = three_steps("70b", "lm", config, language_step)
    rows = size("70b").dim // tp // (ranks // replicate // tp)
    assert local["model.layers.0.self_attn.q_proj.weight"] == (rows, size("70b").dim)
    columns = size("70b").ffn_dim // tp
    rows = size("70b").dim // (ranks // replicate // tp)
    assert local["model.layers.1.mlp.down_proj.weight"] == (rows, columns)
    assert local["model.embed_tokens.weight"][0] == -(-32000 // (ranks // replicate))


@pytest.mark.slow  # as many ranks as PPO's minibatch and a machine allow
@pytest.mark.parametrize("head", ["lm", "score"])
def test_dry_run_of_what_a_refusal_advises(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """70B's PPO on 1,024 GPUs is refused, with what runs instead: that does run."""
    with pytest.raises(DoesNotFit) as refused:
        run_plan(PlanConfig(recipe="70b/ppo.toml", gpus=1024))
    advice = re.search(r"; (\d+) GPUs with \[parallel\] tp = (\d) fit", str(refused.value))
    assert advice is not None
    ranks, tp = map(int, advice.groups())
    layout = Parallel(tp=tp, checkpointing="full")
    assert run_plan(PlanConfig(recipe="70b/ppo.toml", gpus=ranks, parallel=layout))
    config = config_of("70b/ppo.toml")
    config.device, config.parallel.tp = "cpu", tp
    with fake_ranks(monkeypatch, ranks):
        check_shares(config.minibatch, tp, "minibatch")
        local = three_steps("70b", head, config, ppo_pass)
    rows = size("70b").dim // tp // (ranks // tp)
    assert local["model.layers.0.self_attn.q_proj.weight"] == (rows, size("70b").dim)


DRY_RUNS = [
    ("pretrain", "lm", language_step),
    ("sft", "lm", language_step),
    ("reward_helpfulness", "score", reward_step),
    ("reward_safety", "score", reward_step),
    ("rejection", "lm", language_step),
    ("ppo", "lm", ppo_pass),
    ("ppo", "score", ppo_pass),
    ("gatt", "lm", language_step),
    ("distill", "lm", language_step),
]


@pytest.mark.parametrize(("stage", "head", "step"), DRY_RUNS)
@pytest.mark.parametrize("name", SIZES)
def test_dry_run(
    name: str, stage: str, head: str, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(f"{name}/{stage}.toml")
    config.device = "cpu"
    with fake_ranks(monkeypatch, 64):
        local = three_steps(name, head, config, step)
    expected = parameter_shapes(dataclasses.replace(size(name), n_layers=2), head)
    assert set(local) == set(expected)
    for key, (rows, *rest) in expected.items():
        assert local[key] == (min(rows, -(-rows // 64)), *rest), key
