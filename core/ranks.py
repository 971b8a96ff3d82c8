"""The processes that torchrun started: who they are, what they say to each other, how they end.

One process, no group: every function here is then the plain thing. No rank may wait for another
that will not come: one that fails says so to the others (`fail`) and leaves without waiting.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from queue import Empty, Queue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from puna.core.terminal import say

PARENT_SECONDS = 1.0  # between looks at whether torchrun is still there
LAST_SECONDS = 300.0  # for a worker without torchrun to save a checkpoint before it is ended
LATE_SECONDS = 30.0  # for all ranks to have started before it is said who is waited for
FAILED = "puna/failed"  # in the ranks' common store: "<rank>\n<why>"
STUCK = "puna/stuck"  # the same: ranks that waited in vain
ANSWER_SECONDS = 3.0  # for that store to answer; where it does not, nothing is said through it

Answer = TypeVar("Answer")


class NoAnswer(RuntimeError):
    """The ranks' store did not answer in time."""


_seconds: float | None = None  # that ranks wait for each other; None: what PyTorch says


def init() -> None:
    """Join the other processes where torchrun started several; nothing otherwise.

    Tensors on CUDA travel by nccl, on the CPU by gloo; each process takes the device of its
    local rank, and stops when torchrun is gone. Raises ValueError where torchrun's variables are
    left over from something else.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    needed = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r} but {missing[0]} is not set: start "
            "several processes with torchrun, or unset WORLD_SIZE"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    with said_if_late():
        dist.init_process_group(backend)
    stop_with_parent()


@contextmanager
def said_if_late() -> Iterator[None]:
    """Says whom this process waits for where that takes long: variables left behind from a torchrun
    that is gone would make it wait for half an hour without a word."""
    where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    words = (
        f"waiting for the {os.environ['WORLD_SIZE']} processes of WORLD_SIZE to meet at {where}; "
        "where there is only this one, stop it and unset WORLD_SIZE"
    )
    timer = threading.Timer(LATE_SECONDS, say, [words], {"error": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_at_most(seconds: float) -> None:
    """Let the ranks wait so long for each other from here on, in all groups that there are and will
    be; then they are lost (`is_lost`)."""
    global _seconds
    _seconds = seconds
    if dist.is_initialized():
        patient(*dist.distributed_c10d._world.pg_map)


def patient(*groups: Any) -> None:
    """Let the ranks of new process groups wait as long as `wait_at_most` said."""
    if _seconds is None:
        return
    for group in groups:
        if dist.get_backend(group) != "fake":
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=_seconds), group)


def stop_with_parent() -> None:
    """Stop this process as SIGTERM does, with a checkpoint, when the one that started it is gone:
    the workers of a torchrun that was killed would go on writing into the next one's run."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def close() -> None:
    """Leave the process group, if there is one, together: a process that goes first once took its
    threads down while the other still talked to them.

    gloo's threads outlive the group (PyTorch's caches of FSDP hold it). One that still lets go of
    the last tensors when the interpreter ends aborts the process: 1 run of 12 on a busy machine.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:  # alone it would do nothing but start NCCL
            dist.barrier()
        dist.destroy_process_group()
        # DTensor remembers what it worked out by shape and mesh, and equal meshes of the next
        # process group would be given the groups of this one. Where it is not imported there is
        # nothing to forget, and importing it takes a second.
        if "torch.distributed.tensor" in sys.modules:
            from torch.distributed.tensor.debug import _clear_sharding_prop_cache

            _clear_sharding_prop_cache()
        time.sleep(0.2)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    all_sum(torch.zeros(1))


def all_sum(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum over ranks, as a new tensor; the tensor itself for one rank."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_max(value: int) -> int:
    """The largest of the ranks' values."""
    return int(_all_reduce(torch.tensor(value), dist.ReduceOp.MAX))


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType, group: Any = None) -> Tensor:
    if world_size() == 1:
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result, operation, group=group)
    return result


def background(seconds: float) -> Any:
    """All ranks once more, for a thread that works behind the training: what two threads of a rank
    say in one group would be mixed up (collective the first time; None for one rank). Ranks wait
    `seconds` for each other in it."""
    if world_size() == 1:
        return None
    group = _second_group(dist.group.WORLD)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    return group


@lru_cache
def _second_group(world: Any) -> Any:
    return dist.new_group(backend="gloo")


def broadcast(value: Any, group: Any = None) -> Any:
    """Rank 0's value (anything JSON holds) on every rank; the others' are ignored."""
    if world_size() == 1:
        return value
    text = json.dumps(value).encode() if is_main() else b""
    size = torch.tensor(len(text))
    dist.broadcast(size, src=0, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if is_main():
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(buffer, src=0, group=group)
    return json.loads(buffer.numpy().tobytes())


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value (anything JSON holds), in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(text)
    sizes = all_sum(sizes, group)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    pairs = zip(parts, sizes.tolist(), strict=True)
    return [json.loads(part[:size].numpy().tobytes()) for part, size in pairs]


def on_main(work: Callable[[], Any], group: Any = None) -> Any:
    """What rank 0's `work` gives (anything JSON holds), on every rank. Where it raises ValueError
    or OSError there, every rank raises ValueError with its words: none goes on alone."""
    if world_size() == 1:
        return work()
    outcome = broadcast(_outcome(work) if is_main() else {}, group)
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def on_all(work: Callable[[], Any], group: Any = None) -> list[Any]:
    """What every rank's own `work` gives, in the order of the ranks, on every rank. Where it raises
    ValueError or OSError on one, every rank raises ValueError with its words."""
    outcomes = gather(_outcome(work), group)
    for other, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise ValueError(f"{outcome['error']} (rank {other})")
    return [outcome["value"] for outcome in outcomes]


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except (ValueError, OSError) as error:
        return {"error": str(error)}


def same(said: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError, on every rank, where one says something else than rank 0.

    `said` has, for each kind of thing, its values by name (anything JSON holds).
    """
    everyone = gather(said)
    for other, theirs in enumerate(everyone):
        for kind, expected in everyone[0].items():
            for name in sorted(expected.keys() | theirs[kind].keys()):
                ours, found = expected.get(name), theirs[kind].get(name)
                if ours != found:
                    raise ValueError(
                        f"rank {other} has another {kind} {name} than rank 0 ({_short(found)}, not "
                        f"{_short(ours)}); start every rank with the same command on the same files"
                    )


def _short(value: Any) -> str:
    return f"{value!s:.40}"


def fail(why: str, *, by_others: bool) -> bool:
    """Tell the other ranks that this one ends; returns whether it is the one to say so.

    `by_others`: it ends because it could not reach them. The first rank speaks, and any with
    something else to say.
    """
    if not dist.is_initialized():
        return True
    try:
        first, _, said = in_time(lambda: _first_to_fail(why)).partition("\n")
    except RuntimeError:
        return True  # the store went with torchrun, or cannot be reached
    return int(first) == rank() or not (by_others or said == why)


def _first_to_fail(why: str) -> str:
    store = dist.distributed_c10d._get_default_store()
    return store.compare_set(FAILED, "", f"{rank()}\n{why}").decode()


def in_time(ask: Callable[[], Answer]) -> Answer:
    """What the ranks' store answers to `ask`; RuntimeError where it does not (NoAnswer: not
    in time). PyTorch would wait for ever where its machine stands still or the network is cut."""
    answers: Queue[Answer | RuntimeError] = Queue()

    def wait() -> None:
        try:
            answers.put(ask())
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=wait, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except Empty:
        raise NoAnswer from None
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


def is_lost(error: Exception) -> bool:
    """Whether the error is that other ranks could not be reached."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting")
    return (
        dist.is_initialized()
        and isinstance(error, RuntimeError)
        and any(each in str(error) for each in words)
    )


def who_is_missing() -> str:
    """Which ranks others waited for in vain: all but those that say, within two seconds, that they
    were waiting, too."""
    try:
        store = dist.distributed_c10d._get_default_store()
        in_time(lambda: store.set(f"{STUCK}/{rank()}", "1"))
        time.sleep(2.0)
        everyone = range(world_size())
        gone = in_time(lambda: [r for r in everyone if not store.check([f"{STUCK}/{r}"])])
    except NoAnswer:
        return (
            f"{os.environ['MASTER_ADDR']}, where the ranks meet, no longer answers: its machine "
            "stands still or the network is cut; the same command goes on from the last checkpoint"
        )
    except RuntimeError:
        return "torchrun is gone"
    names = " and ".join(f"rank {r}" for r in gone) or "another rank"
    return f"{names} did not come to where the others waited; what it wrote last may say why"
