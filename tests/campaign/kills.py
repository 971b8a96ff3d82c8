"""kill -9 of every stage, on one rank and on two, at moments of the clock and in the middle of
writes; then the same command again: the end must be that of a run nobody disturbed, to the bit.

    python tests/campaign/kills.py --seconds 1200 --seed 1

Moments: a time of the clock; the n-th name that appears in the run's folder (hidden ones of files
that are being written included); the same, and what was being written is cut off at a random byte.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import launch  # noqa: E402

COMMON = "--device cpu --save-every 1 --lr 1e-3 --batch 4"
STAGES = {
    "pretrain": "--data {0}/text.jsonl --tokenizer {0}/tokenizer.model --context 48 --steps 6 "
    "--eval-share 0.1 --eval-every 2",
    "sft": "--model {0}/lm --data {0}/dialogues.jsonl --eval-share 0.1 --eval-every 3 --epochs 3",
    "reward": "--model {0}/chat --data {0}/preferences.jsonl --eval-share 0.2 --eval-every 3",
    "gatt": "--model {0}/chat --dialogues {0}/ghosts.jsonl --max-new-tokens 12 --epochs 4",
    "rejection": "--policy {0}/chat --helpfulness {0}/helpfulness --safety {0}/safety --chunk 4 "
    "--prompts {0}/prompts.jsonl --samples 3 --max-new-tokens 12 --epochs 4 --batch 2",
    "distill": "--policy {0}/chat --safety {0}/safety --prompts {0}/prompts.jsonl --chunk 2 "
    "--max-new-tokens 12 --epochs 4 --batch 2",
    "ppo": "--policy {0}/chat --helpfulness {0}/helpfulness --safety {0}/safety --iterations 5 "
    "--prompts {0}/prompts.jsonl --eval-prompts {0}/prompts.jsonl --minibatch 2 --max-new-tokens 8 "
    "--eval-every 2 --patience 9",
}
CALL = "import sys; from puna.cli.main import main; sys.exit(main({argv!r}))"
RLHF = """
from pathlib import Path
from puna.core import ranks
from puna.trainers import rlhf
from puna.trainers.rl.comparisons import Verdict

def judge(a, b):
    pairs = zip(a, b, strict=True)
    return [Verdict(int(len(y.text) > len(x.text)), "better", "both_safe") for x, y in pairs]

ranks.init()
prompts = [Path({tiny!r}) / "prompts.jsonl"]
small = dict(batch=8, micro_batch=8, lr=1e-3, save_every=1, eval_share=0.2)
rlhf.run(
    rlhf.RLHFConfig(
        out=Path({out!r}), model=Path({tiny!r}) / "chat", prompts=prompts,
        helpfulness_prompts=prompts, safety_prompts=prompts, versions=2, helpfulness_pairs=16,
        safety_pairs=16, chunk=6, max_new_tokens=8, device="cpu", reward=small,
        rejection=dict(samples=2, chunk=4, epochs=2, batch=2, save_every=1),
        ppo=dict(iterations=3, batch=4, minibatch=2, lr=1e-4, save_every=1),
    ),
    dict(helpfulness=judge, safety=judge),
)
ranks.close()
"""
MOMENTS = ("clock", "file", "torn")
KILLS = 6  # of one run, before it may end

Start = Callable[[str], BaseProcess]


def starter() -> Callable[..., list[BaseProcess]]:
    """Starts code in fresh processes."""
    return lambda code, ranks=1: launch.start(ranks, execute, code)


def execute(code: str) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    exec(code, {})


def code_of(stage: str, tiny: Path, out: Path, more: str = "") -> str:
    """What a rank of it executes; `more` are further options."""
    if stage == "rlhf":
        return RLHF.format(tiny=str(tiny), out=str(out))
    argv = f"{stage} {COMMON} {STAGES[stage]} {more}".format(tiny).split()
    return CALL.format(argv=[*argv, "--out", str(out)])


def names_in(out: Path) -> set[str]:
    """Everything below; os.walk minds nothing that is renamed meanwhile."""
    return {f"{root}/{name}" for root, *parts in os.walk(out) for part in parts for name in part}


def finish(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(300)
        if process.exitcode != 0:
            raise AssertionError(f"a run ended with {process.exitcode}")


def undisturbed(processes: list[BaseProcess], out: Path) -> tuple[float, int]:
    """(seconds, names that appeared in the folder) of a run that nobody kills."""
    began, seen = time.monotonic(), set[str]()
    while any(process.is_alive() for process in processes):
        seen |= names_in(out)
        time.sleep(0.001)
    finish(processes)
    return time.monotonic() - began, len(seen)


def wait(
    moment: str,
    processes: list[BaseProcess],
    out: Path,
    seconds: float,
    names: int,
    rng: random.Random,
) -> None:
    """Until the moment to kill has come, or the run has ended."""
    if moment == "clock":
        processes[0].join(rng.uniform(0.05, 0.9) * seconds)
        return
    wanted, seen = rng.randint(1, max(1, names // 2)), names_in(out)
    before = len(seen)
    while processes[0].is_alive() and len(seen) - before < wanted:
        seen |= names_in(out)


def kill(processes: list[BaseProcess]) -> bool:
    """Whether there was still something to kill."""
    alive = any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return alive


def cut_off(out: Path, rng: random.Random) -> None:
    """What was being written under a hidden name ends at a random byte."""
    for path in out.rglob("*"):
        hidden = any(part.endswith(".partial") for part in path.relative_to(out).parts)
        if hidden and path.is_file():
            os.truncate(path, rng.randint(0, path.stat().st_size))


def written(out: Path) -> dict[str, list]:
    """All rows of all .jsonl files in a run's folder, less what depends on place and clock."""
    found = {}
    for path in sorted(out.rglob("*.jsonl")):
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        for row in rows:
            for name in [n for n in row if n.startswith("seconds") or n in ("model", "steps")]:
                del row[name]
        found[str(path.relative_to(out))] = rows
    return found


def weights(out: Path) -> dict[str, bytes]:
    """Every file of weights of every finished model."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("model/*.safetensors"))
    }


def differences(out: Path, reference: Path) -> list[str]:
    """What is not as in an undisturbed run, and what should not have been left."""
    found = []
    ours, theirs = written(out), written(reference)
    found += [
        f"rows of {name}" for name in ours.keys() | theirs if ours.get(name) != theirs.get(name)
    ]
    mine, good = weights(out), weights(reference)
    found += [
        f"weights in {name}" for name in mine.keys() | good if mine.get(name) != good.get(name)
    ]
    left = [path for path in out.rglob(".*") if path.name.endswith((".partial", ".previous"))]
    found += [
        f"{path} was left" for path in left if path.is_dir() and path.parent.name != "checkpoints"
    ]
    return found if good else [*found, "no model"]


def campaign(seconds: float, seed: int, stages: list[str], ranks: list[int]) -> int:
    from tiny import make_tiny

    began, kills, wrong = time.monotonic(), Counter[str](), []
    start = starter()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    tiny = make_tiny(Path(tempfile.mkdtemp(prefix="tiny-", dir=root)))
    cases = [(stage, count) for count in ranks for stage in stages]
    whole = {}
    for stage, count in cases:
        out = root / f"whole-{stage}-{count}"
        whole[stage, count] = undisturbed(start(code_of(stage, tiny, out), count), out)
    rounds = 0
    while time.monotonic() - began < seconds:
        for stage, count in cases:
            rng = random.Random(f"{seed} {rounds} {stage} {count}")
            out = root / "run"
            for _ in range(KILLS):
                moment = rng.choice(MOMENTS)
                processes = start(code_of(stage, tiny, out), count)
                wait(moment, processes, out, *whole[stage, count], rng)
                if kill(processes):
                    kills[f"{stage}, {count} ranks, {moment}"] += 1
                if moment == "torn" and out.exists():
                    cut_off(out, rng)
            try:
                finish(start(code_of(stage, tiny, out), count))
                found = differences(out, root / f"whole-{stage}-{count}")
            except AssertionError as error:
                found = [str(error)]
            if found:
                wrong.append((seed, rounds, stage, count, found))
                shutil.copytree(out, root / f"wrong-{len(wrong)}")
                print(f"WRONG: {wrong[-1]}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
        rounds += 1
        print(f"{sum(kills.values())} kills, {len(wrong)} wrong ends", flush=True)
    for name, number in sorted(kills.items()):
        print(f"{number:5} {name}")
    print(
        f"{sum(kills.values())} kills in {time.monotonic() - began:.0f} s, {len(wrong)} wrong ends"
    )
    if not wrong:
        shutil.rmtree(root)
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=[*STAGES, "rlhf"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    given = parser.parse_args()
    return 1 if campaign(given.seconds, given.seed, given.stages, given.ranks) else 0


if __name__ == "__main__":
    sys.exit(main())
