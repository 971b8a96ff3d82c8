"""Recipes that start from others. Run: python -m pytest tests/test_recipe_bases.py -q"""

from pathlib import Path

import pytest

from puna.trainers.ppo import PPOConfig
from puna.trainers.rejection import RejectionConfig
from puna.trainers.sft import SFTConfig
from puna.trainers.train.config import check_keys, check_table, load_recipe, parse, to_toml
from puna.trainers.train.recipes import find_recipe, known_recipes, read_recipe


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_own_values_win_and_tables_are_joined(tmp_path):
    write(
        tmp_path,
        low="a = 1\nb = 1\n[t]\nx = 1\ny = 1\n[t.deep]\nz = 1",
        middle='base = "low"\nb = 2\n[t]\ny = 2\n[t.deep]\nw = 2',
        high='base = "middle.toml"\nc = 3\n[t]\nx = 3\n[u]\nbase = "other.toml"\nq = 3',
        other="p = 4\nq = 4",
    )
    assert read_recipe(tmp_path / "high.toml") == {
        "a": 1, "b": 2, "c": 3, "t": {"x": 3, "y": 2, "deep": {"z": 1, "w": 2}},
        "u": {"p": 4, "q": 3},
    }  # fmt: skip


def test_an_overlay_is_a_small_file_a_size_and_bases_keep_the_prefix(tmp_path, monkeypatch):
    write(
        tmp_path,
        one="x = 1\ny = 1",
        two='[inner]\nbase = "one.toml"\n',
        small="[one]\nx = 5",
        scalar='word = "no overlay"',
        stranger="[three]\nx = 5",
    )
    monkeypatch.chdir(tmp_path)
    assert read_recipe(find_recipe("small/one.toml")) == {"x": 5, "y": 1}
    assert read_recipe(find_recipe("small/two")) == {"inner": {"x": 5, "y": 1}}
    assert read_recipe(find_recipe("two")) == {"inner": {"x": 1, "y": 1}}
    for name in ("scalar/one.toml", "stranger/one.toml", "one/two.toml", "small/four.toml"):
        with pytest.raises(ValueError, match=f"no recipe '{name}': no such file, and Puna ships"):
            find_recipe(name)
    write(tmp_path, small__one="x = 7")  # a file comes before an overlay
    assert read_recipe(find_recipe("small/one.toml")) == {"x": 7}


def test_a_recipe_of_ones_own_starts_from_a_shipped_one(tmp_path):
    write(tmp_path, mine='base = "70b/sft"\nlr = 1e-6')
    flags = ["--model", "m", "--data", "d", "--out", "o"]
    config = parse(SFTConfig, [str(tmp_path / "mine.toml"), *flags], "p")
    assert (config.lr, config.row_tokens, config.parallel.checkpointing) == (1e-6, 4096, "full")
    assert "base" not in to_toml(config)  # what a run records stands for itself
    write(tmp_path, again=to_toml(config))
    assert parse(SFTConfig, [str(tmp_path / "again.toml")], "p") == config


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": 'base = "a.toml"'}, r"a.toml: its bases go in a circle \(a.toml -> a.toml\)"),
        (
            {"a": '[t]\nbase = "b.toml"', "b": 'base = "a.toml"'},
            r"b.toml: its bases go in a circle \(a.toml -> b.toml -> a.toml\); take one out",
        ),
        ({"a": 'base = "7b/stf.toml"'}, "a.toml: base: no recipe '7b/stf.toml': .*7b/sft.toml"),
        ({"a": "base = 7"}, "a.toml: base: no recipe '7': no such file"),
        ({"a": 'base = "b.toml"', "b": "lr ="}, "b.toml: not TOML"),
        ({"a": 'base = "b.toml"', "b": "stpes = 3"}, "a.toml: unknown key 'stpes'; did you mean"),
    ],
)
def test_what_cannot_be_a_base_is_one_sentence_with_the_file(tmp_path, files, said):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=said) as caught:
        load_recipe(SFTConfig, tmp_path / "a.toml")
    assert "\n" not in str(caught.value) or "not TOML" in said


def test_known_recipes_are_files_and_each_stage_at_each_size():
    known = known_recipes()
    assert len(known) == len(set(known)) and all(find_recipe(name) for name in known)
    assert {"demo/sft.toml", "sft.toml", "7b/sft.toml", "70b/rlhf.toml"} <= set(known)
    assert "7b.toml" not in known and "7b/7b.toml" not in known
    with pytest.raises(ValueError, match="Puna ships .*13b/reward_safety.toml"):
        find_recipe("13b/reward_saftey")


def test_keys_that_a_loop_sets_itself_are_refused_with_what_to_use():
    taken = {"student": "set rlhf's own `model`", "out": "it is a folder of rlhf's `out`"}
    check_keys(RejectionConfig, {"samples": 4}, "[rejection]", taken)
    with pytest.raises(ValueError) as caught:
        check_keys(RejectionConfig, {"samples": 4, "student": "m"}, "[rejection]", taken)
    assert str(caught.value) == "[rejection]: 'student' cannot be set here; set rlhf's own `model`"


def test_a_table_is_checked_as_the_whole_that_it_will_be():
    given = {"policy": "p", "helpfulness": "h", "safety": "s", "out": "o", "prompts": ["q"]}
    taken = {name: "rlhf gives it" for name in given}
    check_table(PPOConfig, {"batch": 8, "minibatch": 4}, "ppo", taken, given)
    for values, said in (
        ({"policy": "x"}, r"\[ppo\]: 'policy' cannot be set here; rlhf gives it"),
        ({"bacth": 8}, r"\[ppo\]: unknown key 'bacth'; did you mean batch"),
        ({"batch": "8"}, "'ppo.batch' is '8'; expected a whole number"),
        ({"batch": 0}, r"\[ppo\] batch is 0; it must be at least 1"),
        ({"batch": 9, "minibatch": 4}, r"\[ppo\] batch 9 is not a multiple of minibatch 4"),
        ({"patience": 5}, r"\[ppo\] patience needs eval_prompts"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            check_table(PPOConfig, values, "ppo", taken, given)
