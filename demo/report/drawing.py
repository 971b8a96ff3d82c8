"""How the demo's figures look: one palette, quiet axes, labels beside the data, SVG output.

Matplotlib's object interface throughout: no pyplot, so nothing global is drawn on. Text stays text
in the SVG, and in the report the colours become CSS variables, so that figures follow the page's
light or dark scheme.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, PercentFormatter

from puna.core.checkpoint.atomic import write_text

WIDTH = 7.2  # inches; the page shows it about 1.4 times as large

# Okabe and Ito's colour-blind safe hues, darkened where they carry text.
INK, MUTED, GRID, PAPER = "#1f2328", "#66707c", "#dfe3e8", "#fefefe"
BLUE, ORANGE, GREEN, PURPLE, GOLD = "#0068a8", "#c65100", "#00845f", "#9c4f8c", "#a87400"
CSS_NAMES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--page",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
    GOLD: "--gold",
}
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def canvas(rows: int, columns: int, height: float, **options) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with rows x columns quiet axes, row by row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    found = [ax for row in grid for ax in row]
    for ax in found:
        quiet(ax)
    return figure, found


def quiet(ax: Axes) -> None:
    """No frame, light grid behind the data, small muted ticks."""
    ax.set_facecolor("none")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.spines["bottom"].set_linewidth(0.7)
    ax.set_axisbelow(True)
    ax.grid(axis="y", color=GRID, linewidth=0.7)
    ax.tick_params(labelsize=8.5, length=0, colors=MUTED, pad=4)


def heading(ax: Axes, text: str, colour: str = INK) -> None:
    """What the panel shows, above it at the left."""
    ax.set_title(text, loc="left", fontsize=9.5, color=colour, pad=8)


def note(ax: Axes, x: float, y: float, text: str, colour: str = MUTED, **options) -> None:
    """Text at data coordinates."""
    ax.annotate(text, (x, y), **{"color": colour, "fontsize": 8.5, **options})


def name_axes(ax: Axes, x: str = "", y: str = "") -> None:
    """Say what an axis counts."""
    ax.set_xlabel(x, fontsize=8.5, color=MUTED)
    ax.set_ylabel(y, fontsize=8.5, color=MUTED)


def share_axis(ax: Axes, which: str = "y", top: float = 1.04) -> None:
    """0 to 100%, always the whole of it."""
    axis = ax.yaxis if which == "y" else ax.xaxis
    (ax.set_ylim if which == "y" else ax.set_xlim)(0, top)
    axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def categories(ax: Axes, names: Sequence[str], which: Literal["x", "y"] = "x") -> None:
    """Names at 0, 1, 2, ... along an axis."""
    (ax.set_xticks if which == "x" else ax.set_yticks)(range(len(names)), list(names))
    ax.tick_params(axis=which, labelcolor=INK)


def line_labels(
    ax: Axes,
    ends: Sequence[tuple[float, float, str, str]],
    gap: float,
    least: float = float("-inf"),
) -> None:
    """Names (x, y, text, colour) at the lines' right ends, moved up where they would overlap.

    gap: least distance of two labels, least: where the lowest may stand, in units of the y axis.
    """
    floor = least - gap
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        floor = max(y, floor + gap)
        note(ax, x, floor, text, colour, xytext=(6, 0), textcoords="offset points", va="center")


def room_for_labels(ax: Axes, last: float, share: float = 0.3) -> None:
    """An x axis from 0 to `last` that goes on, without ticks, for the labels of the lines."""
    ax.set_xlim(0, last * (1 + share))
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= last])


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG document; the same figure gives the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"(?s)^.*?(?=<svg )", "", buffer.getvalue())
    text = re.sub(r"(?s) *<metadata>.*?</metadata>\n", "", text)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # of no use, and twice in one page
    return re.sub(r"(font: [^;\"]*?px) [^;\"]*", rf"\1 {FONTS}", text)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """For the report: colours as CSS variables, size from the page, `description` for readers
    who cannot see it (plain text without markup)."""
    text = to_svg(figure, name)
    for colour, variable in CSS_NAMES.items():
        text = text.replace(colour, f"var({variable})")
    label = re.sub(r"[<>&\"]", " ", description)
    return re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg role="img" aria-label="{label}" \1>', text
    )


def save_svg(figure: Figure, path: Path) -> Path:
    """For a page of documentation: opaque, readable on any background."""
    figure.set_facecolor(PAPER)
    write_text(path, to_svg(figure, path.stem))
    figure.set_facecolor("none")
    return path
