"""The suite: opens each shape, runs the benches, prints the card, a table and the document."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from puna.benchmarks import machine
from puna.benchmarks.models.decode import bench_decode
from puna.benchmarks.models.decode_peers import llama_cpp_installed
from puna.benchmarks.models.generate import BATCHES, GPU_BATCHES, bench_generate
from puna.benchmarks.models.rollout import bench_rollout
from puna.benchmarks.models.shapes import Models, Shape, blocks_that_fit, open_models
from puna.benchmarks.models.train import bench_train
from puna.benchmarks.rows import Row
from puna.core.checkpoint.atomic import write_text

SHAPES, GPU_SHAPES = ("demo", "15m"), ("7b",)
TRAINED, LOOKED_AT = 16, 2  # bytes a parameter: fp32 with AdamW's state, and bf16
RESULTS = Path(__file__).parent / "results"


class Setting(NamedTuple):
    """What is measured, and how."""

    device: torch.device
    rounds: int = 5
    shapes: Sequence[str] = ()  # none: SHAPES, on a GPU GPU_SHAPES
    layers: int = 0  # blocks kept of each; 0: on a GPU as many as fit, else all
    peers: bool = True
    dry: bool = False  # a GPU's rows on a CPU, with tiny models: whether all of it runs

    @property
    def gpu(self) -> bool:
        return self.dry or self.device.type == "cuda"


def run_suite(
    what: str,
    setting: Setting,
    *,
    command: str,
    save: bool = False,
    llama2c: Path | None = None,
) -> dict[str, object]:
    """Measure "train", "generate", "decode", "rollout" or "all"; the last line printed is the
    JSON document.

    Returns the document {"machine": ..., "command": ..., "rows": [...]}. With `save` it is also
    written to results/<machine>/<what>.json beside this file. `llama2c`: where its run lies.
    Raises ValueError for a shape that is not known.
    """
    shapes = [
        Shape(name, setting.layers, tiny=setting.dry)
        for name in setting.shapes or (GPU_SHAPES if setting.gpu else SHAPES)
    ]
    for shape in shapes:
        shape.check()
    # never squeeze a figure away
    console = Console(width=max(120, Console().width), markup=False, emoji=False)
    card = machine.card(setting.device)
    console.print(card_table(card))
    for line in left_out(what, setting, llama2c):
        console.print(line)
    found: list[Row] = []
    for shape in shapes:
        # Generation first: the training bench moves the weights.
        models = None
        if what != "train":
            models = opened(shape, setting, "bf16" if setting.gpu else "fp32")
            found += looked_at(what, models, setting, llama2c)
        if what in ("train", "all"):
            if models is None or setting.gpu:
                models = None  # or a GPU would hold what generated beside what trains
                models = opened(shape, setting, "fp32")
            found += bench_train(models, setting.rounds)
    console.print(rows_table(found))
    document: dict[str, object] = {"machine": card, "command": command, "rows": found}
    if save:
        console.print(f"written to {write_document(document, what)}")
    print(json.dumps(document))
    return document


def opened(shape: Shape, setting: Setting, dtype: str) -> Models:
    """A shape's models; on a GPU, where nothing else is asked for, of as many blocks as fit."""
    if setting.device.type == "cuda" and not setting.layers:
        copies = 2 if setting.peers else 1
        each = LOOKED_AT if dtype == "bf16" else 2 * TRAINED  # trained in two ways
        memory = torch.cuda.get_device_properties(setting.device).total_memory
        shape = Shape(shape.size, blocks_that_fit(shape.size, memory, each * copies))
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as folder:
        return open_models(
            shape,
            Path(folder) / shape.size,
            setting.device,
            dtype,
            gpu=setting.gpu,
            peers=setting.peers,
        )


def looked_at(what: str, models: Models, setting: Setting, llama2c: Path | None) -> list[Row]:
    """The rows that leave the weights as they are."""
    found: list[Row] = []
    rounds = setting.rounds
    if what in ("generate", "all"):
        for batch in GPU_BATCHES if models.gpu else BATCHES:
            found += bench_generate(models, batch, rounds)
    if what in ("decode", "all"):
        found += bench_decode(models, rounds, llama2c, peers=setting.peers)
    if what == "rollout" or (what == "all" and models.gpu):  # on a CPU it takes minutes
        found += bench_rollout(models, rounds)
    return found


def left_out(what: str, setting: Setting, llama2c: Path | None) -> list[str]:
    """One line for each peer whose rows will be missing: why, and how to have them."""
    lines = []
    if not setting.peers:
        return ["the peers are left out, as asked for"]
    if what in ("train", "generate", "all") and machine.installed("transformers") is None:
        lines.append("transformers is not installed: its rows are left out (extra `peers`)")
    if what in ("decode", "all") and not setting.gpu:
        if llama2c is None:
            lines.append("llama2.c: its rows are left out (give its program: --llama2c run)")
        if not llama_cpp_installed():
            lines.append("llama.cpp is not installed: its rows are left out (extra `llama-cpp`)")
    return lines


def write_document(document: dict[str, object], what: str) -> Path:
    """results/<machine>/<what>.json; a newer run of the same takes its place."""
    card = document["machine"]
    assert isinstance(card, dict)
    path = RESULTS / machine.slug(card) / f"{what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")
    return path


def card_table(card: dict[str, object]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in card.items():
        table.add_row(name, "not installed" if value is None else str(value))
    return table


def rows_table(found: list[Row]) -> Table:
    """A peer's row says how many times its rate Puna reaches at the same work."""

    def work(row: Row) -> tuple[str, str, int, str]:
        return row["bench"], row["shape"], row["batch"], row["dtype"]

    ours = {work(row): row["value"] for row in found if row["provider"] == "puna"}
    table = Table()
    for heading in ("bench", "shape", "batch", "dtype", "provider"):
        table.add_column(heading)
    for heading in ("tok/s", "p20", "p80", "of limit", "puna is", "error", "peak MB"):
        table.add_column(heading, justify="right")
    for row in found:
        peer = row["provider"] != "puna" and work(row) in ours
        table.add_row(
            row["bench"],
            row["shape"],
            str(row["batch"]),
            row["dtype"],
            row["provider"],
            f"{row['value']:,.0f}",
            f"{row['p20']:,.0f}",
            f"{row['p80']:,.0f}",
            f"{row['value'] / row['limit']:.0%}",
            f"{ours[work(row)] / row['value']:.2f}x" if peer else "",
            f"{row['error']:.1e}",
            "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}",
        )
    return table
