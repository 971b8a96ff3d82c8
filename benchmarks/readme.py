"""README.md's table from the committed documents: `python -m puna.benchmarks.readme`."""

import json
import sys
from typing import Any

from puna.benchmarks.output import RESULTS, named
from puna.benchmarks.rows import share_of_limit
from puna.core.checkpoint.atomic import write_text

BEGIN, END = "<!-- results: python -m puna.benchmarks.readme -->\n", "<!-- end of results -->\n"
README = RESULTS.parents[1] / "README.md"


DOCUMENTS = ("decode", "all")  # what README.md shows of each machine; what is long is folded up
MOST = 20  # rows that stand open
OURS = "puna"  # what our own ways are called, too: puna-replicated


def table(document: dict[str, Any]) -> str:
    """One line a piece of work that a peer does, too: Puna's rate, its share of the limit, and how
    they compare. (The rest stands in the documents, and on the page of `puna bench report`.)"""
    card = document["machine"]
    found = [row for row in document["rows"] if row["bench"] not in ("kernel", "growth")]
    work: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for row in found:
        done = named(row), row["shape"], row["batch"], row["dtype"]
        work.setdefault(done, {})[row["provider"]] = row
    providers = {row["provider"]: None for row in found}
    peers = [name for name in providers if not name.startswith(OURS)]
    work = {done: rows for done, rows in work.items() if rows.keys() & {*peers}}
    measured = (
        f"{card['processor']}, {card['threads']} threads, torch {card['torch']}, "
        f"transformers {card['transformers']}"
    )
    lines = [
        "| " + " | ".join(["work, shape, batch", "weights", "Puna", "of limit", *peers]) + " |",
        "|---|---|" + "---:|" * (2 + len(peers)),
    ]
    for (bench, shape, batch, dtype), rows in work.items():
        ours = rows["puna"]
        cells = [f"{bench}, {shape}, {batch}", dtype, f"{ours['value']:,.0f}"]
        cells.append(share_of_limit(ours))
        cells += [compared(ours, rows.get(name)) for name in peers]
        lines.append("| " + " | ".join(cells) + " |")
    if len(work) <= MOST:
        return "\n".join([f"{measured}: `{document['command']}`", "", *lines, ""])
    shapes = ", ".join(dict.fromkeys(shape for _, shape, _, _ in work))
    said = f"<summary>{measured}: all parts at {shapes}, {len(work)} rows</summary>"
    command = f"`{document['command']}`"
    return "\n".join(["<details>", said, "", command, "", *lines, "", "</details>", ""])


def compared(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    """A peer's rate, and how many times that Puna reaches."""
    if theirs is None:
        return ""
    return f"{theirs['value']:,.0f} ({ours['value'] / theirs['value']:.2f}x)"


def page(readme: str) -> str:
    """README.md's text with the tables of all results in place of the old ones."""
    documents = [
        json.loads((machine / f"{name}.json").read_text())
        for machine in sorted(RESULTS.iterdir())
        for name in DOCUMENTS
        if (machine / f"{name}.json").exists()
    ]
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n".join(map(table, documents)) + END + after


if __name__ == "__main__":
    write_text(README, page(README.read_text(encoding="utf-8")))
    sys.exit()
