"""Providers that look fast and do not do the work: `puna bench kernels` must time none of them.

Run: python -m pytest tests/test_bench_cheats.py -q
"""

import threading
import time
from dataclasses import replace

import pytest
import torch
from test_bench_kernels import CPU, TINY

from puna.benchmarks.kernels import cases as kernel_cases
from puna.benchmarks.kernels import run as bench
from puna.benchmarks.kernels.peers import EPS
from puna.core import ops

CASES = {case.operation: case for case in kernel_cases.cases(TINY, CPU)}
NORM = CASES["rms_norm"]


def honest(x, weight):
    return (ops.rms_norm(x, weight, eps=EPS),)


class Kept:
    """Computes once for each place in memory, and gives that again."""

    def __init__(self):
        self.answers = {}

    def __call__(self, x, weight):
        if x.data_ptr() not in self.answers:
            self.answers[x.data_ptr()] = honest(x, weight)[0].detach().clone()
        return (self.answers[x.data_ptr()],)


class Stale:
    """Gives what the call before has computed."""

    def __init__(self):
        self.last = None

    def __call__(self, x, weight):
        now = honest(x, weight)[0]
        before, self.last = self.last, now
        return (now if before is None else before,)


def zeros(x, weight):
    return (torch.zeros_like(x),)


def half(x, weight):
    out = torch.zeros_like(x)
    out[: len(x) // 2] = honest(x[: len(x) // 2], weight)[0]
    return (out,)


def narrow(x, weight):
    return (honest(x, weight)[0].to(torch.bfloat16),)


def rounded_to_float16(x, weight):
    return (honest(x, weight)[0].half(),)


class Later:
    """Returns at once and fills the result behind the clock's back."""

    def __init__(self):
        self.threads = []

    def __call__(self, x, weight):
        out = torch.zeros_like(x)
        right = honest(x, weight)[0]

        def fill():
            time.sleep(0.3)
            out.copy_(right)

        self.threads.append(threading.Thread(target=fill))
        self.threads[-1].start()
        return (out,)


class LaterOnceTrusted(Later):
    """Honest as long as somebody looks: while it is verified, not while it is timed."""

    def __call__(self, x, weight):
        self.calls = getattr(self, "calls", 0) + 1
        return honest(x, weight) if self.calls == 1 else super().__call__(x, weight)


class Tampers:
    """Makes the work easy: writes zeros into its inputs, then gives what is right for those."""

    def __call__(self, x, weight):
        right = honest(x, weight)
        if getattr(self, "looked_at", False):
            x.zero_()
            return (torch.zeros_like(x),)
        self.looked_at = True
        return right


CHEATS = {
    "an answer that is kept": Kept,
    "the answer of the call before": Stale,
    "zeros": lambda: zeros,
    "half of the rows": lambda: half,
    "another dtype": lambda: narrow,
    "another dtype still": lambda: rounded_to_float16,
    "work that goes on after the call": Later,
    "work that goes on once it is trusted": LaterOnceTrusted,
    "inputs that are written over": Tampers,
}


def rows_of(case, providers, clock=lambda call: (call(), 1.0)[1]):
    measuring = bench.Bench(2, CPU, compiles=False)
    measuring.clock = clock
    return {row["provider"]: row for row in measuring.direction(case, providers, backward=False)}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_not_timed(name):
    cheat = CHEATS[name]()
    found = rows_of(NORM, {"puna": honest, "torch": NORM.eager, "cheat": cheat})
    for thread in getattr(cheat, "threads", ()):
        thread.join()
    assert found["cheat"]["value"] is None and found["cheat"]["failed"], name
    assert found["puna"]["value"] and found["torch"]["value"] and not found["puna"]["failed"]


def test_gradients_that_are_kept_are_not_timed():
    class Function(torch.autograd.Function):
        gradient = None

        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return honest(x, weight)[0]

        @staticmethod
        def backward(ctx, upstream):
            if Function.gradient is None or Function.trusted < 2:
                Function.trusted += 1
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                    out = honest(*leaves)[0]
                Function.gradient = torch.autograd.grad(out, leaves, upstream)
            return Function.gradient

    Function.trusted = 0
    measuring = bench.Bench(2, CPU, compiles=False)
    measuring.clock = lambda call: (call(), 1.0)[1]
    providers = {"torch": NORM.eager, "cheat": lambda x, w: (Function.apply(x, w),)}
    found = {row["provider"]: row for row in measuring.direction(NORM, providers, backward=True)}
    assert found["torch"]["value"] and found["cheat"]["value"] is None
    assert found["cheat"]["failed"].startswith("when timed")


def test_a_rate_above_the_ceiling_is_a_mistake():
    slow = replace(NORM, forward=NORM.forward * 1e9)  # as if a thousand million times were moved
    measuring = bench.Bench(2, CPU, compiles=False)
    measuring.limit = lambda case, work: 1.0
    measuring.clock = lambda call: (call(), 1.0)[1]
    (row,) = measuring.direction(slow, {"puna": honest}, backward=False)
    assert row["value"] is None and row["failed"] == "faster than the machine can be"


@pytest.mark.parametrize("operation", sorted(CASES))
def test_honest_providers_pass_with_other_inputs(operation):
    case = CASES[operation]
    measuring = bench.Bench(1, CPU, compiles=False)
    measuring.clock = lambda call: (call(), 1.0)[1]
    for row in measuring.rows(case):
        assert row["failed"] is None and row["value"], (row["provider"], row["failed"])
