"""README.md's table from the committed documents: `python -m puna.benchmarks.readme`."""

import json
import sys
from typing import Any

from puna.benchmarks.suite import RESULTS

BEGIN, END = "<!-- results: python -m puna.benchmarks.readme -->\n", "<!-- end of results -->\n"
README = RESULTS.parents[1] / "README.md"


def table(document: dict[str, Any]) -> str:
    """One line a piece of work: Puna, its peer, and how they compare."""
    card = document["machine"]
    work: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for row in document["rows"]:
        done = row["bench"], row["shape"], row["batch"], row["dtype"]
        work.setdefault(done, {})[row["provider"]] = row
    lines = [
        f"{card['processor']}, {card['threads']} threads, fp32, torch {card['torch']}, "
        f"transformers {card['transformers']}: `{document['command']}`",
        "",
        "| work | shape | batch | Puna, tok/s | transformers, tok/s | times |",
        "|---|---|---|---|---|---|",
    ]
    for (bench, shape, batch, _), rows in work.items():
        if {"puna", "transformers"} <= rows.keys():
            ours, theirs = rows["puna"]["value"], rows["transformers"]["value"]
            lines.append(
                f"| {bench} | {shape} | {batch} | {ours:,.0f} | {theirs:,.0f} | "
                f"{ours / theirs:.2f} |"
            )
    return "\n".join(lines) + "\n"


def page(readme: str) -> str:
    """README.md's text with the tables of all results in place of the old ones."""
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/all.json"))]
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n".join(map(table, documents)) + END + after


if __name__ == "__main__":
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit()
