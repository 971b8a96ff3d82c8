"""The suite: opens each shape, runs the benches, prints the card, a table and the document."""

import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from puna.benchmarks import machine
from puna.benchmarks.models.decode import bench_decode
from puna.benchmarks.models.decode_peers import llama_cpp_installed
from puna.benchmarks.models.generate import BATCHES, bench_generate
from puna.benchmarks.models.rollout import bench_rollout
from puna.benchmarks.models.shapes import open_models
from puna.benchmarks.models.train import bench_train
from puna.benchmarks.rows import Row
from puna.core.checkpoint.atomic import write_text

SHAPES = ("demo", "15m")
RESULTS = Path(__file__).parent / "results"


def run_suite(
    what: str,
    *,
    rounds: int,
    device: torch.device,
    command: str,
    save: bool = False,
    llama2c: Path | None = None,
) -> dict[str, object]:
    """Measure "train", "generate", "decode", "rollout" or "all"; the last line printed is the
    JSON document.

    Returns the document {"machine": ..., "command": ..., "rows": [...]}. With `save` it is also
    written to results/<machine>/<what>.json beside this file. `llama2c`: where its run lies.
    """
    console = Console(
        width=max(120, Console().width), markup=False, emoji=False
    )  # never squeeze a figure away
    card = machine.card(device)
    console.print(card_table(card))
    for line in left_out(what, device, llama2c):
        console.print(line)
    found: list[Row] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(prefix="puna-bench-") as folder:
            models = open_models(shape, Path(folder) / shape, device)
        # Generation first: the training bench moves the weights.
        if what in ("generate", "all"):
            for batch in BATCHES:
                found += bench_generate(models, batch, rounds)
        if what in ("decode", "all"):
            found += bench_decode(models, rounds, llama2c)
        if what == "rollout":  # minutes: not part of "all"
            found += bench_rollout(models, rounds)
        if what in ("train", "all"):
            found += bench_train(models, rounds)
    console.print(rows_table(found))
    document: dict[str, object] = {"machine": card, "command": command, "rows": found}
    if save:
        console.print(f"written to {write_document(document, what)}")
    print(json.dumps(document))
    return document


def left_out(what: str, device: torch.device, llama2c: Path | None) -> list[str]:
    """One line for each peer whose rows will be missing: why, and how to have them."""
    lines = []
    if what in ("train", "generate", "all") and machine.installed("transformers") is None:
        lines.append("transformers is not installed: its rows are left out (extra `peers`)")
    if what in ("decode", "all") and device.type == "cpu":
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
