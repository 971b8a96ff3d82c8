"""No number that cannot be gets past the moment when a configuration is made, and what a range
allows at its edges runs. Run: python -m pytest tests/test_ranges.py -q"""

import importlib
import math
import subprocess
import sys
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import Mock

import pytest

from puna.cli import chat, generate
from puna.cli.main import VERBS, main
from puna.trainers import evaluate, gatt, ppo, pretrain, rejection, reward, rlhf, sft
from puna.trainers.train.config import from_values, parse
from puna.trainers.train.ranges import Above, AtLeast, AtMost, Options, numbers_in, ranges_of

NUMBERS = (0, -1, -(10**30), 2**31, 2**63, 10**30)
FLOATS = (0.0, -1.0, 1e300, -1e300, 1e-40, math.nan, math.inf, -math.inf)


def config_of(verb: str) -> Any:
    return getattr(importlib.import_module(VERBS[verb].module), VERBS[verb].config)


def numeric(cls: type) -> dict[str, type]:
    """The numeric fields of a configuration: name -> int or float, lists' elements included."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        for kind in (int, float):
            if kind in (hint, *typing.get_args(hint)):
                found[name] = kind
    return found


# Options without which there is nothing to do, though another could stand in their place.
NEEDED: dict[str, dict[str, Any]] = {
    "PretrainConfig": {"tokenizer": Path("absent")},
    "GenerateConfig": {"prompt": "absent"},
}


def required(cls: Any) -> dict[str, Any]:
    """Values for the fields that have no default: files that are not there."""
    hints, given = typing.get_type_hints(cls), {}
    for each in fields(cls):
        if each.default is MISSING and each.default_factory is MISSING:
            is_list = typing.get_origin(hints[each.name]) in (list, tuple)
            absent = "absent" if hints[each.name] is str else Path("absent")
            given[each.name] = [absent] if is_list else absent
    return given | NEEDED.get(cls.__name__, {})


def flags(cls: Any) -> list[str]:
    """The same on the command line."""
    return [word for name in required(cls) for word in (f"--{name.replace('_', '-')}", "absent")]


OPTIONS = [(verb, name) for verb in VERBS for name in numeric(config_of(verb))]


def test_there_are_numbers_to_look_at():
    assert len(OPTIONS) > 150 and {verb for verb, _ in OPTIONS} >= set(VERBS) - {
        "tokenizer encode", "tokenizer inspect", "annotate import", "bench compare", "bench report",
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_configuration_is_checked_and_every_number_has_a_range(verb):
    cls = config_of(verb)
    assert issubclass(cls, Options)
    assert [name for name in numeric(cls) if not ranges_of(cls).get(name)] == []


@pytest.mark.parametrize(("verb", "name"), OPTIONS)
def test_a_number_is_in_its_range_or_one_sentence(verb, name):
    cls = config_of(verb)
    kind = numeric(cls)[name]
    is_list = typing.get_origin(typing.get_type_hints(cls)[name]) is list
    refused = 0
    for value in NUMBERS if kind is int else FLOATS:
        try:
            cls(**required(cls), **{name: [1.0, value] if is_list else value})
        except ValueError as error:
            refused += 1
            said = str(error)
            assert said.startswith((f"{name} is {value}; it ", "batch 1 is", "patience needs"))
            assert "\n" not in said
        else:
            assert math.isfinite(value) and all(r.holds(value) for r in ranges_of(cls)[name])
            assert abs(value) < 2**31 or name == "seed"
    assert refused >= 4


@pytest.mark.parametrize(("verb", "name"), OPTIONS)
def test_the_command_line_refuses_it_before_anything_is_read(verb, name, capsys):
    cls = config_of(verb)
    value = "1" + "0" * 30 if numeric(cls)[name] is int else "nan"
    arguments = [*verb.split(), *flags(cls), f"--{name.replace('_', '-')}", value]
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"puna {verb}: {name} is {value}; it must be ")
    assert shown.count("\n") == 1 and "absent" not in shown


TRAINERS = ["pretrain", "sft", "reward", "rejection", "ppo", "gatt", "distill", "rlhf"]
HOLES = {
    "rejection": "--batch 0|--chunk 0|--samples 0|--epochs 0|--max-new-tokens 0|--temperature inf|"
    "--temperature 1e-40|--seed -1|--micro-batch 0|--micro-batch-tokens 0|--generation-batch -1",
    "ppo": "--batch 0|--minibatch 0|--iterations 0|--eval-every 0|--save-every 0|--keep -1|"
    "--clip -1|--lam 5|--gamma 7|--beta -5|--ratio-clip nan|--max-kl nan|--max-new-tokens 0|"
    "--value-clip 0|--critic-lr 0|--temperature 0|--eval-count 0|--beta1 1",
    "gatt": "--samples 0|--targets 0|--window -1|--shorten 2|--batch 0|--max-new-tokens 0",
    "distill": "--chunk 0|--epochs 0|--max-new-tokens 0|--temperature 0|--row-tokens -1",
    "reward": "--safety-weight nan|--center-weight -1|--eval-share 1|--batch 0|--mix-share 1|"
    "--eval-per-batch -1",
    "sft": "--mix-share -0.1|--batch 0|--epochs 0|--eval-share -0.1|--lr 0|--row-tokens -1|"
    "--warmup-steps -1",
    "pretrain": "--steps -1|--context -1|--min-lr 1.5|--weight-decay inf|--eps 0",
    "rlhf": "--versions 0|--ppo-versions -1|--temperatures 0.8 nan|--helpfulness-pairs 0|"
    "--round-prompts -1",
    "generate": "--seed 18446744073709551616|--seed -1|--temperature inf|--temperature 1e-40|"
    "--top-p 1.5|--top-p nan|--top-p 0|--top-k -1|--max-new-tokens 0",
    "chat": "--seed -1|--temperature -1|--top-p 0",
    "convert": "--context 0",
    "evaluate": "--micro-batch 0",
    "tokenizer train": "--vocab-size 5|--character-coverage 0.5",
    "bench": "--rounds -1|--threads -1",
    "demo": "--scale 0|--seed -1",
}


@pytest.mark.parametrize(
    ("verb", "words"), [(verb, words) for verb in HOLES for words in HOLES[verb].split("|")]
)
def test_what_once_got_through(verb, words, capsys):
    assert main([*verb.split(), *flags(config_of(verb)), *words.split()]) == 1
    shown = capsys.readouterr().err
    option, value = words.split()[0][2:].replace("-", "_"), words.split()[-1]
    assert shown.startswith(f"puna {verb}: {option} is ") and shown.count("\n") == 1, value


@pytest.mark.parametrize("verb", TRAINERS)
def test_a_recipe_is_held_to_the_same_ranges(verb, tmp_path, capsys):
    (tmp_path / "r.toml").write_text("seed = -1\n")
    cls = config_of(verb)
    assert main([verb, str(tmp_path / "r.toml"), *flags(cls), "--seed", "1"]) == 1
    assert capsys.readouterr().err == (
        f"puna {verb}: {tmp_path}/r.toml: seed is -1; it cannot be negative\n"
    )


@pytest.mark.parametrize("stage", TRAINERS)
def test_a_stage_run_as_a_module_ends_a_mistake_in_the_same_sentence(stage, monkeypatch, capsys):
    wrong = [*flags(config_of(stage)), "--seed", "-1"]
    said = f"python -m puna.trainers.{stage}: seed is -1; it cannot be negative\n"
    monkeypatch.setattr(sys, "argv", [stage, *wrong])
    assert importlib.import_module(f"puna.trainers.{stage}").main() == 1
    assert capsys.readouterr().err == said
    if stage == "ppo":
        command = [sys.executable, "-m", f"puna.trainers.{stage}", *wrong]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (1, said)


def test_tables_of_the_loop_are_held_to_their_stages_ranges():
    with pytest.raises(ValueError, match=r"^\[ppo\] gamma is 7.0; it must be at most 1$"):
        from_values(ppo.PPOConfig, {"gamma": 7}, "ppo.")
    given = required(rlhf.RLHFConfig) | {"rejection": {"chunk": 0}}
    with pytest.raises(ValueError, match=r"\[rejection\] chunk is 0; it must be at least 1"):
        rlhf.run(rlhf.RLHFConfig(**given))


def test_the_loops_early_stopping_needs_prompts_to_look_at(capsys):
    absent = flags(rlhf.RLHFConfig)
    assert main(["rlhf", "7b/rlhf.toml", *absent]) == 1
    assert capsys.readouterr().err == (
        "puna rlhf: patience in [ppo] needs eval_prompts to look at; name some or set it to 0\n"
    )
    given = ["--eval-prompts", "held"]
    config = parse(rlhf.RLHFConfig, ["7b/rlhf.toml", *absent, *given], "puna rlhf")
    assert config.eval_prompts == [Path("held")] and config.ppo["patience"] == 5
    assert parse(rlhf.RLHFConfig, ["7b/rlhf.toml", *absent, "--ppo-versions", "0"], "puna rlhf")


@dataclass(kw_only=True)
class Inner(Options):
    share: Annotated[float, AtLeast(0), AtMost(1)] = 0.5


@dataclass(kw_only=True)
class Base(Options):
    count: Annotated[int, AtLeast(1)] = 3
    rate: Annotated[float | None, Above(0)] = None
    rates: list[Annotated[float, Above(0)]] = field(default_factory=list)
    pair: Annotated[tuple[float, ...], Above(0)] = ()
    choice: Annotated[int, AtLeast(1)] | None = None
    inner: Inner = field(default_factory=Inner)
    seen: str = ""


@dataclass(kw_only=True)
class Derived(Base):
    count: int = 5  # keeps the range
    rate: Annotated[float | None, AtLeast(2)] = None  # states another

    def check(self) -> None:
        if self.seen == "never":
            raise ValueError(f"count {self.count} was never seen; see it")


def test_a_field_declared_anew_keeps_its_range_unless_it_states_another():
    for options, said in (
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"rate": 1.0}, "rate is 1.0; it must be at least 2"),
        ({"rates": [1.0, -1.0]}, "rates is -1.0; it must be above 0"),
        ({"pair": (1.0, -1.0)}, "pair is -1.0; it must be above 0"),
        ({"choice": 0}, "choice is 0; it must be at least 1"),
        ({"seen": "never"}, "count 5 was never seen; see it"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$"):
            Derived(**options)
    assert Base(rate=1.0).rate == 1.0
    assert numbers_in([True, "1", 2, 3.0]) == [2, 3.0]


def test_a_flag_may_mend_what_the_options_of_a_recipe_do_together(tmp_path):
    (tmp_path / "r.toml").write_text('seen = "never"\n')
    recipe = str(tmp_path / "r.toml")
    assert parse(Derived, [recipe, "--seen", "now"], "p").seen == "now"
    with pytest.raises(ValueError, match="never seen"):
        parse(Derived, [recipe], "p")
    with pytest.raises(ValueError, match="share is 2.0; it must be at most 1"):
        parse(Derived, ["--inner.share", "2"], "p")


# What the ranges allow at their edges, run: several options at a time, low ones and high ones.
LOW = {
    "seed": 2**63 - 1, "batch": 1, "micro_batch": 2**20, "min_lr": 0.0, "beta1": 0.0, "beta2": 0.0,
    "eps": 1e-30, "clip": 5e-324, "weight_decay": 0.0, "save_every": 1, "eval_every": 1, "keep": 1,
}  # fmt: skip
HIGH = {
    "seed": 0, "batch": 8, "micro_batch": 1, "min_lr": 1.0, "beta1": 0.999, "beta2": 0.99999,
    "eps": 1.0, "clip": 2.0**30, "lr": 1e-3, "warmup_steps": 2**31 - 1, "save_every": 2**31 - 1,
    "eval_every": 2**31 - 1, "keep": 2**31 - 1,
}  # fmt: skip
UNHELD_LOW, UNHELD_HIGH = (
    {name: value for name, value in each.items() if name != "eval_every"} for each in (LOW, HIGH)
)
SAMPLED_LOW = {"max_new_tokens": 1, "temperature": 0.01, "generation_batch": 1}
SAMPLED_HIGH = {"max_new_tokens": 9, "temperature": 1000.0, "generation_batch": 2**20}
PPO_LOW = {
    "iterations": 1, "batch": 1, "minibatch": 1, "beta": 0.0, "ratio_clip": 5e-324, "gamma": 0.0,
    "critic_lr": 5e-324, "value_clip": 5e-324, "lam": 0.0, "unfinished_penalty": 0.0,
    "max_kl": 5e-324, "micro_batch_tokens": 1, "eval_count": 1, "ratio_tolerance": 1e-2,
}  # fmt: skip
PPO_HIGH = {
    "iterations": 2, "batch": 8, "minibatch": 8, "beta": 100.0, "ratio_clip": 2.0**31 - 1,
    "gamma": 1.0, "critic_lr": 1e-3, "value_clip": 2.0**31 - 1, "lam": 1.0,
    "unfinished_penalty": 2.0**31 - 1, "critic_warmup": 1, "max_kl": 2.0**31 - 1,
    "micro_batch_tokens": 2**31 - 1, "eval_count": 2**31 - 1, "patience": 2**31 - 1,
}  # fmt: skip


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def finished(folder: Path) -> bool:
    return (folder / "config.json").exists()


@pytest.fixture
def files(tiny):
    judged = {
        "policy": tiny / "chat",
        "helpfulness": tiny / "helpfulness",
        "safety": tiny / "safety",
        "prompts": [tiny / "prompts.jsonl"],
    }
    return {
        "text": {"data": [tiny / "text.jsonl"], "tokenizer": tiny / "tokenizer.model"},
        "sft": {"model": tiny / "lm", "data": [tiny / "dialogues.jsonl"]},
        "reward": {"model": tiny / "lm", "data": [tiny / "preferences.jsonl"]},
        "gatt": {"model": tiny / "chat", "dialogues": [tiny / "ghosts.jsonl"]},
        "judged": judged,
    }


@pytest.mark.parametrize(
    "options",
    [
        LOW | {"steps": 1, "context": 16, "row_tokens": 1, "eval_share": 0.0},
        HIGH | {"steps": 2, "context": 64, "row_tokens": 64, "eval_share": 0.5},
    ],
)
def test_pretraining_at_the_edges(files, tmp_path, options):
    given = files["text"] | {"out": tmp_path, "device": "cpu"} | options
    assert finished(pretrain.run(pretrain.PretrainConfig(**given)))


@pytest.mark.parametrize(
    "options",
    [LOW | {"epochs": 1, "eval_share": 5e-324}, HIGH | {"epochs": 3, "eval_share": 0.9}],
)
def test_fine_tuning_at_the_edges(files, tmp_path, options):
    given = files["sft"] | {"out": tmp_path, "device": "cpu"} | options
    assert finished(sft.run(sft.SFTConfig(**given)))


@pytest.mark.parametrize(
    "options",
    [
        LOW | {"epochs": 1, "eval_share": 0.0, "safety_weight": 0.0},
        HIGH | {"epochs": 2, "batch": 2**20, "safety_weight": 1e3, "center_weight": 1e3},
    ],
)
def test_reward_models_at_the_edges(files, tmp_path, options, tiny):
    given = files["reward"] | {"out": tmp_path, "device": "cpu"} | options
    final = reward.run(reward.RewardConfig(**given))
    data = [tiny / "preferences.jsonl"]
    for size in (1, 2**20):
        config = evaluate.EvaluateConfig(model=final, data=data, micro_batch=size, device="cpu")
        assert evaluate.run(config)["sets"]


@pytest.mark.parametrize(
    "options",
    [
        UNHELD_LOW | SAMPLED_LOW
        | {"samples": 1, "chunk": 1, "round": 1, "epochs": 1, "batch": 8, "micro_batch_tokens": 1,
           "max_new_tokens": 12},
        UNHELD_HIGH | SAMPLED_HIGH
        | {"samples": 8, "chunk": 2**20, "round": 2**31 - 1, "epochs": 1,
           "micro_batch_tokens": 2**31 - 1, "max_new_tokens": 40},
    ],
)  # fmt: skip
def test_rejection_sampling_at_the_edges(files, tmp_path, options):
    given = files["judged"] | {"out": tmp_path, "device": "cpu"} | options
    assert finished(rejection.run(rejection.RejectionConfig(**given)))


@pytest.mark.parametrize(
    "options", [without(LOW, "micro_batch") | SAMPLED_LOW | PPO_LOW,
                without(HIGH, "micro_batch") | SAMPLED_HIGH | PPO_HIGH],
)  # fmt: skip
def test_ppo_at_the_edges(files, tmp_path, options):
    held = {"eval_prompts": files["judged"]["prompts"]}
    given = files["judged"] | held | {"out": tmp_path, "device": "cpu"} | options
    assert finished(ppo.run(ppo.PPOConfig(**given)))


@pytest.mark.parametrize(
    "options",
    [
        UNHELD_LOW | SAMPLED_LOW
        | {"samples": 1, "targets": 1, "window": 1, "shorten": 0.0, "batch": 8,
           "max_new_tokens": 12},
        UNHELD_HIGH | SAMPLED_HIGH
        | {"samples": 8, "targets": 2**31 - 1, "window": 2**31 - 1, "shorten": 1.0, "epochs": 2,
           "max_new_tokens": 40},
    ],
)  # fmt: skip
def test_ghost_attention_at_the_edges(files, tmp_path, options):
    given = files["gatt"] | {"out": tmp_path, "device": "cpu"} | options
    assert finished(gatt.run(gatt.GAttConfig(**given)))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "top_p": 5e-324, "max_new_tokens": 1, "seed": 0},
        {"temperature": 0.01, "top_p": 5e-324, "max_new_tokens": 3, "seed": 2**63 - 1},
        {"temperature": 1000.0, "top_p": 1.0, "max_new_tokens": 2**31 - 1, "seed": 1},
    ],
)
def test_generation_at_the_edges(tiny, monkeypatch, capsys, options):
    for top_k in (0, 1, 2**31 - 1):
        config = generate.GenerateConfig(model=tiny / "chat", prompt="red", top_k=top_k, **options)
        assert isinstance(generate.run(config), str)
    monkeypatch.setattr("builtins.input", Mock(side_effect=["red", EOFError]))
    chat.run(chat.ChatConfig(model=tiny / "chat", **options))
