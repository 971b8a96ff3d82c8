"""A slice of the campaign of `campaign/kills.py`: every stage killed twice, then continued.

Run: python -m pytest tests/test_kill.py -q            (-m "slow or not slow": many more kills)
"""

import random

import pytest
from campaign.kills import STAGES, code_of, differences, finish, kill, starter, undisturbed, wait


@pytest.fixture(scope="module")
def start():
    return starter()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, start):
    """stage -> (folder of an uninterrupted run, how long it took, names that appeared)."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def of(stage: str):
        if stage not in done:
            out = root / stage
            done[stage] = (out, *undisturbed(start(code_of(stage, tiny, out)), out))
        return done[stage]

    return of


def killed_and_continued(stage, moments, seed, tiny, out, start, whole) -> None:
    reference, seconds, names = whole(stage)
    rng = random.Random(f"{stage} {seed}")
    for moment in moments:
        processes = start(code_of(stage, tiny, out))
        wait(moment, processes, out, seconds, names, rng)
        kill(processes)
    finish(start(code_of(stage, tiny, out)))
    assert differences(out, reference) == []


@pytest.mark.parametrize("stage", [*STAGES, "rlhf"])
def test_a_stage_killed_at_any_moment_continues_exactly(stage, tiny, tmp_path, start, whole):
    killed_and_continued(stage, ["clock", "file"], 0, tiny, tmp_path / stage, start, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("stage", [*STAGES, "rlhf"])
def test_a_stage_killed_again_and_again_continues_exactly(
    stage, seed, tiny, tmp_path, start, whole
):
    killed_and_continued(stage, ["clock", "file"] * 3, seed, tiny, tmp_path / stage, start, whole)
