"""A share of each reward model's comparisons is the other one's.

Run: python -m pytest tests/test_rlhf_mix.py -q
"""

from dataclasses import replace
from pathlib import Path

import pytest
from test_rlhf import ANNOTATORS, configured

from puna.core.text.tokenizer import Tokenizer
from puna.trainers import reward, rlhf
from puna.trainers.rlhf import RLHFConfig
from puna.trainers.train.recipes import read_toml


@pytest.mark.parametrize("go_on", [False, True])
def test_a_share_is_drawn_from_the_other_kinds_comparisons(tiny, tmp_path, go_on):
    given = {"safety": {"safety_weight": 0.5, "mix_share": 0.25}, "ppo_versions": 0}
    config = configured(tiny, tmp_path / "out", go_on=go_on, **given)
    rlhf.run(config, ANNOTATORS)
    for number in (1, 2):
        folder = config.out / f"round-{number}"
        said = read_toml(folder / "safety" / "config.toml")
        rounds = [number] if go_on else range(1, number + 1)
        others = [str(config.out / f"round-{n}" / "helpfulness.jsonl") for n in rounds]
        assert said["mix"] == others and said["mix_share"] == 0.25
        assert read_toml(folder / "helpfulness" / "config.toml")["mix"] == []
    last = rlhf.Version(1, config.model, judges_of(config, 1), tmp_path, (), config.model)
    asked = rlhf.reward_config(config, 2, "safety", config.model, last)
    tokenizer = Tokenizer(tiny / "chat" / "tokenizer.model")
    both, _ = reward.load_pairs(asked, tokenizer, 96)
    own, _ = reward.load_pairs(replace(asked, mix=[]), tokenizer, 96)
    assert len(both) == len(own) + round(len(own) / 3)


def judges_of(config: RLHFConfig, number: int) -> dict[str, Path]:
    kinds = ("helpfulness", "safety")
    return {kind: config.out / f"round-{number}" / kind / "model" for kind in kinds}


def test_a_mix_of_ones_own_comes_first(tiny, tmp_path):
    table = {"safety_weight": 0.5, "mix_share": 0.25, "mix": [str(tiny / "preferences.jsonl")]}
    config = configured(tiny, tmp_path / "out", safety=table)
    found = rlhf.reward_config(config, 1, "safety", tiny / "chat", None)
    assert found.mix == [tiny / "preferences.jsonl"]
