"""The report's figures about the reward models, one function each (see `figures`)."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from puna.demo.report import drawing
from puna.demo.report.drawing import BLUE, GOLD, GRID, INK, MUTED, ORANGE, PAPER
from puna.demo.report.results import (
    RATINGS,
    REWARD_MODELS,
    Evaluation,
    accuracies,
    title,
    version_names,
    wilson,
)
from puna.trainers.rl.rewards import RAW_SAFETY_THRESHOLD

COLOURS = {"helpfulness": BLUE, "safety": ORANGE}
RATING_NAMES = ("negligibly\nbetter", "slightly\nbetter", "better", "significantly\nbetter")
# Table 8 of the paper, 70B: each model on its own test set, in the order of RATINGS.
PAPER_ACCURACY = {
    "helpfulness": (0.547, 0.609, 0.675, 0.807),
    "safety": (0.553, 0.657, 0.763, 0.943),
}
BRANCHES = (
    ("is_safety", "safety model: tagged prompt", ORANGE),
    ("unsafe", "safety model: score under 0.15", GOLD),
    ("helpfulness", "helpfulness model", BLUE),
)


def reward_accuracy(evaluation: Evaluation) -> Figure | None:
    """Share of held-out comparisons that each reward model orders as the annotator did."""
    found = [m for m in REWARD_MODELS if accuracies(evaluation, m)]
    if not found:
        return None
    figure, axes = drawing.canvas(1, len(found), 3.1, sharey=True)
    for ax, model in zip(axes, found, strict=True):
        values = accuracies(evaluation, model)
        counts = evaluation["reward_models"][model].get("counts", {})
        drawing.heading(ax, f"{model.capitalize()} model", COLOURS[model])
        for x, rating in enumerate((*RATINGS, "all")):
            if values.get(rating) is None:
                continue
            place = x + 0.35 * (rating == "all")
            count = sum(counts.values()) if rating == "all" else counts.get(rating, 0)
            _bar(ax, place, values[rating], count, COLOURS[model] if x < 4 else MUTED)
        ax.plot(range(4), PAPER_ACCURACY[model], "D", color=PAPER, markeredgecolor=INK, ms=4)
        ax.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        ax.set_xticks([0, 1, 2, 3, 4.35], [*RATING_NAMES, "all"], fontsize=7.5, color=INK)
        drawing.share_axis(ax)
    drawing.name_axes(axes[0], y="pairs ordered right")
    figure.text(
        0.99,
        0.985,
        "diamonds: the paper's 70B (Table 8)",
        ha="right",
        va="top",
        fontsize=8,
        color=MUTED,
    )
    return figure


def calibration(evaluation: Evaluation) -> Figure | None:
    """Predicted against observed share of pairs in which the first answer was preferred."""
    models = evaluation.get("reward_models", {})
    found = [m for m in REWARD_MODELS if models.get(m, {}).get("calibration")]
    if not found:
        return None
    figure, axes = drawing.canvas(1, 2, 3.3, sharey=True)
    for ax, model in zip(axes, REWARD_MODELS, strict=True):
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        drawing.heading(ax, f"{model.capitalize()} model", COLOURS[model])
        if model in found:
            points = [p for p in models[model]["calibration"] if p[2] > 0]
            for predicted, observed, count in points:
                low, high = wilson(observed, count)
                ax.plot([predicted] * 2, [low, high], color=COLOURS[model], lw=1, alpha=0.55)
            ax.plot(
                *zip(*[p[:2] for p in points], strict=True),
                "o-",
                color=COLOURS[model],
                ms=5,
                lw=1.2,
                markeredgecolor=PAPER,
            )
        drawing.share_axis(ax)
        drawing.share_axis(ax, "x")
        drawing.name_axes(ax, "predicted by the model")
    drawing.name_axes(axes[0], "predicted by the model", "observed")
    return figure


def reward_rounds(evaluation: Evaluation) -> Figure | None:
    """Accuracy on each round's fresh comparisons, before and after training on that round."""
    models = evaluation.get("reward_models", {})
    found = [m for m in REWARD_MODELS if models.get(m, {}).get("rounds")]
    if not found:
        return None
    figure, axes = drawing.canvas(1, 2, 2.7, sharey=True)
    for ax, model in zip(axes, REWARD_MODELS, strict=True):
        drawing.heading(ax, f"{model.capitalize()} model", COLOURS[model])
        rounds = models.get(model, {}).get("rounds", [])
        for x, row in enumerate(rounds):
            before, after = row.get("before"), row.get("after")
            if before is not None and after is not None:
                ax.plot([x, x], [before, after], color=COLOURS[model], lw=1.5)
            ends = []
            for value, face in ((before, PAPER), (after, COLOURS[model])):
                if value is not None:
                    ax.plot(x, value, "o", ms=6, color=face, markeredgecolor=COLOURS[model])
                    ends.append((x, value, f"{value:.0%}", COLOURS[model]))
            drawing.line_labels(ax, ends, gap=0.085)
        drawing.categories(ax, [f"round {row['round']}" for row in rounds])
        ax.set_xlim(-0.5, max(len(rounds), 1) - 0.3)
        ax.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        drawing.share_axis(ax)
    drawing.name_axes(axes[0], y="pairs ordered right")
    return figure


def reward_distribution(evaluation: Evaluation) -> Figure | None:
    """Densities of the reward models' raw scores (before the sigmoid), a row per version."""
    versions = evaluation.get("versions", {})
    names = [v for v in version_names(evaluation) if any(versions[v].get("scores", {}).values())]
    if not names:
        return None
    figure, axes = drawing.canvas(1, 2, 0.9 + 0.55 * len(names), sharey=True)
    for ax, model in zip(axes, REWARD_MODELS, strict=True):
        drawing.heading(ax, f"{model.capitalize()} model's score", COLOURS[model])
        scores = [np.asarray(versions[v]["scores"].get(model) or [], dtype=float) for v in names]
        _ridges(ax, scores, COLOURS[model])
        if model == "safety":
            ax.axvline(RAW_SAFETY_THRESHOLD, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            drawing.note(ax, RAW_SAFETY_THRESHOLD, len(names) - 0.9, " sigmoid 0.15", va="top")
        drawing.name_axes(ax, "raw score (0 is a sigmoid of one half)")
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color=GRID, linewidth=0.7)
    drawing.categories(axes[0], [title(v) for v in names], "y")
    axes[0].set_ylim(len(names) - 0.55, -1.0)
    return figure


def switch_branches(evaluation: Evaluation) -> Figure | None:
    """Which way Eq. 4's switch went for the answers of each version."""
    found = {
        v: counts for v, counts in evaluation.get("switch", {}).items() if sum(counts.values())
    }
    names = [v for v in version_names(evaluation) if v in found]
    if not names:
        return None
    figure, (ax,) = drawing.canvas(1, 1, 0.95 + 0.42 * len(names))
    for y, version in enumerate(names):
        total, left = sum(found[version].values()), 0.0
        for branch, _, colour in BRANCHES:
            share = found[version].get(branch, 0) / total
            ax.barh(y, share, left=left, height=0.56, color=colour, edgecolor=PAPER, linewidth=1)
            if share >= 0.06:
                drawing.note(
                    ax, left + share / 2, y, f"{share:.0%}", PAPER, ha="center", va="center"
                )
            left += share
    for x, (_, text, colour) in zip((0, 0.36, 0.74), BRANCHES, strict=True):
        drawing.note(ax, x, -0.55, text, colour, va="bottom")
    drawing.share_axis(ax, "x", top=1)
    drawing.categories(ax, [title(v) for v in names], "y")
    ax.set_ylim(len(names) - 0.5, -0.9)
    ax.grid(visible=False)
    drawing.name_axes(ax, "share of the answers scored")
    return figure


def _bar(ax: Axes, x: float, share: float, count: int, colour: str) -> None:
    """A bar with its value and the 95% interval of `count` trials (none where 0)."""
    ax.bar(x, share, width=0.72, color=colour, alpha=0.85, linewidth=0)
    if count:
        ax.plot([x, x], wilson(share, count), color=INK, linewidth=1)
    drawing.note(ax, x, 0.03, f"{100 * share:.0f}", PAPER, ha="center", va="bottom")


def _ridges(ax: Axes, scores: list[np.ndarray], colour: str) -> None:
    """One density a row, from the top down, all to one scale; a tick at each median."""
    present = [s for s in scores if len(s)]
    if not present:
        return
    pooled = np.concatenate(present)
    width = max(pooled.std(), 1e-3) * len(pooled) ** -0.2 * 0.7
    grid = np.linspace(pooled.min() - 3 * width, pooled.max() + 3 * width, 200)
    densities = [_density(s, grid, width) if len(s) else np.zeros_like(grid) for s in scores]
    scale = 0.92 / max(density.max() for density in densities)
    for y, (values, density) in enumerate(zip(scores, densities, strict=True)):
        ax.fill_between(grid, y, y - density * scale, color=colour, alpha=0.3, linewidth=0)
        ax.plot(grid, y - density * scale, color=colour, linewidth=1.2)
        if len(values):
            middle = float(np.median(values))
            ax.plot([middle, middle], [y, y - 0.3], color=INK, linewidth=1.4)


def _density(values: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Gaussian kernel density of `values` on `grid`."""
    distance = (grid[:, None] - values[None]) / width
    return np.exp(-0.5 * distance**2).sum(1) / (len(values) * width * np.sqrt(2 * np.pi))
