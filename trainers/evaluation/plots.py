"""Lines as an SVG file: one axis below, one on the left, a name for each line."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import shown

Points = Sequence[tuple[float, float]]


def write_lines(
    path: Path,
    lines: Mapping[str, Points],
    *,
    title: str,
    below: str,
    left: str,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Write the lines, points (x, y) by name; `bands` are (low, high) around the points of some."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        x, y = zip(*points, strict=True)
        (line,) = axes.plot(x, y, marker=".", label=literal(name))
        if bands and name in bands:
            low, high = zip(*bands[name], strict=True)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_title(literal(title))
    axes.set_xlabel(below)
    axes.set_ylabel(left)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if all(float(x).is_integer() for points in lines.values() for x, _ in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", frameon=False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path, buffer.getvalue())


def literal(name: str) -> str:
    """A name as it stands: a dollar sign would begin a formula."""
    return shown(name).replace("$", r"\$")
