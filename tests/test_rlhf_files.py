"""Every file that the loop's recipe names is read before anything is trained: some are needed days
later. Run: python -m pytest tests/test_rlhf_files.py -q"""

import json
from dataclasses import fields, replace

import pytest
from test_rlhf import ANNOTATORS, configured

from puna.trainers import rlhf

NAMING_FILES = [
    (table, option.name)
    for table, (stage, taken) in rlhf.STAGES.items()
    for option in fields(stage)
    if "Path" in str(option.type) and option.name not in taken
]
OWN = ["prompts", "rejection_prompts", "ppo_prompts", "eval_prompts", "helpfulness_prompts"]
OWN += ["safety_prompts", "helpfulness_data", "safety_data", "gatt_dialogues"]


@pytest.fixture
def loop(tiny, tmp_path, monkeypatch):
    """Options of a loop with all its stages, none of which may begin."""
    instructions = tmp_path / "instructions.jsonl"
    instructions.write_text(json.dumps({"instruction": "be red", "short": "red"}))
    monkeypatch.setattr(rlhf, "play_round", lambda *_: pytest.fail("it was begun"))
    return configured(
        tiny,
        tmp_path / "loop",
        gatt_version=2,
        gatt_dialogues=[tiny / "prompts.jsonl"],
        gatt={"instructions": [str(instructions)]},
    )


def refuses(config, word: str) -> None:
    with pytest.raises((ValueError, OSError), match=word):
        rlhf.run(config, ANNOTATORS)


def test_they_are_all_known():
    paths = {option.name for option in fields(rlhf.RLHFConfig) if "Path" in str(option.type)}
    assert paths == {*OWN, "out", "model", "student", "annotations"}


@pytest.mark.parametrize("rows", ["absent", "broken"])
@pytest.mark.parametrize("name", [*OWN, "student"])
def test_of_the_loop(loop, tmp_path, name, rows):
    (tmp_path / "broken").write_text("{")
    path = tmp_path / rows
    refuses(replace(loop, **{name: path if name == "student" else [path]}), rows)


@pytest.mark.parametrize("rows", ["absent", "broken"])
@pytest.mark.parametrize(("table", "option"), NAMING_FILES)
def test_of_a_stage(loop, tmp_path, table, option, rows):
    (tmp_path / "broken").write_text("{")
    if option == "eval_data":
        loop.reward.pop("eval_share")
    refuses(
        replace(loop, **{table: {**getattr(loop, table), option: [str(tmp_path / rows)]}}), rows
    )
