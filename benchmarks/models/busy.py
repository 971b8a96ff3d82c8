"""Beside busy neighbours: as many processes that never rest as this one has threads.

A fair scheduler then leaves half of the machine, so a row's limit is half the rate that was
measured alone in the same rounds. Threads that wait for each other get less of it: one is set
aside while the others wait.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch

from puna.benchmarks.models.shapes import Models
from puna.benchmarks.models.steps import puna_step
from puna.benchmarks.models.train import BATCH, TOKENS
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import summarise
from puna.core.generation.generate import generate
from puna.core.model import Transformer

NEW = 128  # tokens decoded by one call
SECONDS = 2.0  # that calls are repeated for: a scheduler gives slices of some milliseconds


def bench_busy(models: Models, rounds: int) -> list[Row]:
    """Rows of decoding one row and of training, none on a GPU."""
    if models.gpu:
        return []
    batch, new = BATCH.get(models.shape.size, 1), min(NEW, models.config.context - 1)
    ids = torch.randint(models.config.vocab_size, (batch, TOKENS))
    trained = Transformer(models.config)
    trained.init_weights(seed=0)
    works: dict[str, tuple[int, int, Callable[[], object]]] = {
        "decoding": (1, new, partial(decode, models.puna, new)),
        "training": (batch, ids.numel(), puna_step(trained, ids)),
    }
    found = []
    for operation, (rows, tokens, call) in works.items():
        alone, beside = taken(call, rounds)
        limit = tokens / median(alone) / 2
        work = Work("busy", str(models.shape), rows, tokens, limit, models.dtype, operation)
        found.append(row(work, "puna", summarise(beside), None, None))
    return found


def decode(model: Transformer, new: int) -> object:
    return generate(model, [[1]], max_new_tokens=new, eos_id=None, temperature=0.0)


def taken(call: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a call, alone and beside busy neighbours, in turn; one unmeasured round first."""
    alone, beside = [], []
    for turn in range(rounds + 1):
        quiet = seconds_each(call)
        with neighbours(torch.get_num_threads()):
            busy = seconds_each(call)
        if turn:
            alone.append(quiet)
            beside.append(busy)
    return alone, beside


def seconds_each(call: Callable[[], object]) -> float:
    """Of one call, over so many that they take SECONDS."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < SECONDS:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute without end, until the block does."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it is up
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()
