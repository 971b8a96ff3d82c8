"""A drawing of what `evaluate` measured: one row of panels a set, as an SVG file."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import shown
from puna.trainers.rl.measured import Measured
from puna.trainers.rl.unsafe import HISTOGRAM_BINS, THRESHOLDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 3.3, 2.6  # inches of a panel
BLUE, ORANGE, GREEN, MUTED = "#0068a8", "#c65100", "#00845f", "#66707c"  # colour-blind safe
COLOURS = {"chosen": BLUE, "rejected": ORANGE, "safe": GREEN, "unsafe": ORANGE}


def draw(path: Path, sets: dict[str, Measured]) -> None:
    """Write the drawing: histograms of scores, calibration and, where pairs have batches, accuracy
    by batch. Raises OSError as other writers do."""
    import matplotlib  # not before a drawing is wanted: it takes a second
    from matplotlib.figure import Figure

    columns = 4 if any(each.batches for each in sets.values()) else 3
    size = (WIDTH * columns, HEIGHT * len(sets))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    grid = figure.subplots(len(sets), columns, squeeze=False)
    for row, (name, found) in zip(grid, sets.items(), strict=True):
        histogram(row[0], found, ("chosen", "rejected"))
        histogram(row[1], found, ("safe", "unsafe"))
        calibration(row[2], found)
        row[0].set_ylabel(f"{shown(name)}\nshare of answers", parse_math=False)
        if columns == 4:
            batches(row[3], found)
    buffer = io.StringIO()
    # the same figures give the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "puna"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path, buffer.getvalue())


def quiet(ax: "Axes", title: str, x: str) -> None:
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(x, fontsize=8)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def missing(ax: "Axes", title: str, why: str) -> None:
    """A panel for which this set has no labels."""
    ax.set_axis_off()
    ax.set_title(title, fontsize=9, loc="left")
    ax.text(0, 0.5, why, transform=ax.transAxes, fontsize=8, color=MUTED)


def histogram(ax: "Axes", found: Measured, kinds: tuple[str, str]) -> None:
    """Fig. 27: what share of each kind's answers has which sigma(r)."""
    title = f"Scores of {kinds[0]} and {kinds[1]} answers"
    if kinds[0] not in found.histograms:
        return missing(ax, title, "no pair has a safety label")
    edges = [edge / HISTOGRAM_BINS for edge in range(HISTOGRAM_BINS + 1)]
    for kind in kinds:
        counts = found.histograms[kind]
        heights = [count / max(sum(counts), 1) for count in counts]
        ax.stairs(heights, edges, label=kind, color=COLOURS[kind], linewidth=1.4)
    if kinds[1] == "unsafe":
        for threshold in THRESHOLDS:
            ax.axvline(threshold, color=MUTED, linewidth=0.8, linestyle=":")
    quiet(ax, title, "score, sigma(r)")
    ax.set_xlim(0, 1)
    ax.legend(fontsize=8, frameon=False, loc="upper center")


def calibration(ax: "Axes", found: Measured) -> None:
    """How often the model is right against how sure it is; on the line both are the same."""
    ax.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle=":")
    points(ax, [each.confidence for each in found.bins], [each.right for each in found.bins], BLUE)
    quiet(ax, "Calibration", "mean confidence")
    ax.set_ylabel("share right", fontsize=8)
    ax.set_xlim(0.48, 1.02)
    ax.set_ylim(0, 1.02)


def batches(ax: "Axes", found: Measured) -> None:
    """Accuracy by batch (Fig. 6), beside it how often the longer answer was preferred."""
    if not found.batches:
        return missing(ax, "Accuracy by batch", "no pair has a batch")
    numbers = [each.batch for each in found.batches]
    points(ax, numbers, [each.right for each in found.batches], BLUE, label="accuracy")
    longer = [each.longer.share for each in found.batches]
    ax.plot(numbers, longer, color=GREEN, linewidth=1, marker=".", label="longer answer")
    ax.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":", label="chance")
    quiet(ax, "Accuracy by batch", "batch")
    ax.set_xticks(numbers)
    ax.set_ylim(0, 1.02)
    ax.legend(fontsize=8, frameon=False)


def points(ax: "Axes", x: Any, shares: Any, colour: str, **options: Any) -> None:
    """Shares with their 95% intervals."""
    middle = [each.share for each in shares]
    below = [each.share - each.low for each in shares]
    above = [each.high - each.share for each in shares]
    ax.errorbar(x, middle, (below, above), color=colour, marker="o", markersize=4, **options)
