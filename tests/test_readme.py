"""The README's scripts for the library run as they stand.
Run: python -m pytest tests/test_readme.py -q"""

import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


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


def test_ppo_with_a_reward_of_ones_own(folder):
    names: dict = {}
    exec(compile(scripts()[1], "<README>", "exec"), names)
    assert (folder / "runs" / "brief" / "model" / "model.safetensors").exists()
    assert isinstance(names["brief_llama"].generate("red"), str)


def test_sft_with_rows_and_a_loss_of_ones_own(folder, capsys):
    exec(compile(scripts()[2], "<README>", "exec"), {})
    assert (folder / "runs" / "sums" / "inputs.json").exists()
    assert capsys.readouterr().out.strip()
