"""What can be mended in a loop that waits: files by hand, prompts, models that collapsed.

Run: python -m pytest tests/test_rlhf_mended.py -q
"""

import json
from dataclasses import replace

import pytest
import torch
from test_rlhf import ANNOTATORS, configured

from puna.core.checkpoint.folder import load_model, save_model
from puna.trainers import rlhf
from puna.trainers.rlhf import Waiting

V1 = {"versions": 1, "ppo_versions": 0}


def by_hand(folder, kind, **changed):
    """The file that a person would write beside the pairs."""
    lines = (folder / f"{kind}-pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    said = [
        {"messages": row["messages"], "chosen": row["a"], "rejected": row["b"],
         "rating": "better", "safety": "both_safe"} | changed
        for row in rows
    ]  # fmt: skip
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))


@pytest.mark.parametrize(
    "wrong", [{"chosen": "red", "rejected": "red"}, {"chosen": ""}, {"safety": None}]
)
def test_a_file_by_hand_is_mended_where_it_stands(tiny, tmp_path, wrong):
    config = configured(tiny, tmp_path / "out", **V1)
    folder = config.out / "round-1"
    with pytest.raises(Waiting):
        rlhf.run(config)
    by_hand(folder, "helpfulness")
    by_hand(folder, "safety", **wrong)
    with pytest.raises(ValueError, match="safety"):
        rlhf.run(config)
    by_hand(folder, "safety")
    rlhf.run(replace(config, amend="safety" in wrong))
    by_hand(folder, "safety", rating="slightly_better")
    with pytest.raises(ValueError, match="safety.jsonl is not what the run has learned from"):
        rlhf.run(config)


def test_a_file_that_was_removed_may_be_written_again(tiny, tmp_path):
    config = configured(tiny, tmp_path / "out", **V1)
    folder = config.out / "round-1"
    rlhf.run(config, ANNOTATORS)
    (folder / "helpfulness.jsonl").unlink()
    with pytest.raises(Waiting, match="^helpfulness-pairs.jsonl in"):
        rlhf.run(config)
    by_hand(folder, "helpfulness")
    rlhf.run(config)


@pytest.mark.parametrize("token", [2, 300], ids=["nothing", "one piece"])
def test_a_model_that_says_one_thing_is_named(tiny, tmp_path, token):
    model = load_model(tiny / "chat")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 9.0
    save_model(tmp_path / "one", model, tiny / "tokenizer.model")
    config = configured(tiny, tmp_path / "out", model=tmp_path / "one", **V1)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing to compare for helpfulness.*temperatures"):
            rlhf.run(config, ANNOTATORS)
    assert not list(config.out.rglob("*-pairs.jsonl"))


@pytest.mark.parametrize(
    "name", ["prompts", "helpfulness_prompts", "safety_prompts", "eval_prompts"]
)
def test_prompts_without_room_are_named_before_anybody_compares(tiny, tmp_path, name):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "red blue cup " * 200}) + "\n")
    config = configured(tiny, tmp_path / "out", **{name: [long]})
    with pytest.raises(ValueError, match="no prompt to sample from: .*long.jsonl:1"):
        rlhf.run(config, ANNOTATORS)
    assert not (tmp_path / "out").exists()
