"""Run: python -m pytest tests/test_trainer_config.py -q"""

import importlib
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.cli.main import VERBS
from puna.trainers.data.formats import Columns
from puna.trainers.ppo import PPOConfig
from puna.trainers.reward import RewardConfig
from puna.trainers.rlhf import RLHFConfig
from puna.trainers.train.config import find_recipe, from_values, load_recipe, parse, to_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(kw_only=True)
class Example:
    """An example."""

    out: Path
    """where to"""
    data: list[Path] = field(default_factory=list)
    lr: float = 1.0
    steps: int = 3
    name: str = "x"
    fast: bool = False
    clip: float | None = 0.2
    teacher: Path | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    rates: tuple[float, ...] = (1.0,)
    columns: Columns = field(default_factory=Columns)
    ratings: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_flag_beats_the_recipe_and_the_recipe_beats_the_default(tmp_path):
    path = recipe(tmp_path, 'out = "a"\nlr = 2\nsteps = 5\ndata = ["p", "q"]')
    config = parse(Example, [path, "--steps", "7"], "puna example")
    assert (config.out, config.lr, config.steps, config.name) == (Path("a"), 2.0, 7, "x")
    assert type(config.lr) is float and config.data == [Path("p"), Path("q")]
    config = parse(Example, [path, "--data", "r", "s", "t", "--out", "b"], "puna example")
    assert config.data == [Path("r"), Path("s"), Path("t")] and config.out == Path("b")


def test_flags_alone_are_enough_and_a_missing_one_is_named(capsys):
    assert parse(Example, ["--out", "a"], "puna example") == Example(out=Path("a"))
    with pytest.raises(SystemExit):
        parse(Example, [], "puna example")
    assert "--out" in capsys.readouterr().err


def test_optional_fields_take_a_value_or_none_from_flags_and_recipes(tmp_path):
    path = recipe(tmp_path, 'out = "a"\nclip = "None"\nteacher = "t"')
    config = parse(Example, [path], "puna example")
    assert config.clip is None and config.teacher == Path("t")
    config = parse(Example, [path, "--clip", "0.5", "--teacher", "None"], "puna example")
    assert config.clip == 0.5 and config.teacher is None


def test_tables_fill_dataclasses_and_dicts(tmp_path):
    text = 'out = "a"\n[columns]\na = "completion_a"\n[ratings]\n"a-is-better" = "a better"'
    path = recipe(tmp_path, text)
    config = parse(Example, [path], "puna example")
    assert config.columns == Columns(a="completion_a")
    assert config.ratings == {"a-is-better": "a better"}
    config = parse(Example, [path, "--columns.b", "other"], "puna example")
    assert config.columns == Columns(a="completion_a", b="other")
    config = parse(Example, ["--out", "a", "--ratings", "yes", "safe", "no", "unsafe"], "p")
    assert config.ratings == {"yes": "safe", "no": "unsafe"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "unknown key 'learning_rate'; did you mean"),
        ("step = 1", "recipe.toml: unknown key 'step'; did you mean steps"),
        ('[columns]\nmesages = "m"', r"recipe.toml \[columns\]: unknown key 'mesages'.*messages"),
        ('lr = "fast"', "recipe.toml: 'lr' is 'fast'; expected a number"),
        ("steps = 1.5", "'steps' is 1.5; expected a whole number"),
        ("steps = true", "'steps' is True; expected a whole number"),
        ("lr = true", "'lr' is True; expected a number"),
        ("fast = 1", "'fast' is 1; expected true or false"),
        ('schedule = "linear"', "'linear'; expected 'cosine' or 'constant'"),
        ('data = "p"', "'data' is 'p'; expected a list, each of it a text"),
        ("data = [1]", "'data' is 1; expected a text"),
        ("clip = [1]", r"'clip' is \[1\]; expected a number or \"None\""),
        ('columns = "m"', "'columns' is 'm'; expected a table"),
        ("[columns]\ntext = 1", "'columns.text' is 1; expected a text"),
        ("[ratings]\nyes = true", "'ratings.yes' is True; expected a text"),
        ("lr = ", "recipe.toml: not TOML"),
        ("lr = 1\nlr = 2", "recipe.toml: not TOML"),
    ],
)
def test_what_a_recipe_cannot_say_is_one_sentence(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(Example, [recipe(tmp_path, text), "--out", "a"], "puna example")


def test_a_recipe_in_another_encoding_is_no_toml(tmp_path):
    (tmp_path / "r.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ValueError, match="r.toml:1: not UTF-8"):
        parse(Example, [str(tmp_path / "r.toml")], "puna example")


def test_shipped_recipes_are_found_with_and_without_ending():
    assert find_recipe("demo/sft.toml") == find_recipe("demo/sft")
    with pytest.raises(ValueError, match="no recipe 'demo/stf.toml': no such file.*demo/sft.toml"):
        find_recipe("demo/stf.toml")


def test_a_file_of_that_name_comes_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "sft.toml").touch()
    assert find_recipe("demo/sft.toml") == Path("demo/sft.toml")


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
number = st.floats(allow_nan=False)
value = st.one_of(text, number, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.lists(text))


@given(
    st.builds(
        Example,
        out=text.map(Path),
        data=st.lists(text.map(Path)),
        lr=number,
        steps=st.integers(-(2**63), 2**63 - 1),
        name=text,
        fast=st.booleans(),
        clip=st.none() | number,
        teacher=st.none() | text.filter(lambda t: t != "None").map(Path),
        schedule=st.sampled_from(["cosine", "constant"]),
        rates=st.lists(number).map(tuple),
        columns=st.builds(Columns, text=text, a=text),
        ratings=st.dictionaries(text, text),
        options=st.dictionaries(text, value | st.dictionaries(text, value)),
    )
)
def test_to_toml_is_a_recipe_that_gives_the_same_configuration(config):
    assert from_values(Example, tomllib.loads(to_toml(config))) == config


def test_to_toml_of_every_shipped_demo_recipe_is_stable():
    for name, cls in [("demo/rlhf.toml", RLHFConfig)]:
        values = load_recipe(cls, find_recipe(name))
        lists = ("prompts", "helpfulness_prompts", "safety_prompts")
        required = {"out": "o", "model": "m", **dict.fromkeys(lists, ["p"])}
        config = from_values(cls, {**values, **required})
        assert from_values(cls, tomllib.loads(to_toml(config))) == config
        assert config.ppo == values["ppo"]


def test_a_value_switched_off_stays_off_in_the_recorded_recipe():
    config = PPOConfig(
        policy=Path("p"), helpfulness=Path("h"), safety=Path("s"), prompts=[], out=Path("o"),
        value_clip=None,
    )  # fmt: skip
    assert from_values(PPOConfig, tomllib.loads(to_toml(config))).value_clip is None


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("bench", "demo")])
def test_help_shows_every_option_of_a_verb(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = getattr(importlib.import_module(VERBS[verb].module), VERBS[verb].config)
    with pytest.raises(SystemExit) as end:
        parse(config, ["--help"], f"puna {verb}")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f"puna {verb} [recipe.toml]" in shown
    tables = [f.name for f in fields(config) if f.type == dict[str, Any]]  # in recipes only
    for option in fields(config):
        if option.name in tables:
            continue
        assert "--" + option.name.replace("_", "-") in shown, option.name


def test_a_number_format_has_one_name_everywhere():
    """bf16, as recipes say it: `puna convert --dtype` once took PyTorch's long names alone."""
    said = set()
    for verb in VERBS.values():
        config = getattr(importlib.import_module(verb.module), verb.config)
        for hint in get_type_hints(config).values():
            if get_origin(hint) is Literal:
                said |= {value for value in get_args(hint) if re.search(r"float|bf|fp", str(value))}
    assert said == {"fp32", "bf16", "fp16"}


def test_help_names_the_papers_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(RewardConfig, ["--help"], "puna reward")
    shown = capsys.readouterr().out
    assert "paper: 512" in shown and "Table 27" in shown and "(default: 1e-05)" in shown
