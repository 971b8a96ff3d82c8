"""Every Triton kernel compiled ahead of time, for GPUs that need not be there.

python -m puna.benchmarks.aot [--targets sm_90,gfx942] [--only sample,gae] [--peer]

One row a kernel, launch and target: registers a thread, bytes a thread of registers that went to
memory, shared memory a program, the widest and narrowest load of its large tiles in bits a
thread, tensor-core instructions, and bytes moved over the least possible (`aot_traffic` says what
is counted; it is the same on every target). Exits with 1 where a kernel that memory limits spills
or loads less than 128 bits a thread, one that multiplies matrices has no bf16 tensor-core
instruction, any other spills without a reason in `aot_cases`, or a kernel has no case.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from puna.benchmarks.aot.cases import BOUND, SPILLS, Case, cases, kernels


class Row(NamedTuple):
    case: str
    kernel: str
    target: str
    facts: Any  # aot_compile.Facts, or the message of a failure
    ours: bool = True


def faults(row: Row) -> list[str]:
    """What is wrong with a row; a peer's are its own."""
    if isinstance(row.facts, str):
        return [row.facts] if row.ours else []
    if not row.ours:
        return []
    found, facts = [], row.facts
    bound = BOUND.get(row.kernel)
    if bound is None:
        return ["aot_cases.BOUND does not say what limits it"]
    newest, older, _ = SPILLS.get((row.kernel, row.target), (0, 0, ""))
    recent = tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
    if facts.spilled > (0 if bound == "memory" else newest if recent else older):
        found.append(f"spills {facts.spilled} bytes a thread")
    if bound == "memory" and facts.narrowest < 128:
        found.append(f"loads {facts.narrowest} bits a thread")
    if bound == "products" and not facts.bf16:
        found.append("no bf16 tensor-core instruction")
    return found


def launches(chosen: list[Case], targets: list[str], peer: bool) -> list[tuple[Case, Any, str]]:
    """What is to be compiled: the launches that each target's settings give, each once."""
    from puna.benchmarks.aot import compile as aot_compile

    sizes: Any = import_module("puna.kernels.backend")
    found, asked = [], sizes.architecture
    everything = list(chosen)
    if peer:
        everything += import_module("puna.benchmarks.aot.peers").cases()
    for target in targets:
        sizes.architecture = lambda device, target=target: target
        try:
            for case in everything:
                found += [(case, each, target) for each in aot_compile.record(case.run)]
        finally:
            sizes.architecture = asked
    return found


_todo: list[tuple[Case, Any, str]] = []  # inherited by the forked processes: kernels do not pickle


def _compile(number: int) -> Row:
    from puna.benchmarks.aot import compile as aot_compile

    case, launch, target = _todo[number]
    row = Row(case.name, launch.kernel.__name__, target, "", ours=not case.name.startswith("liger"))
    try:
        return row._replace(facts=aot_compile.facts(aot_compile.lower(launch, target)))
    except Exception as error:  # one kernel that does not compile is a row of the table
        return row._replace(facts=f"{type(error).__name__}: {str(error).strip()[:300]}")


def compiled(todo: list[tuple[Case, Any, str]]) -> list[Row]:
    _todo[:] = todo
    count = min(len(os.sched_getaffinity(0)), len(todo))
    if count < 2:
        return [_compile(number) for number in range(len(todo))]
    with multiprocessing.get_context("fork").Pool(count) as pool:
        return pool.map(_compile, range(len(todo)), chunksize=1)


def traffic(chosen: list[Case]) -> dict[str, float]:
    """Moved / least of the cases that say how many rows to count, from another process: one
    interprets kernels, another compiles them. What could not be counted is said."""
    names = [case.name for case in chosen if case.counted]
    if not names:
        return {}
    command = [sys.executable, "-m", "puna.benchmarks.aot.traffic", *names]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"counting what is moved failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    for why in {value for value in found.values() if isinstance(value, str)}:
        without = ", ".join(name for name, value in found.items() if value == why)
        print(f"moved/least not counted, the interpreter stopped with {why}: {without}")
    return {name: value for name, value in found.items() if not isinstance(value, str)}


def table(rows: list[Row], moved: dict[str, float]) -> Table:
    made = Table(title=f"triton {version('triton')}, bf16, Llama 2 7B")
    for name in ("case", "kernel", "target"):
        made.add_column(name, no_wrap=name != "case")
    for name in ("registers", "spilled", "shared", "load bits", "tensor cores", "moved/least"):
        made.add_column(name, justify="right")
    made.add_column("wrong (or why not)")
    last = ""
    for row in rows:
        cells = ["", "", "", "", ""]
        if not isinstance(row.facts, str):
            facts = row.facts
            widths = sorted({facts.narrowest, facts.widest} - {0})
            products = ", ".join(f"{count} {name}" for name, count in facts.products.items())
            cells = [
                str(facts.registers), str(facts.spilled), str(facts.shared),
                "-".join(map(str, widths)), products + (" bf16" if facts.bf16 else ""),
            ]  # fmt: skip
        ratio = moved.get(row.case) if row.case != last else None
        last = row.case
        wrong = "; ".join(faults(row)) or (row.facts if isinstance(row.facts, str) else "")
        if not wrong and row.ours and row.facts.spilled:
            wrong = f"({SPILLS[row.kernel, row.target][2]})"
        made.add_row(
            row.case, row.kernel, row.target, *cells, f"{ratio:.2f}" if ratio else "", wrong
        )
    return made


def run(
    targets: str = "sm_80,sm_90,sm_100,gfx942",
    only: str = "",
    peer: bool = False,
    *,
    chosen: tyro.conf.Suppress[list[Case] | None] = None,
) -> int:
    """Compile all kernels, print what they became; 1 where one is not what it must be.

    Args:
        targets: GPUs to compile for, with commas between them.
        only: beginnings of the cases to look at, with commas between them; empty: all.
        peer: also liger-kernel's counterparts, if it is installed.
        chosen: other cases.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set, and what is interpreted cannot be compiled: unset it.")
    try:
        from puna.benchmarks.aot.compile import TARGETS
    except ImportError as error:
        sys.exit(f"{error}: install triton to compile its kernels.")
    names = targets.split(",")
    if unknown := set(names) - set(TARGETS):
        sys.exit(f"unknown targets {sorted(unknown)}: choose from {', '.join(TARGETS)}.")
    found = cases() if chosen is None else chosen
    if only:
        found = [case for case in found if case.name.startswith(tuple(only.split(",")))]
        if not found:
            sys.exit(f"no case begins with {only}.")
    rows = compiled(launches(found, names, peer))
    rows.sort(key=lambda row: not row.ours)
    moved = traffic(found)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows, moved))
    wrong = [f"{r.case}, {r.kernel}, {r.target}: {fault}" for r in rows for fault in faults(r)]
    if not only and chosen is None:
        missing = kernels() - {row.kernel for row in rows}
        wrong += [f"{name} has no case in aot_cases" for name in sorted(missing)]
    print("\n".join(wrong) or f"{len(rows)} kernels compiled as they should be.")
    return int(bool(wrong))
