"""Processes, one alone or several ranks with the variables that torchrun sets.

They are forked from one that has imported everything: torchrun takes half a minute of a processor
to start two, nearly all of it for importing PyTorch three times. What is said of torchrun itself is
tested with torchrun (`test_ranks`, `test_ppo`, `test_evaluate_chat`), and what needs variables of
its own before PyTorch is imported (`test_mixed_precision`).
"""

import faulthandler
import functools
import inspect
import multiprocessing
import os
import random
import runpy
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

IMPORTED = ["pytest", "puna.trainers.rlhf", "puna.trainers.gatt", "puna.cli.main"]

Work = Callable[..., Any]  # of a file, in which the other process finds it by its name


class Ended(NamedTuple):
    """What became of the ranks."""

    codes: list[int]  # exit codes; negative: the signal
    stderr: str  # of all ranks, one after the other


@functools.cache
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def start(
    ranks: int, work: Work, *arguments: Any, stderr: Sequence[Path] = (), **more: Any
) -> list[Any]:
    """Processes that do `work(*arguments)`; a number that it returns is the exit code. `more` are
    further variables."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, **more}
        variables = {name: str(value) for name, value in names.items()} if ranks > 1 else {}
        said = stderr[rank] if stderr else None
        found = inspect.getfile(work), work.__name__
        processes.append(server().Process(target=process, args=(variables, said, found, arguments)))
        processes[-1].start()
    return processes


def free_port() -> int:
    """One below those that the system gives to outgoing connections: such a one was taken before
    the first rank listened there."""
    while True:
        port = random.randint(15_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def process(
    variables: dict[str, str],
    stderr: Path | None,
    work: tuple[str, str],
    arguments: tuple[Any, ...],
) -> None:
    """What is done in one; `work` is a file and the name of a function in it."""
    if variables:
        os.environ.update(variables, MASTER_ADDR="127.0.0.1")
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.enable()  # a crash below Python says where: once malloc found its lists damaged
    file, name = work
    code = runpy.run_path(file)[name](*arguments)
    raise SystemExit(code if isinstance(code, int) else 0)


def on_ranks(ranks: int, work: Work, *arguments: Any, folder: Path, seconds: float = 300) -> Ended:
    """Wait for so many ranks; when one has failed the others are ended, as by torchrun. What they
    say goes to files of `folder`."""
    files = [folder / f"stderr-{rank}.txt" for rank in range(ranks)]
    # What they meet at is here, as with torchrun: else it would go with the first rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    processes: list[BaseProcess] = start(ranks, work, *arguments, stderr=files, **meeting)
    deadline = time.monotonic() + seconds
    while any(each.is_alive() for each in processes):
        late = time.monotonic() > deadline
        if late or any(each.exitcode for each in processes):
            for each in processes:
                each.kill() if late else each.terminate()
        time.sleep(0.05)
    said = "".join(each.read_text(errors="replace") for each in files)
    return Ended([each.exitcode or 0 for each in processes], said)


def succeed(ranks: int, work: Work, *arguments: Any, folder: Path, seconds: float = 300) -> None:
    """As `on_ranks`; AssertionError where a rank does not come to its end."""
    ended = on_ranks(ranks, work, *arguments, folder=folder, seconds=seconds)
    assert not any(ended.codes), f"exit codes {ended.codes}\n{ended.stderr}"
