"""The report's drawings: how near each row comes to what the machine can do, and how cost grows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, PercentFormatter

from puna.benchmarks.models.shapes import multiplied_parameters
from puna.core.config import SIZES
from puna.demo.report import drawing
from puna.demo.report.drawing import BLUE, GOLD, GREEN, GRID, INK, MUTED, ORANGE, PURPLE

Rows = Sequence[Mapping[str, Any]]
COLOURS = (BLUE, GREEN, ORANGE, PURPLE, GOLD, MUTED)
OURS = {"puna": BLUE, "puna-native": GREEN}
ROW, MOST = 0.2, 60  # inches of a line in a tall figure; lines in one figure
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.125}  # of a weight as it is read


def colours(rows: Rows) -> dict[str, str]:
    """A colour for each provider, Puna's always the same."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    others = iter(c for c in COLOURS[1:] * 3 if c not in (OURS.get(n) for n in names))
    return {name: OURS.get(name) or next(others) for name in names}


def shares(rows: Rows, labels: Sequence[str], name: str, what: str) -> str:
    """Each piece of work on a line, each provider a dot at its share of the measured ceiling."""
    lines = list(dict.fromkeys(labels))
    height = 1.1 + ROW * len(lines)
    figure, (ax,) = drawing.canvas(1, 1, height)
    places = {line: place for place, line in enumerate(reversed(lines))}
    palette = colours(rows)
    for provider, colour in palette.items():
        points = [
            (row["value"] / row["limit"], places[label])
            for row, label in zip(rows, labels, strict=True)
            if row["provider"] == provider and row["value"]
        ]
        front = 3 if provider in OURS else 2
        xs, ys = [x for x, _ in points], [y for _, y in points]
        ax.scatter(xs, ys, s=22, color=colour, zorder=front, label=provider)
    ax.set_yticks(list(places.values()), list(places))
    ax.tick_params(axis="y", labelcolor=INK, labelsize=8)
    ax.grid(axis="x", color=GRID, linewidth=0.7)
    ax.axvline(1, color=MUTED, linewidth=0.9)
    ax.set_xlim(0, max(1.05, *(row["value"] / row["limit"] for row in rows if row["value"])))
    ax.set_ylim(-0.7, len(lines) - 0.3)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    drawing.name_axes(ax, x="share of the measured ceiling")
    legend(ax, len(palette))
    return drawing.inline_svg(figure, name, what)


def legend(ax: Axes, count: int) -> None:
    """Above the panel, at the left."""
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=min(count, 5), frameon=False, fontsize=8,
        handletextpad=0.3, columnspacing=1.2, borderaxespad=0.2, labelcolor=INK,
    )  # fmt: skip


def intensity(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """(FLOPs a byte of weights, FLOPs a token) of a row that generates; None where its shape is not
    known by name. (Keys and values, read besides, are in the limit and not here.)"""
    config, size = SIZES.get(row["shape"]), BYTES.get(row["dtype"])
    if row["bench"] not in ("generate", "decode", "rollout") or config is None or size is None:
        return None
    return 2 * row["batch"] / size, 2.0 * multiplied_parameters(config)


def roofline(rows: Rows, name: str) -> str | None:
    """What was reached under what the machine allows, over the work for each byte; None where
    fewer than two rows can be placed."""
    placed = [(row, found) for row in rows if (found := intensity(row)) is not None]
    if len(placed) < 2:
        return None
    figure, (ax,) = drawing.canvas(1, 1, 3.6)
    ax.grid(color=GRID, linewidth=0.7, which="major", axis="both")
    palette = colours([row for row, _ in placed])
    for provider, colour in palette.items():
        for bench, marker in (("generate", "o"), ("decode", "^"), ("rollout", "s")):
            points = [
                (x, row["value"] * flops / 1e9)
                for row, (x, flops) in placed
                if (row["provider"], row["bench"]) == (provider, bench)
            ]
            if points:
                xs, ys = [x for x, _ in points], [y for _, y in points]
                ax.scatter(xs, ys, s=30, marker=marker, color=colour, label=f"{provider}, {bench}")
    roofs: dict[tuple[str, str], dict[float, float]] = {}
    for row, (x, flops) in placed:
        roof = roofs.setdefault((row["shape"], row["dtype"]), {})
        roof[x] = max(roof.get(x, 0.0), row["limit"] * flops / 1e9)
    ends: list[tuple[float, float, str, str]] = []
    for (shape, dtype), roof in roofs.items():
        points = sorted(roof.items())
        xs, ys = [x for x, _ in points], [y for _, y in points]
        ax.plot(xs, ys, color=MUTED, linewidth=1, marker="_", zorder=1)
        if len(points) > 1:
            ends.append((xs[-1], math.log10(ys[-1]), f"{shape}, {dtype}", MUTED))
    for x, y, text, colour in spread(ends, 0.1):
        drawing.note(
            ax, x, 10**y, text, colour, xytext=(6, 0), textcoords="offset points", va="center"
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    left, right = ax.get_xlim()
    ax.set_xlim(left, right * (right / left) ** 0.12)
    drawing.name_axes(ax, x="FLOPs a byte of weights", y="GFLOP/s")
    legend(ax, 4)
    said = "GFLOP/s that were reached, under the line that the machine's measured rates allow"
    return drawing.inline_svg(figure, name, said)


def spread(
    ends: Sequence[tuple[float, float, str, str]], gap: float
) -> list[tuple[float, float, str, str]]:
    """Labels (x, y, text, colour) moved up where they would overlap."""
    found: list[tuple[float, float, str, str]] = []
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        floor = found[-1][1] + gap if found else y
        found.append((x, max(y, floor), text, colour))
    return found


def scaling(rows: Rows, name: str) -> str | None:
    """Tokens a second over the batch, a panel a shape; None where no shape has two batches."""
    shapes: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["bench"] == "generate":
            shapes.setdefault(row["shape"], []).append(row)
    shapes = {k: v for k, v in shapes.items() if len({row["batch"] for row in v}) > 1}
    if not shapes:
        return None
    figure, panels = drawing.canvas(1, len(shapes), 2.9)
    palette = colours([row for chosen in shapes.values() for row in chosen])
    for ax, (shape, chosen) in zip(panels, shapes.items(), strict=True):
        for provider, colour in palette.items():
            curve(ax, [r for r in chosen if r["provider"] == provider], "batch", "value", colour)
        ax.set_title(f"generate, {shape}", loc="left", fontsize=9.5, color=INK, pad=20)
        drawing.name_axes(ax, x="rows at once", y="tokens a second" if ax is panels[0] else "")
        for provider, colour in palette.items():
            ax.plot([], [], color=colour, marker="o", markersize=4, label=provider)
        legend(ax, len(palette))
    return drawing.inline_svg(figure, name, "tokens a second over rows generated at once")


def curve(ax: Axes, rows: Rows, x: str, y: str, colour: str) -> None:
    """Points of a provider in logarithms, joined."""
    points = sorted((float(row[x]), float(row[y])) for row in rows)
    if points:
        ax.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.4)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def growing(rows: Rows, fits: Rows, name: str) -> str | None:
    """Seconds over what grows, a panel an axis, with the fitted exponent; None without any."""
    axes: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["bench"] == "growth":
            axes.setdefault((row["operation"], row["along"]), []).append(row)
    if not axes:
        return None
    slopes = {fit["what"]: fit["exponent"] for fit in fits}
    columns = min(3, len(axes))
    lines = -(-len(axes) // columns)
    figure, panels = drawing.canvas(lines, columns, 2.1 * lines)
    for ax, ((what, along), chosen) in zip(panels, axes.items(), strict=False):
        curve(ax, chosen, "x", "seconds", BLUE)
        slope = f": {slopes[what]:.2f}" if what in slopes else ""
        drawing.heading(ax, f"{what}{slope}")
        drawing.name_axes(ax, x=along, y="seconds")
    for ax in panels[len(axes) :]:
        ax.set_axis_off()
    return drawing.inline_svg(figure, name, "seconds of a call over what grows")


def iteration(rows: Rows, name: str) -> str | None:
    """Where a PPO iteration's time goes, a bar a shape; None where none was measured."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows if "share" in row))[::-1]
    if not shapes:
        return None
    figure, (ax,) = drawing.canvas(1, 1, 0.9 + 0.45 * len(shapes))
    parts = list(dict.fromkeys(row["operation"] for row in rows if "share" in row))
    for part, colour in zip(parts, COLOURS, strict=False):
        widths, starts = [], []
        for shape in shapes:
            mine = [row for row in rows if row["shape"] == shape and "share" in row]
            before = parts[: parts.index(part)]
            starts.append(sum(r["share"] for r in mine if r["operation"] in before))
            widths.append(sum(r["share"] for r in mine if r["operation"] == part))
        ax.barh(range(len(shapes)), widths, left=starts, color=colour, height=0.55, label=part)
    drawing.categories(ax, shapes, "y")
    ax.grid(False)
    drawing.share_axis(ax, "x", 1.0)
    legend(ax, len(parts))
    return drawing.inline_svg(figure, name, "shares of a PPO iteration's seconds")
