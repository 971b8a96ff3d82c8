"""Runs the parts one after the other, each within its time, and says what became of each.

A part is a process group of its own; what it prints goes to a file of its name. summary.json in the
same folder says what ran and what of the bars is met, and is written anew before and after each
part. A part that fails or runs out of time takes nothing with it. The same command again goes on:
what has passed is not run again, what has not been run to its end comes first.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.benchmarks import machine
from puna.benchmarks.gpu.bars import Bar, bars, documents, table
from puna.benchmarks.gpu.parts import Part, parts
from puna.core.checkpoint.atomic import write_text
from puna.core.device import device_of_name
from puna.core.documents import read_object
from puna.core.terminal import say

ROOT = Path(__file__).resolve().parents[2]
LEAST = 20.0  # seconds a part must have before it, to be begun
GRACE = 20.0  # seconds in which a part that was asked to end may keep what it measured
PASSED, FAILED, OVER = "passed", "failed", "ran out of time"
RUNNING, STOPPED, LEFT_OUT = "running", "stopped", "left out"
Record = dict[str, Any]  # of a part: name, status, seconds, limit, command and why it was left out


def run(
    out: Path = Path("runs/gpu"),
    seconds: int = 0,
    only: tuple[str, ...] = (),
    layers: int = 0,
    dry_run: bool = False,
) -> int:
    """Check, then measure, all that Puna does on a GPU; 1 where a part failed or is left.

    Args:
        out: folder of what each part prints and of summary.json; a run goes on in its own.
        seconds: all of this call may take; 0: as long as it takes. The same call again goes on.
        only: names of the parts that are wanted, which are run again even if they have passed.
        layers: blocks of Llama 2 7B that are measured; 0: as many as fit the GPU.
        dry_run: walk through all parts on the CPU: tests are collected, benches run at tiny sizes.
    """
    began = time.monotonic()
    if dry_run and layers:
        raise ValueError("a dry run's models are tiny as they are: leave out --layers")
    if min(seconds, layers) < 0:
        raise ValueError("--seconds and --layers are counts: give 0 or more")
    chosen = wanted(parts(dry_run, layers), only)
    device = device_of_name("cpu" if dry_run else "cuda")
    summary = Summary(out, machine.card(device) | {"dry_run": dry_run})
    deadline = began + seconds - GRACE if seconds else None
    with terminated_as_interrupted():
        todo = chosen if only else summary.to_do(chosen)
        for part in todo:
            if deadline is not None and deadline - time.monotonic() < LEAST:
                break
            summary.put(execute(part, summary, deadline))
    say()
    table(summary.bars())
    states = {part.name: summary.status(part) for part in chosen}
    left = [name for name, status in states.items() if status not in (PASSED, LEFT_OUT)]
    say(f"not passed: {', '.join(left)}" if left else "every part passed")
    say(summary.path)
    return int(bool(left))


def wanted(known: list[Part], only: Sequence[str]) -> list[Part]:
    """ValueError for a name that no part has."""
    names = [part.name for part in known]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"no part is called {unknown[0]!r}; there is {', '.join(names)}")
    return [part for part in known if not only or part.name in only]


class Summary:
    """summary.json of a folder. ValueError for one of a dry run where this is none, or of another
    GPU."""

    def __init__(self, out: Path, card: Mapping[str, object]):
        self.out, self.path, self.card = out, out / "summary.json", dict(card)
        self.records: dict[str, Record] = {}
        if self.path.exists():
            found = read_object(self.path)
            before, records = found.get("machine"), found.get("parts")
            if not isinstance(before, dict) or not isinstance(records, list):
                raise ValueError(f"{self.path} is no summary of this program; give another --out")
            for name in ("gpu", "dry_run"):
                if before.get(name) != self.card.get(name):
                    raise ValueError(
                        f"{out} holds another machine's parts ({name}: {before.get(name)}, here "
                        f"{self.card.get(name)}); give another --out"
                    )
            self.records = {record["name"]: record for record in records}

    def status(self, part: Part) -> str:
        return str(self.records.get(part.name, {}).get("status", "not run"))

    def to_do(self, known: list[Part]) -> list[Part]:
        """What has not been run to its end, then what failed or ran out of its time."""
        again = [part for part in known if self.status(part) in (FAILED, OVER)]
        done = [part for part in known if self.status(part) == PASSED]
        return [part for part in known if part not in again and part not in done] + again

    def put(self, record: Record) -> None:
        self.records[record["name"]] = record
        told = {"machine": self.card, "parts": list(self.records.values())}
        told["bars"] = [bar._asdict() for bar in self.bars()]
        write_text(self.path, json.dumps(told, indent=1) + "\n")

    def bars(self) -> list[Bar]:
        return bars(documents(self.out) if self.out.is_dir() else [])


def execute(part: Part, summary: Summary, deadline: float | None) -> Record:
    """Run a part to its end, to the end of its time or to the deadline's, whichever is first."""
    record: Record = {"name": part.name, "status": LEFT_OUT, "seconds": 0.0, "limit": part.seconds}
    command = part.command
    if part.tool and shutil.which(part.tool) is None:
        return told(record, f"{part.tool} is not installed")
    if part.of_missed:
        missed = dict.fromkeys(
            b.operation for b in summary.bars() if b.met is False and b.operation
        )
        if not missed:
            return told(record, "no kernel that was measured misses its bar")
        command = [*command, ",".join(missed)]
    words = ["python" if word == sys.executable else word for word in command]
    record |= {"status": RUNNING, "command": " ".join(words)}
    summary.put(record)
    began = time.monotonic()
    left = part.seconds if deadline is None else min(part.seconds, deadline - began)
    try:
        status = waited(command, part, summary.out / f"{part.name}.log", left)
        if status == OVER and left < part.seconds:
            status = STOPPED
    except BaseException:
        summary.put(record | {"status": STOPPED, "seconds": round(time.monotonic() - began, 1)})
        raise
    return told(record | {"status": status, "seconds": round(time.monotonic() - began, 1)})


def told(record: Record, why: str = "") -> Record:
    """The record, with a line on the terminal."""
    say(f"{record['name']}: {record['status']}, {why or '{:.0f} s'.format(record['seconds'])}")
    return record | ({"why": why} if why else {})


def waited(command: list[str], part: Part, log: Path, seconds: float) -> str:
    """Its status; what it prints is in the file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **dict(part.environment), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )
        try:
            return PASSED if process.wait(seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            return OVER
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the process for its end as Ctrl-C does, so that it keeps what it has; then end all of its
    group, workers that outlived it included."""
    try:
        if process.poll() is None:
            send(process.pid, signal.SIGINT)
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:  # a second Ctrl-C does not wait
        send(process.pid, signal.SIGKILL)
        process.wait()


def send(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:  # all of it has ended
        pass


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP are taken as Ctrl-C: the part is ended, the summary written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = signal.SIGTERM, signal.SIGHUP
    before: dict[int, Callable[..., Any] | int | None]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
