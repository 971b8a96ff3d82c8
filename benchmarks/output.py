"""What a run prints and writes: the card, a table, one JSON document."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from puna.benchmarks import machine
from puna.benchmarks.rows import Row, is_above, share_of_limit
from puna.core.checkpoint.atomic import write_text

RESULTS = Path(__file__).parent / "results"


def wide_console() -> Console:
    """One that never squeezes a figure away."""
    return Console(width=max(180, Console().width), markup=False, emoji=False)


def write_document(document: Mapping[str, object], what: str) -> Path:
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


def named(row: Row) -> str:
    """The bench, the part of it, and what share of the whole's time that takes."""
    part = f" {row['operation']}" if "operation" in row else ""
    part += f", {row['ranks']} rank{'s' * (row['ranks'] > 1)}" if "ranks" in row else ""
    share = f" ({row['share']:.0%})" if "share" in row else ""
    return f"{row['bench']}{part}{share}"


def above_limit(found: Sequence[Row]) -> list[str]:
    """A line for each row whose rate is beyond its limit."""
    return [
        f"above its limit, so do not trust it: {named(row)} {row['shape']} {row['batch']} "
        f"{row['dtype']} {row['provider']} (the machine was slower while its ceilings were timed, "
        "or weights stayed in a cache); measure again"
        for row in found
        if is_above(row)
    ]


TEXTS = ("bench", "shape", "batch", "dtype", "provider")
NUMBERS = ("tok/s", "p20", "p80", "of limit", "puna is", "error", "peak MB")


def rows_table(found: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    return table_of(TEXTS, NUMBERS, row_cells(found))


def table_of(texts: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of cells for a terminal, under headings of texts and then of numbers."""
    table = Table()
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    for cells in rows:
        table.add_row(*cells)
    return table


def row_cells(found: Sequence[Row]) -> list[list[str]]:
    """The cells of each row. A peer's says how many times its rate Puna reaches at the same
    work."""

    def work(row: Row) -> tuple[object, ...]:
        done = row["bench"], row["shape"], row["batch"], row["dtype"]
        return *done, row.get("operation"), row.get("ranks")

    ours = {work(row): row["value"] for row in found if row["provider"] == "puna"}
    table = []
    for row in found:
        peer = row["provider"] != "puna" and work(row) in ours
        table.append(
            [
                named(row),
                row["shape"],
                str(row["batch"]),
                row["dtype"],
                row["provider"],
                f"{row['value']:,.0f}",
                f"{row['p20']:,.0f}",
                f"{row['p80']:,.0f}",
                share_of_limit(row),
                f"{ours[work(row)] / row['value']:.2f}x" if peer else "",
                "" if row["error"] is None else f"{row['error']:.1e}",
                "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}",
            ]
        )
    return table
