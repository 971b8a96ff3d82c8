"""Mutation of everything that Puna reads: each damaged file is refused in one sentence that names
it, within ten seconds and bounded memory, or taken for a reason that stands here.

    python tests/campaign/readers.py --seconds 300 --seed 7

A case is a function of (seed, target, number), so that a finding is repeated with
`--targets NAME --first NUMBER --cases 1`. Exit status 1 where something was found.
"""

import argparse
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaign.targets import Target, make_targets  # noqa: E402

HANG_SECONDS = 10
SLOW_SECONDS = 1.0
MEMORY = 3 << 30  # bytes of addresses beyond what the process has at its start
WHOLE = ("refused", "same", "taken")


class Finding(NamedTuple):
    target: str
    number: int
    what: str


def try_one(target: Target, seed: int, number: int) -> tuple[str, str]:
    """(outcome, what happened) of one case: refused, same, taken, or what is wrong."""
    rng = Random(f"{seed}/{target.name}/{number}")
    target.file.write_bytes(target.mutate(target.data, rng))
    try:
        found = target.read()
    except (ValueError, OSError) as error:
        return judged(error, target)
    except MemoryError:
        return "memory", "MemoryError"
    except TimeoutError:
        raise
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if same(found, target.expected):
        return "same", ""
    reason = target.taken(found)
    return ("taken", reason) if reason else ("silent", f"{found!r}"[:300])


def judged(error: Exception, target: Target) -> tuple[str, str]:
    """Whether an error is one sentence about the file."""
    text = str(error)
    if type(error) is not ValueError and not isinstance(error, OSError):
        return "traceback", f"{type(error).__name__}: {text}"
    if "\n" in text or len(text) > 1200:
        return "no sentence", text[:300]
    if not any(name in text for name in (target.file.name, target.file.parent.name)):
        return "unnamed", text[:300]
    return "refused", text


def same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:
        return False


def work(target: Target, seed: int, numbers: range, results: Any) -> None:
    """Cases in a process of their own: what kills it kills nothing else."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # SentencePiece writes there
    for number in numbers:
        began = time.process_time()  # a busy machine makes nothing slow
        outcome, what = try_one(target, seed, number)
        results.send((number, outcome, what, time.process_time() - began))
    results.send(None)


def run_target(target: Target, seed: int, numbers: range, until: float) -> tuple[Counter, list]:
    """All cases of a target, as far as time allows: how many of each outcome, and the findings."""
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    context = multiprocessing.get_context("fork")
    at = numbers.start
    while at < numbers.stop and time.monotonic() < until:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(target, seed, range(at, numbers.stop), theirs))
        process.start()
        theirs.close()
        ended = False
        while not ended and time.monotonic() < until:
            try:
                answer = ours.recv() if ours.poll(HANG_SECONDS) else ()
            except EOFError:
                process.join()
                answer = (at, "killed", f"status {process.exitcode}", 0.0)
                ended = True
            if answer is None:
                ended, at = True, numbers.stop
                break
            if not answer:
                answer, ended = (at, "hang", f"{HANG_SECONDS} s", math.inf), True
            number, outcome, what, seconds = answer
            at = number + 1
            counts[outcome] += 1
            if outcome == "taken":
                counts[f"  taken: {what}"] += 1
            if SLOW_SECONDS < seconds < math.inf:
                counts["slow"] += 1
                findings.append(Finding(target.name, number, f"slow: {seconds:.1f} s"))
            if outcome not in WHOLE:
                findings.append(Finding(target.name, number, f"{outcome}: {what}"))
        process.kill()
        process.join()
    return counts, findings


def campaign(
    seed: int, cases: int, seconds: float, only: list[str] | None = None, first: int = 0
) -> tuple[dict[str, Counter], list[Finding]]:
    """Up to `cases` of every target within `seconds` for all: outcomes by target, findings."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        targets = [t for t in make_targets(folder) if not only or t.name in only]
        counts, findings = {}, []
        share = seconds / len(targets)
        for target in targets:
            target.file.write_bytes(target.data)
            until = time.monotonic() + share
            counts[target.name], found = run_target(
                target, seed, range(first, first + cases), until
            )
            target.file.write_bytes(target.data)
            findings += found
        return counts, findings
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", help="only these")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10**9, help="of each target, at most")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    counts, findings = campaign(
        options.seed, options.cases, options.seconds, options.targets, options.first
    )
    total: Counter[str] = Counter()
    for name, count in counts.items():
        shown = {k: n for k, n in count.items() if not k.startswith("  ")}
        print(f"{name:24}", ", ".join(f"{key} {n:,}" for key, n in shown.items()))
        for key, n in count.items():
            if key.startswith("  "):
                print(f"{'':22}{key}: {n:,}")
        total.update(shown)
    print("all:", ", ".join(f"{key} {n:,}" for key, n in total.items()))
    kinds = {(finding.target, finding.what[:12]): finding for finding in reversed(findings)}
    for finding in reversed(kinds.values()):  # the first of each kind
        print(f"FOUND {finding.target} {finding.number}: {finding.what[:300]!r}")
    print(f"{len(findings)} findings, seed {options.seed}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
