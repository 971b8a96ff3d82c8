"""The README's scripts for the library, and that of docs/safety.md, run as they stand.
Run: python -m pytest tests/test_readme.py -q"""

import re
import shutil
from pathlib import Path

import pytest

from puna.core.llama import Llama

README = Path(__file__).resolve().parents[1] / "README.md"
SAFETY = README.parent / "docs" / "safety.md"


def scripts() -> list[str]:
    """The python blocks of the section "As a library"."""
    section = README.read_text(encoding="utf-8").split("\n## As a library\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """What the scripts find: models under runs/, prompts.jsonl; the current folder is theirs."""
    for name, model in (("chat", "chat"), ("helpful", "helpfulness"), ("base", "lm")):
        shutil.copytree(tiny / model, tmp_path / "runs" / name / "model")
    shutil.copy(tiny / "prompts.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_three_of_about_ten_lines():
    lengths = [len([line for line in each.splitlines() if line]) for each in scripts()]
    assert len(lengths) == 3 and max(lengths) <= 13


def test_load_and_chat(folder, capsys):
    exec(compile(scripts()[0], "<README>", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("said", [["", "red cup", "", "moon"], [""] * 4])
def test_answers_that_are_empty_are_passed_over(folder, said, capsys, monkeypatch):
    """A reward model has nothing to score of them, and says so."""
    monkeypatch.setattr(Llama, "generate", lambda *_, **__: said)
    exec(compile(scripts()[0], "<README>", "exec"), {})
    best = capsys.readouterr().out.splitlines()[-1]
    assert ("nothing was said" in best) == (not any(said)) and "''" not in best


def test_the_safety_of_models_with_more_and_more_data(folder, capsys, monkeypatch):
    (script,) = re.findall(r"^```python\n(.*?)^```$", SAFETY.read_text("utf-8"), re.M | re.S)
    shutil.copy(folder / "prompts.jsonl", folder / "adversarial.jsonl")
    (folder / "runs" / "helpful").rename(folder / "runs" / "safe")
    for part in ("0", "0.01", "0.1", "0.25", "0.5", "1"):
        shutil.copytree(folder / "runs" / "chat", folder / "runs" / f"safety-{part}")
    drawn = Llama.generate

    def first_is_empty(llama, prompts, **options):
        return ["", *drawn(llama, prompts, **options)[1:]]

    monkeypatch.setattr(Llama, "generate", first_is_empty)
    exec(compile(script, "<safety>", "exec"), {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["0", "0.01", "0.1", "0.25", "0.5", "1"]
    assert all(0 < int(row[3]) <= 15 for row in rows)  # of 16


def test_ppo_with_a_reward_of_ones_own(folder):
    names: dict = {}
    exec(compile(scripts()[1], "<README>", "exec"), names)
    assert (folder / "runs" / "brief" / "model" / "model.safetensors").exists()
    assert isinstance(names["brief_llama"].generate("red"), str)


def test_sft_with_rows_and_a_loss_of_ones_own(folder, capsys):
    exec(compile(scripts()[2], "<README>", "exec"), {})
    assert (folder / "runs" / "sums" / "inputs.json").exists()
    assert capsys.readouterr().out.strip()
