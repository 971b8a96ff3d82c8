"""CUDA graphs: a GPU is handed all launches of a step at once, and not one by one by Python.

A step of sampling launches some twenty kernels a layer. Python takes about as long for one launch
as a GPU for the work of several, so one row of 7B would wait for it most of the time.
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from puna.core import ops
from puna.core.model import Transformer
from puna.core.plain import altered_part

log = logging.getLogger(__name__)

SPARE = 2 << 30  # bytes: the logits of 256 rows of 128,256 words take 131 MB, the rest is less

Work = Callable[[], object]
_aside = threading.Lock()  # what another thread launched on the stream would be captured with it


class Graphs:
    """Kinds of work, each of which is always the same launches on the same memory: replayed from
    the second time on."""

    def __init__(self, model: Transformer):
        self.device = model.device
        # Read where they are; somebody may give the model others meanwhile.
        self._alive = [weight.data for weight in model.parameters()], model.rope_tables(self.device)
        self._replays: dict[int, Work] = {}
        self._begun: set[int] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, kind: int, work: Work) -> None:
        """`work` as it is the first time, which compiles kernels; else the graph of this kind."""
        if kind not in self._begun:
            self._begun.add(kind)
            launched_aside(work, self.device)
            return
        if kind not in self._replays:
            try:
                if torch.cuda.mem_get_info(self.device)[0] < SPARE:
                    torch.cuda.empty_cache()  # while capturing PyTorch gives nothing back
                self._replays[kind] = captured(work, self.device, self._pool)
            except RuntimeError as error:
                log.warning("Sampling goes without CUDA graphs, slower: %s", error)
                self._replays[kind] = work
        self._replays[kind]()


def replays(model: Transformer) -> bool:
    """Whether the steps of a model can be replayed: on a GPU, by kernels that never wait for it,
    where no module, hook or mode is to do something at each step that a graph would leave out."""
    if model.device.type != "cuda" or ops.debug() or ops.traced():
        return False
    if ops.waits(model.config.head_dim, *model.parameters()):
        return False
    if torch.is_autocast_enabled("cuda"):
        return False
    return not altered_part(model, model.config.biased) and all(
        type(weight) is torch.nn.Parameter for weight in model.parameters()
    )


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that captures: cuBLAS keeps 32 MB for each it has seen."""
    return torch.cuda.Stream(device)


def launched_aside(work: Work, device: torch.device) -> None:
    """Run it on the stream that captures, so that what is made once a stream is no part of a
    graph."""
    stream, before = _stream(device), torch.cuda.current_stream(device)
    with _aside:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            work()
        before.wait_stream(stream)


def captured(work: Work, device: torch.device, pool: Any = None) -> Work:
    """Its launches as one graph, replayed; captured, not run. Raises RuntimeError where it waits
    for the GPU, or launches what a graph may not hold."""
    graph = torch.cuda.CUDAGraph()
    with _aside, torch.cuda.stream(_stream(device)):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph.replay
