"""The suite: opens each shape, runs the benches, prints the card, a table and the document."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from puna.benchmarks import budget, machine, opponents
from puna.benchmarks.kernels.run import (
    Kernels,
    card_of_kernels,
    check_kernels,
    kernel_rows,
    kernels_table,
    not_timed,
)
from puna.benchmarks.models import growth
from puna.benchmarks.models.busy import bench_busy
from puna.benchmarks.models.chat import bench_chat
from puna.benchmarks.models.contexts import LENGTHS, bench_behind, bench_prompt
from puna.benchmarks.models.decode import BATCHES as DECODE_BATCHES
from puna.benchmarks.models.decode import bench_decode
from puna.benchmarks.models.fsdp import BYTES as FSDP_BYTES
from puna.benchmarks.models.fsdp import bench_fsdp
from puna.benchmarks.models.generate import BATCHES, GPU_BATCHES, bench_generate
from puna.benchmarks.models.llama_cpp import llama_cpp_installed
from puna.benchmarks.models.rlhf import BYTES as RLHF_BYTES
from puna.benchmarks.models.rlhf import bench_rlhf
from puna.benchmarks.models.rollout import bench_rollout
from puna.benchmarks.models.shapes import DTYPES, Models, Shape, blocks_that_fit, open_models
from puna.benchmarks.models.train import bench_train
from puna.benchmarks.opponents import KERNELS
from puna.benchmarks.output import (
    above_limit,
    card_table,
    rows_table,
    wide_console,
    write_document,
)
from puna.benchmarks.parts import Measured, Part, measure
from puna.benchmarks.rows import Row
from puna.core import parallel

SHAPES, GPU_SHAPES, QUICK_SHAPES = ("demo", "15m"), ("7b",), ("demo",)
TRAINED = 16  # bytes a parameter: fp32 with its gradient and AdamW's state
QUICK_SECONDS, QUICK_LEAST = 160.0, 30.0  # from the process's start, and after it at the least
QUICK_ROUNDS, QUICK_PROMPTS = 3, 64
ALL = ("kernels", "generate", "decode", "rollout", "rlhf", "fsdp", "busy", "train")
SLOW_ON_CPU = ("kernels", "rollout", "busy")  # "all" leaves them to verbs of their own there


class Setting(NamedTuple):
    """What is measured, and how."""

    device: torch.device
    rounds: int = 0  # 0: each bench's own
    shapes: Sequence[str] = ()  # none: SHAPES, on a GPU GPU_SHAPES
    layers: int = 0  # blocks kept of each; 0: on a GPU as many as fit, else all
    peers: bool = True
    dry: bool = False  # a GPU's rows on a CPU, with tiny models: whether all of it runs
    quick: bool = False  # a row of each bench within QUICK_SECONDS
    dtype: str = ""  # "fp32" or "bf16"; "": fp32, on a GPU bf16
    operations: Sequence[str] = ()  # of the kernels; none: all
    compiled: bool = True  # torch.compile's rows of the kernels
    recompute: bool = False  # training with full recomputation alone, on a GPU
    llama2c: Path | None = None  # where its run lies
    llama_bench: Mapping[str, Path] = {}  # builds of llama.cpp, by name

    @property
    def gpu(self) -> bool:
        return self.dry or self.device.type == "cuda"

    @property
    def kind(self) -> str:
        return self.dtype or ("bf16" if self.gpu else "fp32")

    @property
    def kernels(self) -> Kernels:
        rounds = self.rounds or (5 if self.quick else 30)
        chosen = self.operations, self.dry, self.quick, self.compiled
        return Kernels(self.device, rounds, *chosen)

    def called(self, what: str) -> str:
        """The name of the results file of a part; of less than a part, one of its own."""
        if what == "all":
            return "quick" if self.quick else what
        return "-".join([what, *self.operations, *(["recompute"] * self.recompute)])

    @property
    def turns(self) -> int:
        """Rounds of the models' benches."""
        return self.rounds or (QUICK_ROUNDS if self.quick else 5)

    def opened_shapes(self) -> list[Shape]:
        names = GPU_SHAPES if self.gpu else QUICK_SHAPES if self.quick else SHAPES
        return [Shape(name, self.layers, tiny=self.dry) for name in self.shapes or names]


def run_suite(
    what: str, setting: Setting, *, command: str, save: bool = False
) -> dict[str, object]:
    """Measure "all", or one of ALL; the last line printed is the JSON document.

    Returns the document {"machine", "command", "rows", "left_out"}. With `save` it is also written
    to results/<machine>/<what>.json beside this file, what ctrl-C stopped to <what>-stopped.json.
    Raises ValueError for a shape that is not known, KeyboardInterrupt and what failed after that.
    """
    shapes = setting.opened_shapes()
    for shape in shapes:
        shape.check()
    if what in ("kernels", "all"):
        setting.kernels.cases()
    if parallel.world_size() > 1 and what != "fsdp":
        raise ValueError(
            "several processes are measured by `puna bench fsdp`; start the others without torchrun"
        )
    console = wide_console()
    console.quiet = not parallel.is_main()
    card = machine.card(setting.device) | card_of_kernels(setting.device)
    console.print(card_table(card))
    lines = left_out(what, setting)
    for line in lines:
        console.print(line)
    seconds = None
    if setting.quick:
        seconds = max(QUICK_LEAST, QUICK_SECONDS - budget.process_age())
    found = measure(parts(what, setting, shapes, console.print), console.print, seconds)
    kernels = [row for row in found.rows if row["bench"] == "kernel"]
    models = [row for row in found.rows if row["bench"] != "kernel"]
    if kernels:
        console.print(kernels_table(kernels))
    if models:
        console.print(rows_table(models))
    for line in not_timed(kernels) + above_limit(models):
        console.print(line)
    document: dict[str, object] = {"machine": card, "command": command, "rows": found.rows}
    document["left_out"] = lines + found.left_out
    if fits := growth.exponents(models):
        document["growth"] = fits
        for fit in fits:
            console.print(growth.said(fit))
    if save and found.rows and parallel.is_main():
        name = setting.called(what) + "-stopped" * found.stopped
        console.print(f"written to {write_document(document, name)}")
    if parallel.is_main():
        print(json.dumps(document))
    end(found)
    check_kernels(kernels)
    return document


def end(found: Measured) -> None:
    """Raise what the run is to end with, now that what it measured is told."""
    if found.stopped:
        raise KeyboardInterrupt
    if found.error is not None:
        raise found.error


def parts(
    what: str, setting: Setting, shapes: Sequence[Shape], say: Callable[[str], object]
) -> list[Part]:
    """The benches in their order: what is opened for one serves the next, and what trains comes
    last."""
    wanted: Sequence[str] = (what,)
    if what == "all":
        slow = ("busy",) if setting.gpu or setting.quick else SLOW_ON_CPU
        wanted = [name for name in ALL if name not in slow]
    found = []
    if "kernels" in wanted:
        found.append(Part("kernels", lambda: kernel_rows(setting.kernels, say)))
    grown = None
    if what == "growth" or (what == "all" and setting.quick):  # else minutes, for its own verb
        plan = growth.DRY if setting.dry else growth.GPU if setting.gpu else growth.CPU
        arguments = plan, setting.device, setting.kind, setting.turns
        grown = Part("growth", partial(growth.bench_growth, *arguments, dry=setting.dry))
    held = Held(setting)
    for shape in shapes:
        for name in wanted:
            if name in BENCHES:
                rows = partial(BENCHES[name], held, shape, setting)
                found.append(Part(f"{name} {shape}", rows))
    return [*found, grown] if grown else found


class Held:
    """The models that are open: one shape's in one dtype, so that a GPU never holds more."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.key: tuple[object, ...] = ()
        self.models: Models | None = None

    def take(self, shape: Shape, dtype: str, *, trained: bool = False) -> Models:
        key = shape.size, dtype, trained and self.setting.gpu
        if self.models is None or self.key != key:
            self.close()  # first: a GPU has no room for both
            self.models, self.key = opened(shape, self.setting, dtype, trained), key
        return self.models

    def close(self) -> None:
        self.models = None


def generate(held: Held, shape: Shape, setting: Setting) -> Iterator[list[Row]]:
    models = held.take(shape, setting.kind)
    for batch in GPU_BATCHES if models.gpu else BATCHES:
        yield bench_generate(models, batch, setting.turns)


def decode(held: Held, shape: Shape, setting: Setting) -> Iterator[list[Row]]:
    if setting.gpu or setting.kind != "fp32":
        return
    models, turns, peers = held.take(shape, "fp32"), setting.turns, setting.peers
    for batch in DECODE_BATCHES[:1] if setting.quick else DECODE_BATCHES:
        programs = setting.llama2c, setting.llama_bench
        yield bench_decode(models, turns, *programs, peers=peers, batch=batch)
    if not setting.quick:  # minutes, of the larger shapes
        for length in LENGTHS:
            yield bench_prompt(models, length, turns, peers=peers)
        yield bench_behind(models, LENGTHS[-1], turns, peers=peers)
        yield bench_chat(models, turns, peers=peers)


def rollout(held: Held, shape: Shape, setting: Setting) -> Iterator[list[Row]]:
    prompts = QUICK_PROMPTS if setting.quick else 0
    yield bench_rollout(held.take(shape, setting.kind), setting.turns, prompts)


def rlhf(held: Held, shape: Shape, setting: Setting) -> Iterator[list[Row]]:
    held.close()
    cut = cut_to_fit(shape, setting, RLHF_BYTES)
    yield bench_rlhf(cut, setting.device, setting.kind, setting.turns, gpu=setting.gpu)


def fsdp(held: Held, shape: Shape, setting: Setting) -> Iterator[list[Row]]:
    held.close()
    cut = cut_to_fit(shape, setting, FSDP_BYTES)
    yield from bench_fsdp(cut, setting.device, setting.kind, setting.turns, quick=setting.quick)


def busy(held: Held, shape: Shape, setting: Setting) -> Iterator[list[Row]]:
    if not setting.gpu:
        yield bench_busy(held.take(shape, "fp32"), setting.turns)


def train(held: Held, shape: Shape, setting: Setting) -> Iterator[list[Row]]:
    models = held.take(shape, "fp32", trained=True)
    try:
        options = {"quick": setting.quick, "recompute": setting.recompute}
        yield bench_train(models, setting.turns, setting.kind, **options)
    finally:
        del models
        held.close()  # their weights have moved


BENCHES = {
    "generate": generate,
    "decode": decode,
    "rollout": rollout,
    "rlhf": rlhf,
    "fsdp": fsdp,
    "busy": busy,
    "train": train,
}


def cut_to_fit(shape: Shape, setting: Setting, bytes_a_parameter: float) -> Shape:
    """On a GPU, where nothing else is asked for, as many blocks as fit."""
    if setting.device.type != "cuda" or setting.layers:
        return shape
    memory = torch.cuda.get_device_properties(setting.device).total_memory
    return Shape(shape.size, blocks_that_fit(shape, memory, bytes_a_parameter))


def opened(shape: Shape, setting: Setting, dtype: str, trained: bool) -> Models:
    """A shape's models, to be looked at or trained in two ways each (`recompute`: in one)."""
    each = (2 - setting.recompute) * TRAINED if trained else DTYPES[dtype].itemsize
    copies = 1 + setting.peers + (setting.peers and not trained and opponents.has("vllm"))
    shape = cut_to_fit(shape, setting, each * copies)
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as folder:
        return open_models(
            shape,
            Path(folder) / "model",
            setting.device,
            dtype,
            gpu=setting.gpu,
            peers=setting.peers,
            engines=not trained,
        )


def left_out(what: str, setting: Setting) -> list[str]:
    """One line for each peer whose rows will be missing: why, and how to have them."""
    lines = []
    if setting.quick and what == "all":
        lines.append("quick: torch.compile's rows, fresh processes for memory and most rounds are")
        lines[0] += " left out; so are rounded weights (`puna bench weights --model M --text T`),"
        lines[0] += " long prompts (`puna bench decode`) and neighbours (`puna bench busy`)"
    elif what == "all":
        slow = ("growth",) if setting.gpu else (*SLOW_ON_CPU, "growth")
        lines.append(f"{', '.join(slow)} take minutes and are left out: `puna bench {slow[0]}`")
    if not setting.peers:
        return [*lines, "the peers are left out, as asked for"]
    if setting.device.type == "cuda":
        kernels, models = what in ("kernels", "all"), what in ("generate", "all")
        lines += opponents.absent((*(KERNELS * kernels), *(("vllm",) * models)))
    if what in ("train", "generate", "all") and machine.installed("transformers") is None:
        lines.append("transformers is not installed: its rows are left out (extra `peers`)")
    if what in ("decode", "all") and not setting.gpu:
        if setting.llama2c is None:
            lines.append("llama2.c: its rows are left out (give its program: --llama2c run)")
        if not llama_cpp_installed():
            lines.append("llama.cpp is not installed: its rows are left out (extra `llama-cpp`)")
    return lines
