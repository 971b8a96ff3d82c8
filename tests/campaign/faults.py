"""Faults of one rank of two, inside of a step, of a rollout, of the write behind the training: kill
-9 of one or of all, and SIGSTOP of one. The others end with a sentence, in time; nothing is left;
then the same command again: the end must be that of a run nobody disturbed, to the bit.

    python tests/campaign/faults.py --kills 60 --stops 10 --seed 1
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

from campaign.kills import code_of, differences, finish, starter  # noqa: E402

RANKS = 2
TIMEOUT = 5  # seconds, the runs' own
ENDS = 15.0  # more, in which a rank that waited in vain is gone
KILLS = 4  # of one run, before it may end
TP = "--parallel.tp 2"  # both ranks work on the same rows
MOMENTS = {  # where: what does it, and a stage that comes there, with which options
    "step": ("puna.trainers.train.loop", "backward", "sft", ""),
    "update": ("puna.trainers.ppo", "update", "ppo", ""),
    "rollout": ("puna.trainers.rl.rollout", "generate_together", "ppo", ""),
    "chunk": ("puna.trainers.rl.rollout", "generate_together", "rejection", ""),
    "write": ("puna.trainers.train.saving", "write_files", "sft", ""),
    "writes": ("puna.trainers.train.saving", "write_files", "ppo", ""),
    "tp-step": ("puna.trainers.train.loop", "backward", "sft", TP),
    "tp-rollout": (
        "puna.trainers.rl.rollout", "generate_together", "ppo", f"{TP} --sampling-tp 2"
    ),
    "tp-writes": ("puna.trainers.train.saving", "write_files", "ppo", f"{TP} --parallel.offload"),
}  # fmt: skip
SIGNALS = {"one": signal.SIGKILL, "all": signal.SIGKILL, "stop": signal.SIGSTOP}


class Fault(NamedTuple):
    """What befalls the rank `victim`: in its `nth` time at `moment`, after a `share` of how long
    the time before took."""

    moment: str
    victim: int = 0
    nth: int = 0  # never
    share: float = 0.0
    harm: str = "one"


def arm(fault: Fault, notes: Path) -> None:
    """In a rank: be ready for its fault. What it says goes to `notes`, and how often it came to the
    moment; a file `inside` or `after` says where it was hit."""
    rank = int(os.environ["RANK"])
    os.dup2(os.open(notes / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    module, name, *_ = MOMENTS[fault.moment]
    place = importlib.import_module(module)
    work: Callable = getattr(place, name)
    times, took, inside = 0, 0.0, False

    def hit() -> None:
        (notes / ("inside" if inside else "after")).touch()
        if fault.harm != "cut":
            os.kill(os.getpid(), SIGNALS[fault.harm])

    def watched(*arguments, **options):
        nonlocal times, took, inside
        times, inside, began = times + 1, True, time.monotonic()
        with (notes / f"times-{rank}").open("a") as file:
            file.write(".")
        if times == fault.nth and rank == fault.victim:
            threading.Timer(fault.share * took, hit).start()
        try:
            return work(*arguments, **options)
        finally:
            inside, took = False, time.monotonic() - began

    setattr(place, name, watched)


def armed(fault: Fault, tiny: Path, out: Path, notes: Path) -> str:
    """Code of a rank that `fault` is going to befall, or not."""
    here = str(Path(__file__).resolve().parents[1])
    return (
        f"import sys; sys.path.insert(0, {here!r}); from pathlib import Path; "
        "from campaign.faults import Fault, arm; "
        f"arm(Fault(*{tuple(fault)!r}), Path({str(notes)!r})); "
        + unarmed(fault.moment, tiny, out, f"--timeout {TIMEOUT}")
    )


def unarmed(moment: str, tiny: Path, out: Path, more: str = "") -> str:
    """Code of a rank of a run that comes there; `more` are further options."""
    *_, stage, options = MOMENTS[moment]
    return code_of(stage, tiny, out, f"{options} {more}")


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def befall(
    fault: Fault, start: Callable[..., list[BaseProcess]], tiny: Path, out: Path, notes: Path
) -> tuple[str, list[str]]:
    """Run with the fault; returns where it hit ("" where the run ended before), and what is wrong
    with how the others ended."""
    processes = start(armed(fault, tiny, out, emptied(notes)), RANKS)
    victim = processes[fault.victim]
    others = [process for process in processes if process is not victim]
    hit = wait_for_hit(notes, processes)
    if hit and fault.harm == "all":
        victim.join()
    elif hit:
        began = time.monotonic()
        for other in others:
            other.join(TIMEOUT + ENDS)
        wrong = [*wrong_ends(fault, others, notes)]
        wrong += [f"it took {time.monotonic() - began:.1f} s"] if wrong else []
    else:
        finish(processes)
    for process in processes:
        process.kill()
        process.join()
    return hit, wrong if hit and fault.harm != "all" else []


def wait_for_hit(notes: Path, processes: list[BaseProcess]) -> str:
    """Where the victim was hit; "" where all ended before."""
    while True:
        ended = not any(process.is_alive() for process in processes)
        for where in ("inside", "after"):
            if (notes / where).exists():
                return where
        if ended:
            return ""
        time.sleep(0.002)


def wrong_ends(fault: Fault, others: list[BaseProcess], notes: Path) -> Iterator[str]:
    """What is not as it should be: each has ended, with status 1 and one sentence."""
    for other in others:
        if other.is_alive():
            yield "it hangs"
        elif other.exitcode != 1:
            yield f"it ended with {other.exitcode}"
    for rank in range(RANKS):
        said, found = sentences(notes, rank)
        if rank != fault.victim and len(found) != 1:
            yield f"rank {rank} said {said!r}"


def sentences(notes: Path, rank: int) -> tuple[str, list[str]]:
    """All that a rank wrote to stderr, and Puna's own lines of it; none where there is a traceback
    besides."""
    said = (notes / f"said-{rank}").read_text() if (notes / f"said-{rank}").exists() else ""
    found = [line for line in said.splitlines() if line.startswith("puna ")]
    return said, [] if "Traceback" in said else found


def campaign(kills: int, stops: int, seed: int, moments: list[str]) -> int:
    from tiny import make_tiny

    began, hits, wrong = time.monotonic(), Counter[str](), []
    start = starter()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    tiny = make_tiny(Path(tempfile.mkdtemp(prefix="tiny-", dir=root)), n_kv_heads=2)
    notes, times = root / "notes", {}
    for moment in moments:
        finish(start(armed(Fault(moment), tiny, root / f"whole-{moment}", emptied(notes)), RANKS))
        times[moment] = (notes / "times-0").stat().st_size
    turn = 0
    while sum(hits.values()) < kills + stops:
        rng = random.Random(f"{seed} {turn}")
        moment, out = moments[turn % len(moments)], root / "run"
        for _ in range(KILLS):
            left = kills + stops - sum(hits.values())
            harm = "stop" if left <= stops else rng.choice(["one", "all"])
            nth = rng.randint(1, max(1, times[moment] // 3))
            fault = Fault(moment, rng.randrange(RANKS), nth, rng.uniform(0, 1.2), harm)
            hit, found = befall(fault, start, tiny, out, notes)
            if hit:
                hits[f"{moment}, {harm}, {hit}"] += 1
            if found:
                wrong.append((fault, hit, found))
                print(f"WRONG: {wrong[-1]}", flush=True)
        try:
            finish(start(unarmed(moment, tiny, out), RANKS))
            found = differences(out, root / f"whole-{moment}")
        except AssertionError as error:
            found = [str(error)]
        if found:
            wrong.append((moment, seed, turn, found))
            shutil.copytree(out, root / f"wrong-{len(wrong)}")
            print(f"WRONG: {wrong[-1]}", flush=True)
        shutil.rmtree(out)
        turn += 1
        print(f"{sum(hits.values())} faults, {len(wrong)} wrong ends", flush=True)
    for name, number in sorted(hits.items()):
        print(f"{number:5} {name}")
    seconds = time.monotonic() - began
    print(f"{sum(hits.values())} faults in {seconds:.0f} s, {len(wrong)} wrong ends")
    if not wrong:
        shutil.rmtree(root)
    return len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=[*MOMENTS])
    given = parser.parse_args()
    return 1 if campaign(given.kills, given.stops, given.seed, given.moments) else 0


if __name__ == "__main__":
    sys.exit(main())
