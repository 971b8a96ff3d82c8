"""Every kind of stage, saved in one layout, goes on in another as one process that never stopped.

Run: python -m pytest tests/test_goes_on.py -q         (-m "slow or not slow": every two layouts)
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign.kills import code_of, finish, starter
from test_parallel_stages import assert_same_rows, metrics
from tiny import make_tiny

LAYOUTS = {  # ranks, and how they share the work
    "one": (1, ""),
    "shards": (2, ""),
    "together": (2, "--parallel.tp 2"),
    "copies": (2, "--parallel.replicate 2 --parallel.offload"),
    "four": (4, ""),
    "copies of parts": (4, "--parallel.replicate 2 --parallel.tp 2 --parallel.checkpointing full"),
}
COMMON = "--schedule constant --amend"
LONG = {  # until when the first part goes, and until when the whole
    "pretrain": ("--size mini --steps 3", "--size mini --steps 6"),
    "sft": ("--epochs 1", "--epochs 2"),
    "reward": ("--epochs 1", "--epochs 2"),
    "ppo": ("--batch 8 --minibatch 4 --iterations 2", "--batch 8 --minibatch 4 --iterations 5"),
}
FEW = [  # those that are tried every time
    *[(stage, "shards", "together") for stage in LONG],
    ("ppo", "together", "one"),
    ("reward", "copies", "shards"),
]


@pytest.fixture(scope="module")
def start() -> Callable:
    return starter()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("inputs"), n_kv_heads=2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, inputs: Path, start: Callable) -> Callable:
    """(stage, layout, 0 for the first part or 1 for the whole) -> the folder of that run."""
    root = tmp_path_factory.mktemp("ran")

    def of(stage: str, layout: str, part: int) -> Path:
        out = root / f"{stage}-{layout}-{part}"
        if not out.exists():
            run(start, inputs, out, stage, layout, part)
        return out

    return of


def run(start: Callable, inputs: Path, out: Path, stage: str, layout: str, part: int) -> None:
    ranks, flags = LAYOUTS[layout]
    finish(start(code_of(stage, inputs, out, f"{COMMON} {LONG[stage][part]} {flags}"), ranks))


def case(stage: str, before: str, after: str) -> object:
    marks = [] if (stage, before, after) in FEW else [pytest.mark.slow]
    return pytest.param(stage, before, after, marks=marks)


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [case(s, b, a) for s in LONG for b in LAYOUTS for a in LAYOUTS if a != b and b != "four"],
)
def test_what_was_saved_in_one_layout_goes_on_in_another(
    stage: str,
    before: str,
    after: str,
    ran: Callable,
    start: Callable,
    inputs: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(ran(stage, before, 0), out)
    already = metrics(out)
    run(start, inputs, out, stage, after, 1)
    expected, found = metrics(ran(stage, "one", 1)), metrics(out)
    assert len(expected) > len(already) > 2
    assert found[:2] == already[:2]  # it did go on: elsewhere the last bits are others
    assert_same_rows(found, expected)
