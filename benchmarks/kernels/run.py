"""`puna bench kernels`: each operation verified against fp64, then timed beside its peers.

What is wrong is not timed (see verify.py). The same on every device: on a GPU the Triton kernels at
Llama 7B's shapes in bf16, on a CPU the reference at small shapes in fp32, and beside it the native
operations ("puna-native").
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.table import Table

from puna.benchmarks import budget, machine
from puna.benchmarks.kernels.cases import CPU, DRY, GPU, Case, cases
from puna.benchmarks.kernels.peers import Function
from puna.benchmarks.kernels.verify import Verdict, prepared, verify, verify_timed
from puna.benchmarks.machine import why_not_compiled
from puna.benchmarks.opponents import KERNELS, PACKAGES
from puna.benchmarks.output import table_of
from puna.benchmarks.rows import ABOVE, KernelRow, OnGPU
from puna.benchmarks.timing import (
    Clock,
    Timing,
    captured,
    host_seconds,
    interleaved,
    kernel_clock,
    peak_mb,
)
from puna.core.errors import UserError
from puna.kernels.backend import choose

OURS = ("puna", "puna-native")
PLAIN = ("torch",)  # nobody replays it: what its many launches cost is what the others spare
# A call that takes so many times as long as the fastest has fewer rounds: those of LONGEST seconds,
# LEAST of them. Plain attention over 16,384 tokens takes .7 s with its backward, the others .04.
FAR, LONGEST, LEAST = 10, 2.0, 3


class Kernels(NamedTuple):
    """Which operations, and how often."""

    device: torch.device
    rounds: int = 30
    only: Collection[str] = ()  # names of puna.kernels; none: all
    dry: bool = False  # a GPU's cases at tiny sizes, wherever this is
    quick: bool = False  # one shape of each, and without torch.compile's rows
    compiled: bool = True  # torch.compile's rows

    def cases(self) -> list[Case]:
        """ValueError for an unknown operation."""
        sizes = DRY if self.dry else GPU if self.device.type == "cuda" else CPU
        if self.quick:
            sizes = replace(sizes, widths=sizes.widths[:1], heads=sizes.heads[:2][-1:])
            sizes = replace(sizes, further_dims=(), long=0)
        chosen = cases(sizes, self.device)
        if self.dry:
            chosen = [replace(case, native=None) for case in chosen]
        known = dict.fromkeys(case.operation for case in chosen)
        for name in self.only:
            if name not in known:
                raise ValueError(f"no operation is called {name!r}; there is {', '.join(known)}")
        return [case for case in chosen if not self.only or case.operation in self.only]


def kernel_rows(kernels: Kernels, say: Callable[[str], object]) -> Iterator[list[KernelRow]]:
    """Operation after operation, as long as there is time (`budget`)."""
    compiled = kernels.compiled and not kernels.quick
    why = why_not_compiled(kernels.device) if compiled else None
    if why:
        say(f"torch.compile does not work here, its rows are left out: {why}")
    bench = Bench(kernels.rounds, kernels.device, compiles=compiled and not why)
    chosen = kernels.cases()
    for number, case in enumerate(chosen):
        if number and budget.is_spent():
            names = dict.fromkeys(each.operation for each in chosen[number:])
            say(f"left out: kernels, for want of time: {', '.join(names)}")
            return
        try:
            yield bench.rows(case)
        except torch.OutOfMemoryError:
            say(f"left out: {case.operation} {case.shape} does not fit the memory")


def check_kernels(found: Sequence[KernelRow]) -> None:
    """UserError where an operation of Puna was found wrong (a peer's row says so, and that is
    all)."""
    wrong = {e["operation"] for e in found if e["failed"] and e["provider"] in OURS}
    if wrong:
        raise UserError(f"wrong, and not timed: {', '.join(sorted(wrong))}")


def card_of_kernels(device: torch.device) -> dict[str, object]:
    """What the machine's card says besides."""
    found: dict[str, object] = {
        name: machine.installed(package)
        for name, package in {"triton": "triton", **{n: PACKAGES[n][0] for n in KERNELS}}.items()
    }
    return found | {"backend": choose(torch.empty(0, device=device))}


class Bench:
    """Measures case after case on one device against the same ceilings."""

    def __init__(self, rounds: int, device: torch.device, compiles: bool):
        self.rounds, self.device, self.compiles = rounds, device, compiles
        self.clock: Clock = kernel_clock(device)
        self.matmul: dict[torch.dtype, float] = {}

    def rows(self, case: Case) -> list[KernelRow]:
        """Forward, and forward with backward where there is a gradient: a row a provider."""
        torch.compiler.reset()  # a function compiled for one shape is no other's
        providers = {"puna": case.ours, "torch": case.eager, **case.peers}
        if case.native:
            providers["puna-native"] = case.native
        if case.compiled and self.compiles:
            providers["torch-compiled"] = torch.compile(case.eager, dynamic=False)
            if case.products and self.device.type == "cuda":  # the others have nothing to choose
                providers["torch-autotuned"] = torch.compile(
                    case.eager, dynamic=False, mode="max-autotune-no-cudagraphs"
                )
        found = self.direction(case, providers, backward=False)
        if case.differentiable:
            found += self.direction(case, providers, backward=True)
        return found

    def direction(
        self, case: Case, providers: Mapping[str, Function], backward: bool
    ) -> list[KernelRow]:
        inputs = case.make()
        verdicts = verify(case, providers, inputs, backward)
        # Each has its own inputs: liger-kernel writes gradients over them.
        timed = {
            name: prepared(function, case, inputs, backward)
            for name, function in providers.items()
            if not verdicts[name].failed
        }
        calls = {name: each.call for name, each in timed.items()}
        peaks = {name: self.peak(call) for name, call in calls.items()}
        timings = self.timings(calls)
        work = case.both if backward else case.forward
        limit = self.limit(case, work)
        for name, verdict in verify_timed(case, timed, inputs, backward).items():
            failed = verdict.failed and f"when timed, {verdict.failed}"
            if not failed and work / timings[name].median > ABOVE * limit:
                failed = "faster than the machine can be"
            if failed:
                verdicts[name] = verdicts[name]._replace(failed=failed)
                del timings[name], peaks[name]
        found = [
            row(case, backward, name, work, limit, verdict, timings.get(name), peaks.get(name))
            for name, verdict in verdicts.items()
        ]
        if self.device.type == "cuda":
            for each in found:
                if each["failed"] is None and each["provider"] not in PLAIN:
                    each |= self.launches(calls[each["provider"]])
        return found

    def timings(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """In turn, as often as is asked for; what is far slower by itself, for `LONGEST`."""
        once = {name: self.clock(call) for name, call in calls.items()}
        many = max(LONGEST / self.rounds, FAR * min(once.values(), default=0.0))
        rounds = {
            name: min(self.rounds, max(LEAST, int(LONGEST / seconds)))
            for name, seconds in once.items()
            if seconds > many
        }
        often = {name: call for name, call in calls.items() if name not in rounds}
        found = interleaved(often, self.rounds, self.device, self.clock)
        for name, few in rounds.items():
            found |= interleaved({name: calls[name]}, few, self.device, self.clock)
        return {name: found[name] for name in calls}

    def launches(self, call: Callable[[], object]) -> OnGPU:
        """What launching costs, and the time without it. Last, since a call that breaks off a
        capture may leave its own state behind."""
        host, replay = host_seconds(call), captured(call)
        best = replay and min(self.clock(replay) for _ in range(self.rounds))
        return {"host_us": 1e6 * host, "graph_ms": best and 1e3 * best}

    def peak(self, call: Callable[[], object]) -> float | None:
        return peak_mb(call, self.device) if self.device.type == "cuda" else None

    def limit(self, case: Case, work: float) -> float:
        """FLOP/s of a matrix product, or bytes/s of copying as much as the operation moves."""
        if case.products:
            if case.dtype not in self.matmul:
                self.matmul[case.dtype] = machine.matmul_rate(self.device, case.dtype)
            return self.matmul[case.dtype]
        source = torch.ones(max(1, int(work) // 2), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return work / min(self.clock(lambda: target.copy_(source)) for _ in range(20))


def row(
    case: Case,
    backward: bool,
    provider: str,
    work: float,
    limit: float,
    verdict: Verdict,
    timing: Timing | None,
    peak: float | None,
) -> KernelRow:
    unit, scale = ("TFLOP/s", 1e12) if case.products else ("GB/s", 1e9)

    def rate(seconds: float) -> float:
        return work / seconds / scale

    return {
        "bench": "kernel",
        "operation": case.operation,
        "direction": "forward+backward" if backward else "forward",
        "shape": case.shape,
        "batch": case.rows,
        "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype],
        "provider": provider,
        "value": timing and rate(timing.median),
        "unit": unit,
        "p20": timing and rate(timing.p80),
        "p80": timing and rate(timing.p20),
        "limit": limit / scale,
        "ms": timing and 1e3 * timing.median,
        "error": verdict.error,
        "peak_mb": peak,
        "failed": verdict.failed,
    }


def not_timed(found: Sequence[KernelRow]) -> list[str]:
    """A line for each row that has no rate."""
    return [
        f"not timed: {each['provider']}, {each['operation']} {each['shape']} {each['direction']}: "
        f"{each['failed']}"
        for each in found
        if each["failed"]
    ]


TEXTS = ("operation", "shape", "direction", "provider")
NUMBERS = (
    "ms", "rate", "p20", "p80", "of ceiling", "times best", "error", "peak MB",
    "host us", "graph ms",
)  # fmt: skip


def kernels_table(found: Sequence[KernelRow]) -> Table:
    """The rows for a terminal."""
    return table_of(TEXTS, NUMBERS, kernel_cells(found))


def kernel_cells(found: Sequence[KernelRow]) -> list[list[str]]:
    """The cells of each row. Puna's say how many times the rate of the fastest other they reach."""
    best: dict[tuple[str, ...], float] = {}
    for each in found:
        if each["provider"] not in OURS and each["value"]:
            best[work_of(each)] = max(best.get(work_of(each), 0.0), each["value"])
    table = []
    for each in found:
        direction = each["direction"].replace("forward", "fwd").replace("backward", "bwd")
        cells = [each["operation"], f"{each['shape']} {each['dtype']}", direction]
        cells.append(each["provider"])
        value, p20, p80 = each["value"], each["p20"], each["p80"]
        error = "" if each["error"] is None else f"{each['error']:.1e}"
        if value is None or p20 is None or p80 is None:
            table.append([*cells, "not timed", *[""] * 5, error, "", "", ""])
            continue
        rival = best.get(work_of(each))
        cells += [
            f"{each['ms']:.3g}",
            f"{value:,.3g} {each['unit']}",
            f"{p20:,.3g}",
            f"{p80:,.3g}",
            f"{value / each['limit']:.0%}",
            f"{value / rival:.2f}" if rival and each["provider"] in OURS else "",
            error,
            "" if each["peak_mb"] is None else f"{each['peak_mb']:,.0f}",
            *(f"{each[name]:.3g}" if each.get(name) else "" for name in ("host_us", "graph_ms")),
        ]
        table.append(cells)
    return table


def work_of(each: KernelRow) -> tuple[str, ...]:
    return each["operation"], each["shape"], each["direction"]
