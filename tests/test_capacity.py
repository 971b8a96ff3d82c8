"""`puna plan` against PyTorch's own count of a run, and what it says of the shipped recipes.

Blocks are all alike, so two depths stand for every depth: what the second one adds is a block's.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from test_recipes import SIZES, STAGES, config_of, fake_ranks, language_step, reward_step
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from puna.core.checkpoint.source import fresh
from puna.core.config import block_parameters, size
from puna.core.generation.kv_cache import KVCache
from puna.core.parameters import parameter_shapes
from puna.core.tensor_parallel import Group, part
from puna.trainers.capacity import fitting, memory, phases, plan
from puna.trainers.capacity.devices import DEVICES, usable
from puna.trainers.capacity.memory import Setting
from puna.trainers.train import loop
from puna.trainers.train.command import command
from puna.trainers.train.layout import Parallel

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_model(name: str, head: str) -> None:
    shape = size(name)
    whole = sum(torch.Size(each).numel() for each in parameter_shapes(shape, head).values())
    assert memory.parameters(shape, head) == whole
    blocks = shape.n_layers * block_parameters(shape)
    assert blocks + memory.root_parameters(shape, head) == whole


def tracked(setting: Setting, head: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Bytes of rank 0 by kind when a step takes most, as FSDPMemTracker counts them."""
    stage, step = ("pretrain", language_step) if head == "lm" else ("reward_safety", reward_step)
    config = config_of(f"7b/{stage}.toml")
    config.device, config.dtype, config.micro_batch = "cpu", setting.dtype, 1
    config.parallel.checkpointing, config.parallel.tp = setting.checkpointing, setting.tp
    with fake_ranks(monkeypatch, setting.ranks):
        model = loop.load(fresh(setting.shape, 0, head), config)
        # Not fused: the tracker takes a fused optimizer's state for something else.
        optimizer = torch.optim.AdamW(model.parameters(), fused=False, foreach=True)
        tracker = FSDPMemTracker(model, optimizer)
        for counted in (False, True):
            if counted:
                tracker.__enter__()
            step(config, model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tracker.__exit__(None, None, None)
        (found,) = tracker.get_tracker_snapshot("peak").values()
    return {getattr(kind, "name", str(kind)): float(value) for kind, value in found.items()}


@pytest.mark.parametrize("layers", [3, 4])
@pytest.mark.parametrize(
    ("name", "ranks", "head", "checkpointing", "tp"),
    [
        ("7b", 8, "lm", "none", 1),
        ("7b", 64, "lm", "full", 1),
        ("13b", 64, "score", "full", 1),
        ("34b", 128, "lm", "full", 1),
        ("70b", 64, "lm", "full", 1),
        ("70b", 512, "lm", "full", 1),
        ("70b", 64, "lm", "selective", 8),
        pytest.param("70b", 2048, "lm", "full", 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_pytorch_counts(
    name: str,
    ranks: int,
    head: str,
    checkpointing: str,
    tp: int,
    layers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kind by kind, but for activations: the CPU's plain operations keep more than the kernels."""
    shape = dataclasses.replace(size(name), n_layers=layers)
    setting = Setting(shape, ranks, "bf16", checkpointing, tp)
    found = tracked(setting, head, monkeypatch)
    ours = memory.trained(setting, head) | memory.step(setting, 64, head)
    sides = {
        "parameters": found["SHARDED_PARAM"],
        "moments": found["OPT"],
        "gathered": found["UNSHARDED_PARAM"] + found["ALL_GATHER"],
        "whole gradients": found["UNSHARDED_GRAD"] + found["TEMP"],
        "reduction": found["REDUCE_SCATTER"],
    }
    if tp > 1:  # most is taken when the root's are added up, which are then counted as one kind
        sides["whole gradients"] += sides.pop("reduction")
        ours["whole gradients"] += ours.pop("reduction")
    for kind, theirs in sides.items():
        assert ours[kind] == pytest.approx(theirs, rel=0.1), kind
    assert 0 < found["SHARDED_GRAD"] <= ours["gradients"] * 1.01  # they grow until the end
    counted = found["Total"] - found["ACT"] - found["SHARDED_GRAD"]
    expected = memory.total(ours) - ours["activations"] - ours["gradients"]
    assert expected == pytest.approx(counted, rel=0.1)


def test_keys_and_values_are_the_caches() -> None:
    shape = size("demo")
    setting = Setting(shape, 64, "fp32")
    found = memory.sampling(setting, 1, 4, 300, 1e12)["keys and values"]
    cache = KVCache(shape, 4, 300)
    assert found == cache.k.nbytes + cache.v.nbytes
    assert memory.sampling(setting, 2, 4, 300, 1e12)["keys and values"] == found / 2
    assert memory.sampling(setting, 1, 400, 300, found)["keys and values"] == found


@pytest.mark.parametrize("name", SIZES)
def test_what_samples_is_gathered_in_the_pieces_of_fsdp(name: str) -> None:
    """A block, or all that is in none: received in one piece, then cut into its parameters."""
    pieces: dict[str, int] = {}
    for parameter, shape in parameter_shapes(size(name), "lm").items():
        block = re.sub(r"(layers\.\d+)?.*", r"\1", parameter.removeprefix("model."))
        pieces[block] = pieces.get(block, 0) + torch.Size(shape).numel()
    assert len(pieces) == size(name).n_layers + 1
    setting = Setting(size(name), 64, "bf16")
    found = memory.gathering(setting, 8)
    assert found["gathered"] == 2 * 2 * max(pieces.values())
    assert found["sampling model"] == memory.sampling(setting, 8, 1, 1, 1e9)["sampling model"]
    _, alone = plan.stage_of(f"{name}/ppo.toml")
    alone.dtype, alone.sampling_tp = "fp32", 1
    assert "gather" in phases.ppo(alone, size(name), 2)
    assert "gather" not in phases.ppo(alone, size(name), 1)


@pytest.mark.parametrize(
    ("recipe", "gpus", "fits"),
    [
        ("7b/pretrain.toml", 8, True),
        ("7b/pretrain.toml", 1, False),
        ("70b/pretrain.toml", 1024, True),
        ("70b/pretrain.toml", 8, False),
        ("7b/ppo.toml", 16, True),
        ("13b/ppo.toml", 16, True),
        ("70b/ppo.toml", 64, True),
        ("70b/ppo.toml", 32, False),
    ],
)
def test_shipped_recipes(recipe: str, gpus: int, fits: bool) -> None:
    config = plan.PlanConfig(recipe=recipe, gpus=gpus)
    if fits:
        assert plan.run(config)
    else:
        with pytest.raises(plan.DoesNotFit, match=r"does not run: it needs .* GB of a rank"):
            plan.run(config)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("tp = 2", "{} --parallel.tp 2"),
        (
            "tp = 8\noffload = true\nreplicate = 2",
            "--parallel.tp=8 --recipe={} --parallel.offload --parallel.replicate 2",
        ),
        ('checkpointing = "none"', "--recipe {} --parallel.checkpointing none"),
        ("", "{}"),
    ],
)
def test_flags_plan_what_a_recipe_with_their_values_does(
    table: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "ppo.toml"
    own.write_text(f'base = "70b/ppo.toml"\n[parallel]\n{table}\n')

    def planned(words: str, recipe: str) -> str:
        """What is said under the title, which names the recipe."""
        argv = [word.format(recipe) for word in f"{words} --gpus 64 --model 70b".split()]
        status = command("puna plan", plan.PlanConfig, plan.run, argv)
        assert status == ("checkpointing" in table)  # that does not fit
        said = capsys.readouterr()
        return (said.out[said.out.index("┏") :] + said.err).replace(recipe, "")

    found = planned(words, "70b/ppo.toml")
    assert found == planned("{}", str(own))
    if table:
        with_flags = plan.PlanConfig(recipe=str(own)).parallel
        assert with_flags != plan.PlanConfig(recipe="70b/ppo.toml").parallel


def test_copies_of_a_model_hold_it_so_often() -> None:
    _, settings = plan.stage_of("7b/pretrain.toml")
    one = phases.training(settings, size("7b"), 8)["train"]
    copies = dataclasses.replace(settings, parallel=Parallel(replicate=4))
    four = phases.training(copies, size("7b"), 32)["train"]
    assert four == {**one, "activations": four["activations"]}
    assert plan.cannot("pretrain", copies, size("7b"), 2) == (
        "replicate = 4 divides not all of 2 ranks"
    )


def test_the_change_that_is_offered_fits_and_no_smaller_one_does() -> None:
    stage, settings = plan.stage_of("70b/ppo.toml")
    shape, device = size("70b"), DEVICES["a100-80"]
    offloaded = "[parallel] offload = true fits"
    assert plan.smallest_change(stage, settings, shape, 32, device) == offloaded
    assert plan.smallest_change(stage, settings, shape, 8, device) == "64 GPUs fit"
    settings.sampling_tp = 1
    offered = phases.smaller(settings)
    change = plan.smallest_change(stage, settings, shape, 64, device)
    fitting_ones = [
        f"{changed} fits"
        for changed, other in offered
        if memory.total(phases.ppo(other, shape, 64)["sample"]) <= usable(device)
    ]
    assert change == fitting_ones[0] == "sampling_tp = 8 fits"


@pytest.mark.parametrize(
    ("recipe", "gpus", "message"),
    [
        ("70b/ppo.toml", 128, "64 cannot be shared equally by 128 ranks; [parallel] tp = 2 fits"),
        (
            "70b/ppo.toml",
            1024,
            "512 cannot be shared equally by 1,024 ranks; 512 GPUs with [parallel] tp = 8 fit",
        ),
        (
            "70b/pretrain.toml",
            2048,
            "1024 cannot be shared equally by 2,048 ranks; [parallel] tp =",
        ),
        ("70b/ppo.toml", 4, "sampling_tp = 8 divides not all of 4 ranks"),
    ],
)
def test_what_cannot_be_shared_out(recipe: str, gpus: int, message: str) -> None:
    with pytest.raises(plan.DoesNotFit, match=re.escape(message)):
        plan.run(plan.PlanConfig(recipe=recipe, gpus=gpus))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"recipe": "7b/rlhf.toml"}, "a loop is planned stage by stage"),
        ({"recipe": "ppo.toml"}, "does not say of which model; give --model 7b"),
        (
            {"recipe": "ppo.toml", "model": "7c"},
            r"^7c is neither a size .*7b, .* nor a model.s folder",
        ),
        ({"recipe": "9b/ppo.toml"}, "no recipe '9b/ppo.toml'"),
    ],
)
def test_questions_without_an_answer(config: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.run(plan.PlanConfig(**config))


def test_a_trainer_refuses_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"total_memory": 24e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(fitting.loop, "device_of", lambda config: torch.device("cuda"))
    _, settings = plan.stage_of("7b/sft.toml")
    with pytest.raises(plan.DoesNotFit, match=r"are 20.9; 8 GPUs with .* fit \(--no-plan tries"):
        fitting.check("sft", settings, size("7b"))
    settings.plan = False
    fitting.check("sft", settings, size("7b"))
    fitting.check("sft", dataclasses.replace(settings, plan=True), size("15m"))
    monkeypatch.setattr(fitting.loop, "device_of", lambda config: torch.device("cpu"))
    fitting.check("sft", dataclasses.replace(settings, plan=True), size("7b"))


def test_a_rank_copies_its_part_of_a_checkpoint() -> None:
    """How much a rank really writes: tests/test_saving.py."""
    shape = size("70b")
    moments = 8 * memory.parameters(shape)
    assert phases.host("sft", shape, 1) == moments
    assert phases.host("sft", shape, 64) == pytest.approx(1.5 * moments / 64)
    assert phases.host("ppo", shape, 64) == pytest.approx(3 * moments / 64)


def test_the_table_of_gpus_is_what_the_plan_says() -> None:
    """docs/scale.md: the fewest GPUs of 80 GB for each recipe."""
    text = (ROOT / "docs" / "scale.md").read_text()
    for stage in ("pretrain", "sft", "reward_helpfulness", "rejection", "gatt", "distill", "ppo"):
        (row,) = re.findall(rf"^\| `{stage}.toml` \| (.*) \|$", text, re.M)
        assert row.split(" | ") == [str(plan.fewest(f"{name}/{stage}.toml")) for name in SIZES]


def test_the_table_of_70b_is_what_the_plan_says() -> None:
    """docs/scale.md: GB of a rank, and the least `tp` that runs."""
    text = (ROOT / "docs" / "scale.md").read_text()
    (table,) = re.findall(r"\| GPUs \|.*\n\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    for row in table.splitlines():
        gpus, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for stage, cell in zip(("pretrain", "ppo"), cells, strict=True):
            assert cell == least_tp(f"70b/{stage}.toml", int(gpus.replace(",", "")))


def least_tp(recipe: str, gpus: int) -> str:
    found = least(recipe, gpus)
    if found is None:
        return "no"
    tp, need = found
    return f"tp = {tp}: " * (tp > 1) + plan.gb(need.most[1])


def least(recipe: str, gpus: int) -> tuple[int, plan.Need] | None:
    """The least `tp` with which it runs on so many GPUs of 80 GB, and what it needs then."""
    stage, settings = plan.stage_of(recipe)
    for tp in (1, 2, 4, 8):
        settings.parallel.tp = tp
        need = plan.need_of(stage, settings, size(recipe.split("/")[0]), gpus)
        if plan.refusal(need, DEVICES["a100-80"]) is None:
            return tp, need
    return None


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_clusters_is_what_the_plan_says(name: str) -> None:
    """docs/scale.md: every recipe on 64 to 2,048 GPUs."""
    text = (ROOT / "docs" / "scale.md").read_text()
    (head, body) = re.findall(r"(\| GPUs \| 64 .*)\n\|[-|]+\n((?:\|.*\n)+)", text)[0]
    counts = [int(cell.replace(",", "")) for cell in head.strip("|").split("|")[1:]]
    told = set()
    for row in body.splitlines():
        first, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for recipe in re.findall(r"`(\w+\.toml)`", first):
            told.add(recipe)
            for count, cell in zip(counts, cells, strict=True):
                found = least(f"{name}/{recipe}", count)
                assert cell == ("no" if found is None else str(found[0])), (recipe, count)
    assert told == {f"{stage}.toml" for stage in STAGES if stage != "rlhf"}


def test_moments_on_the_host_are_not_on_the_gpu() -> None:
    _, settings = plan.stage_of("70b/ppo.toml")
    shape, moments = size("70b"), 2 * 8 * memory.parameters(size("70b")) / 64
    before = phases.ppo(settings, shape, 64)
    settings.parallel.offload = True
    after = phases.ppo(settings, shape, 64)
    for phase in ("sample", "score", "policy"):
        freed = memory.total(before[phase]) - memory.total(after[phase])
        assert freed == pytest.approx(moments, rel=0.01)
    assert after["step"]["moments"] == pytest.approx(moments / 2)  # one network's at a time
    kept = phases.host("ppo", shape, 64, True) - phases.host("ppo", shape, 64)
    assert kept == pytest.approx(moments)


def test_blocks_that_are_computed_again_keep_little() -> None:
    shape = size("70b")
    none, some, full = (
        memory.activations(Setting(shape, 64, "bf16", each), 1)
        for each in ("none", "selective", "full")
    )
    assert some == pytest.approx((none + full) / 2, rel=0.05)
    assert memory.activations(Setting(shape, 64, "bf16", "none", 8), 1) < none / 3


def test_parts_of_a_shared_model_are_as_large_as_planned() -> None:
    shape, tp = size("70b"), 8
    held = 0
    for name, whole in parameter_shapes(shape, "lm").items():
        held += part(name, torch.empty(whole, device="meta"), Group(None, tp, 0)).numel()
    setting = Setting(shape, 64, "bf16")
    planned = memory.sampling(setting, tp, 1, 1, 1e9)["sampling model"]
    assert planned == pytest.approx(2 * held, rel=0.01)
