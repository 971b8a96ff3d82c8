"""kill -9 at random moments of every stage, then the same command again: nothing is lost.

Run: python -m pytest tests/test_kill.py -q            (-m "slow or not slow": many more kills)
"""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest

from puna.core.checkpoint.folder import load_model

COMMON = "--device cpu --save-every 1 --lr 1e-3 --batch 4"
STAGES = {
    "pretrain": "--data {0}/text.jsonl --tokenizer {0}/tokenizer.model --context 48 --steps 6 "
    "--eval-share 0.1 --eval-every 2",
    "sft": "--model {0}/lm --data {0}/dialogues.jsonl --eval-share 0.1 --eval-every 3 --epochs 3",
    "reward": "--model {0}/chat --data {0}/preferences.jsonl --eval-share 0.2 --eval-every 3",
    "gatt": "--model {0}/chat --dialogues {0}/ghosts.jsonl --max-new-tokens 12 --epochs 4",
    "rejection": "--policy {0}/chat --helpfulness {0}/helpfulness --safety {0}/safety --chunk 4 "
    "--prompts {0}/prompts.jsonl --samples 3 --max-new-tokens 12 --epochs 4 --batch 1",
    "ppo": "--policy {0}/chat --helpfulness {0}/helpfulness --safety {0}/safety --iterations 5 "
    "--prompts {0}/prompts.jsonl --eval-prompts {0}/prompts.jsonl --minibatch 2 --max-new-tokens 8 "
    "--eval-every 2 --patience 9",
}
CALL = "import sys; from puna.cli.main import main; sys.exit(main({argv!r}))"
RLHF = """
from pathlib import Path
from puna.trainers import rlhf
from puna.trainers.rl.comparisons import Verdict

def judge(a, b):
    pairs = zip(a, b, strict=True)
    return [Verdict(int(len(y.text) > len(x.text)), "better", "both_safe") for x, y in pairs]

prompts = [Path({tiny!r}) / "prompts.jsonl"]
small = dict(batch=8, micro_batch=8, lr=1e-3, save_every=1, eval_share=0.2)
rlhf.run(
    rlhf.RLHFConfig(
        out=Path({out!r}), model=Path({tiny!r}) / "chat", prompts=prompts,
        helpfulness_prompts=prompts, safety_prompts=prompts, versions=2, helpfulness_pairs=16,
        safety_pairs=16, max_new_tokens=8, device="cpu", reward=small,
        rejection=dict(samples=2, chunk=4, epochs=2, batch=2, save_every=1),
        ppo=dict(iterations=3, batch=4, minibatch=2, lr=1e-4, save_every=1),
    ),
    dict(helpfulness=judge, safety=judge),
)
"""


@pytest.fixture(scope="module")
def start():
    """Starts code in a fresh process, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["puna.trainers.rlhf", "puna.trainers.gatt", "puna.cli.main"])

    def begin(code: str) -> multiprocessing.Process:
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        return process

    return begin


def code_of(stage: str, tiny: Path, out: Path) -> str:
    if stage == "rlhf":
        return RLHF.format(tiny=str(tiny), out=str(out))
    argv = f"{stage} {COMMON} {STAGES[stage]}".format(tiny).split()
    return CALL.format(argv=[*argv, "--out", str(out)])


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, start):
    """stage -> (folder of an uninterrupted run, how long it took)."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def of(stage: str) -> tuple[Path, float]:
        if stage not in done:
            began = time.monotonic()
            process = start(code_of(stage, tiny, root / stage))
            process.join()
            assert process.exitcode == 0
            done[stage] = (root / stage, time.monotonic() - began)
        return done[stage]

    return of


def written(out: Path) -> dict[str, list]:
    """All rows of all .jsonl files in a run's folder, less what depends on place and clock."""
    found = {}
    for path in sorted(out.rglob("*.jsonl")):
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        for row in rows:
            for name in [n for n in row if n.startswith("seconds") or n == "model"]:
                del row[name]
        found[str(path.relative_to(out))] = rows
    return found


def models(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.rglob("model/config.json"))


def killed_and_continued(stage, kills, seed, tiny, out, start, whole) -> None:
    reference, seconds = whole(stage)
    draw = random.Random(f"{stage} {seed}")
    for _ in range(kills):
        process = start(code_of(stage, tiny, out))
        process.join(draw.uniform(0.05, 0.9) * seconds)
        process.kill()
        process.join()
    last = start(code_of(stage, tiny, out))
    last.join()
    assert last.exitcode == 0
    assert written(out) == written(reference)
    assert len(written(out)) >= 1 and models(out)
    for ours, theirs in zip(models(out), models(reference), strict=True):
        assert ours.relative_to(out) == theirs.relative_to(reference)
        expected = dict(load_model(theirs).named_parameters())
        for name, parameter in load_model(ours).named_parameters():
            assert bool((parameter == expected[name]).all()), f"{ours}: {name}"
    leftovers = [path for path in out.rglob(".*") if path.name.endswith((".partial", ".previous"))]
    assert not [path for path in leftovers if path.is_dir() and path.parent.name != "checkpoints"]


@pytest.mark.parametrize("stage", [*STAGES, "rlhf"])
def test_a_stage_killed_at_any_moment_continues_exactly(stage, tiny, tmp_path, start, whole):
    killed_and_continued(stage, 2, 0, tiny, tmp_path / stage, start, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("stage", [*STAGES, "rlhf"])
def test_a_stage_killed_again_and_again_continues_exactly(
    stage, seed, tiny, tmp_path, start, whole
):
    killed_and_continued(stage, 6, seed, tiny, tmp_path / stage, start, whole)
