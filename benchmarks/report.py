"""`puna bench report`: one self-contained page of all results, a section a machine.

Rows that Puna loses stand among the others. What a document holds is escaped where it is shown
(demo/report/page.py), and a document that is none is named.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.benchmarks import figures, output
from puna.benchmarks.compare import document, rows_of
from puna.benchmarks.kernels import run as kernels
from puna.benchmarks.models import growth
from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import say
from puna.demo.report import page

CEILING = (
    "Each line is one piece of work, each dot a provider: its rate as a share of what this machine "
    "was seen to do, a copy of as many bytes or a matrix product. At 100% there is nothing left."
)
ROOF = (
    "Generation under its roof: FLOP/s reached, over FLOPs for each byte of weights that is read. "
    "The grey line is what the measured reading and matrix-product rates allow each shape."
)


def report(folder: Path | None = None, out: Path | None = None) -> Path:
    """Write the page of every document in `folder` (left out: the results in this repository) to
    `out` (left out: report.html beside the results); returns its path. ValueError where there is
    none, and for one that is no results file or of another format."""
    results = folder or output.RESULTS
    machines = grouped(results)
    if not machines:
        raise ValueError(f"{results} holds no results; measure some with `puna bench --save`")
    body = [page.heading("Puna: benchmarks", 1)]
    body.append(
        page.paragraph(
            "Puna beside its peers, on the same weights and threads; each figure is a median, and "
            "nothing was timed before its results were right. Where a peer is faster it says so.",
            "lead",
        )
    )
    for name, documents in machines.items():
        body += section(name, documents)
    target = out or (results if folder else results.parent) / "report.html"
    write_text(target, page.page("Puna: benchmarks", body))
    say(f"written to {target}")
    return target


def grouped(results: Path) -> dict[str, dict[Path, dict[str, Any]]]:
    """Documents by the folder they lie in."""
    if not results.is_dir():
        raise ValueError(f"{results} is no folder of results")
    found: dict[str, dict[Path, dict[str, Any]]] = {}
    for path in sorted(results.rglob("*.json")):
        read = document(path)
        rows_of(path, read)  # rates are rates
        found.setdefault(path.parent.resolve().name, {})[path] = read
    return found


def section(name: str, documents: Mapping[Path, Mapping[str, Any]]) -> Iterator[str]:
    """A machine's card, and each of its documents."""
    yield page.heading(name)
    cards = [found["machine"] for found in documents.values()]
    if len({(str(c.get("gpu")), str(c.get("processor"))) for c in cards}) > 1:
        raise ValueError(
            f"the results in {next(iter(documents)).parent} are of several machines; give each a "
            "folder of its own"
        )
    yield page.table(("machine", ""), [(key, told(value)) for key, value in cards[0].items()])
    for path, found in documents.items():
        yield page.heading(str(found.get("command", path.stem)), 3)
        try:
            yield from pieces(path.stem, found)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is of another format than this Puna's ({error} is missing); measure again"
            ) from error


def told(value: object) -> str:
    return "not installed" if value is None else str(value)


def pieces(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The drawings and the tables of a document."""
    of_kernels = [row for row in found["rows"] if row["bench"] == "kernel"]
    of_models = [row for row in found["rows"] if row["bench"] != "kernel"]
    versions = ("commit", "torch", "transformers", "llama_cpp")
    machine = found["machine"]
    card = [f"{key} {told(machine[key])}" for key in versions if key in machine]
    yield page.paragraph(", ".join(card), "small")
    fits = found.get("growth", [])
    if of_models:
        plain = [row for row in of_models if row["bench"] not in ("growth", "rlhf")]
        drawn = {
            ROOF: figures.roofline(of_models, f"roof-{name}"),
            "Tokens a second over rows at once.": figures.scaling(of_models, f"batch-{name}"),
            "Where one iteration of PPO spends its time.": figures.iteration(
                of_models, f"ppo-{name}"
            ),
            "Seconds over what grows, in logarithms, with the fitted exponents.": figures.growing(
                of_models, fits, f"growth-{name}"
            ),
        }
        if plain:
            labels = [", ".join(output.row_cells([row])[0][:4]) for row in plain]
            drawn[CEILING] = figures.shares(plain, labels, f"models-{name}", CEILING)
        yield from (page.figure(svg, caption) for caption, svg in drawn.items() if svg)
    if fits:
        yield page.table(("how cost grows",), [[growth.said(fit)] for fit in fits])
    if of_models:
        yield tabled(output.TEXTS, output.NUMBERS, output.row_cells(of_models))
    if of_kernels:
        ways = dict.fromkeys(row["direction"] for row in of_kernels)
        for way in ways:
            some = [row for row in of_kernels if row["direction"] == way]
            labels = [f"{row['operation']} {row['shape']}" for row in some]
            drawing = figures.shares(some, labels, f"{name}-{way}", CEILING)
            yield page.figure(drawing, f"{way.capitalize()}. {CEILING}")
        yield tabled(kernels.TEXTS, kernels.NUMBERS, kernels.kernel_cells(of_kernels))
        for line in kernels.not_timed(of_kernels):
            yield page.paragraph(line, "small")
    for line in found.get("left_out", []):
        yield page.paragraph(f"left out: {line}", "small")


def tabled(texts: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows with words at the left and figures at the right."""
    head = (*texts, *numbers)
    return page.table(head, rows, numbers=range(len(texts), len(head)))
