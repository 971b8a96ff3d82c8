"""The [parallel] table: on the command line, in the loop's stages, in runs from before it."""

import dataclasses
from pathlib import Path

import pytest
from test_recipes import config_of

from puna.trainers import rlhf, sft
from puna.trainers.pretrain import PretrainConfig
from puna.trainers.sample import SampleConfig
from puna.trainers.sft import SFTConfig
from puna.trainers.train.claim import changes, plain
from puna.trainers.train.config import parse
from puna.trainers.train.layout import Parallel

GIVEN = ["--model", "m", "--data", "d", "--out", "o"]


def test_flags_are_the_tables() -> None:
    flags = ["--parallel.tp", "2", "--parallel.offload"]
    config = parse(SFTConfig, ["70b/sft.toml", *GIVEN, *flags], "sft")
    assert config.parallel == Parallel(tp=2, offload=True, checkpointing="full")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tp": 0}, "tp is 0; it must be at least 1"),
        ({"checkpointing": "some"}, "'checkpointing' is 'some'; expected 'none' or 'selective'"),
    ],
)
def test_what_no_layout_is(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Parallel(**values)


def test_what_cannot_be_is_said_before_anything_is_loaded(tiny: Path, tmp_path: Path) -> None:
    config = SFTConfig(
        model=tiny / "lm", data=[tiny / "dialogues.jsonl"], out=tmp_path / "run", device="cpu",
        parallel=Parallel(tp=2),
    )  # fmt: skip
    with pytest.raises(ValueError, match="tp is 2 and there is 1 rank, no multiple of it; start"):
        sft.run(config)


def test_a_loops_stages_take_its_layout_but_for_what_their_own_tables_say() -> None:
    config = dataclasses.replace(
        config_of("70b/rlhf.toml"), out=Path("o"), model=Path("m"), prompts=[Path("p")],
        eval_prompts=[Path("p")], parallel=Parallel(tp=4, replicate=2),
    )  # fmt: skip
    config.rejection["parallel"] = {"tp": 1}
    config.safety["parallel"] = {"checkpointing": "selective", "offload": True}
    ppo = rlhf.ppo_config(config, 1, Path("m"), {"safety": Path("s")})
    assert ppo.parallel == Parallel(tp=4, replicate=2, checkpointing="full")
    sampled = rlhf.rejection_config(config, 1, [Path("p")], Path("m"), None, {})
    assert sampled.parallel == Parallel(replicate=2)
    found = [rlhf.reward_config(config, 1, kind, Path("m"), None) for kind in rlhf.KINDS]
    assert [each.parallel.checkpointing for each in found] == ["full", "selective"]
    assert [each.parallel.offload for each in found] == [False, True]
    assert all(each.parallel.tp == 4 for each in found)


def test_a_run_from_before_the_table_goes_on() -> None:
    before = {"replicate": 2, "activation_checkpointing": True, "compile": False, "lr": 1e-3}
    config = PretrainConfig(
        out="o", data=["d"], tokenizer="t", lr=1e-3,
        parallel=Parallel(replicate=2, checkpointing="full"),
    )  # fmt: skip
    assert changes(before, config, {}) == ([], [], [])
    config.parallel.tp = 2
    assert changes(before, config, {}) == (["parallel.tp 2 where it was 1"], [], [])
    drawn = SampleConfig(policy="m", prompts=["d"], out="o")
    assert not any("compile" in each for each in sum(changes({"compile": True}, drawn, {}), []))


def test_what_a_recorded_table_did_not_have_yet_is_as_usual() -> None:
    config = SFTConfig(model=Path("m"), data=[Path("d")], out=Path("o"))
    before = plain(config)
    before["columns"] = {"messages": "messages"}  # of a version that had no other columns
    assert changes(before, config, {}) == ([], [], [])
    before["columns"] = {"messages": "talk"}
    found = sum(changes(before, config, {}), [])
    assert found == ["columns.messages messages where it was talk"]
