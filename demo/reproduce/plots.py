"""The figures of the experiments: means with their intervals, arm by arm.

Each gives a matplotlib Figure, or None where nothing of what it shows was measured.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from puna.demo.report import drawing
from puna.demo.report.drawing import BLUE, GOLD, GREEN, GRID, INK, MUTED, ORANGE, PAPER, PURPLE
from puna.demo.report.figures import PAPER_KEPT
from puna.demo.reproduce.arms import SFT, title_of
from puna.demo.reproduce.tables import Results, figure, is_score
from puna.demo.village.world import MEASURED_TURNS

GHOSTS = {
    "ghost": BLUE,
    "ghost-unfiltered": GREEN,
    "ghost-unmasked": PURPLE,
    "ghost-once": GOLD,
    "rejection": ORANGE,
}
JUDGED = (SFT, "rejection", "sum", "mixed", "helpfulness-alone", "safety-alone")
IMPROVED = (
    SFT, "lot", "rejection", "ppo", "half", "both", "on-top", "on-top-warm", "on-top-again",
    "on-top-again-warm", "on-top-oracle", "second", "second-temperature", "ppo-unwhitened",
    "ppo-no-kl", "ppo-no-switch",
)  # fmt: skip
RANKED = ("margin-none", "margin-small", "margin-large")
POOLS = (SFT, "rejection", "pool-all", "pool-last")

LABEL_GAP = 0.075  # of two labels, on an axis from 0 to 1

Panel = tuple[str, str, bool]
"""Figure, heading, whether its axis is all of 0% to 100%"""


def instructions(results: Results) -> Figure | None:
    """Greedy answers that keep the instruction, by their number: Ghost Attention's arms."""
    if not any(figure(results, arm, "kept value 1") for arm in GHOSTS):
        return None
    headings = {"kind": "A kind never trained on", "seen": "Trained values"}
    headings["value"] = "Held-out values"
    drawn, axes = drawing.canvas(1, 3, 3.4, sharey=True)
    for ax, (which, heading) in zip(axes, headings.items(), strict=True):
        drawing.heading(ax, heading)
        ends = []
        for arm, colour in GHOSTS.items():
            found = [(t, figure(results, arm, f"kept {which} {t}")) for t in MEASURED_TURNS]
            points = [(turn, estimate) for turn, estimate in found if estimate]
            for turn, estimate in points:
                ax.plot([turn] * 2, [estimate.low, estimate.high], color=colour, linewidth=0.9)
            ax.plot(
                [turn for turn, _ in points],
                [estimate.mean for _, estimate in points],
                "-o", color=colour, ms=4, lw=1.2, markeredgecolor=PAPER,
            )  # fmt: skip
            if points:
                name = "without" if arm == "rejection" else title_of(arm)
                ends.append((points[-1][0], points[-1][1].mean, name, colour))
        for shares in PAPER_KEPT.values():
            ax.plot(list(shares), list(shares.values()), "D", ms=4, color=PAPER,
                    markeredgecolor=MUTED, zorder=0)  # fmt: skip
        drawing.share_axis(ax)
        drawing.name_axes(ax, "answer (hollow: the paper)", "keep the instruction")
        if which == "value":
            drawing.room_for_labels(ax, MEASURED_TURNS[-1], 0.9)
            drawing.line_labels(ax, below_the_top(ends), gap=LABEL_GAP)
    return drawn


def attention(results: Results) -> Figure | None:
    """Fig. 10: the largest attention to the instruction, by answer, with Ghost Attention and
    without."""
    arms = {"ghost": ("with", BLUE), "rejection": ("without", ORANGE)}
    if not any(figure(results, arm, "attention 1") for arm in arms):
        return None
    drawn, (ax,) = drawing.canvas(1, 1, 2.8)
    ends = []
    for arm, (name, colour) in arms.items():
        found = [(turn, figure(results, arm, f"attention {turn}")) for turn in MEASURED_TURNS]
        points = [(turn, estimate) for turn, estimate in found if estimate]
        for turn, estimate in points:
            ax.plot([turn] * 2, [estimate.low, estimate.high], color=colour, linewidth=0.9)
        turns, means = [turn for turn, _ in points], [estimate.mean for _, estimate in points]
        ax.plot(turns, means, "-o", color=colour, ms=4, lw=1.2, markeredgecolor=PAPER)
        ends += [(turns[-1], means[-1], name, colour)] if points else []
    ax.set_ylim(0, 1)
    drawing.name_axes(ax, "answer", "largest attention weight")
    drawing.room_for_labels(ax, MEASURED_TURNS[-1], 0.3)
    drawing.line_labels(ax, ends, gap=LABEL_GAP)
    return drawn


def below_the_top(
    ends: Sequence[tuple[float, float, str, str]],
) -> list[tuple[float, float, str, str]]:
    """Labels of lines that end side by side near the top, moved down so that all have room."""
    ordered = sorted(ends, key=lambda end: -end[1])
    return [
        (x, min(y, 1 - LABEL_GAP * place), text, colour)
        for place, (x, y, text, colour) in enumerate(ordered)
    ]


def judged(results: Results) -> Figure | None:
    """What policy each way of combining two judgements yields."""
    return dots(
        results,
        JUDGED,
        (
            ("violations t1", "Violations", True),
            ("helpful t1", "Helpful answers", True),
            ("borderline refusals t1", "Refusals, borderline", True),
        ),
    )


def improved(results: Results) -> Figure | None:
    """Wins by the oracle and the reward that was optimised, side by side."""
    return dots(
        results,
        IMPROVED,
        (
            ("wins t1", "Wins, T=1", False),
            ("wins greedy", "Wins, greedy", False),
            ("reward t1", "Reward, T=1", False),
        ),
    )


def ranked(results: Results) -> Figure | None:
    """Reward models by their margin."""
    return dots(
        results,
        RANKED,
        (
            ("right significantly_better", "Clear pairs in order", False),
            ("right negligibly_better", "Near ties in order", False),
            ("at the ends", "Scores at the ends", False),
        ),
    )


def repeated(results: Results) -> Figure | None:
    """The skill that no judge sees."""
    return dots(
        results,
        POOLS,
        (
            ("repeat t1", "Words said again rightly, T=1", True),
            ("repeat greedy", "The same, greedy", True),
        ),
    )


def dots(results: Results, arms: Sequence[str], panels: Sequence[Panel]) -> Figure | None:
    """Arms from top to bottom, one panel a figure; an arm that was not measured is left out. An
    axis that is not all of 0% to 100% begins where the intervals do."""
    shown = [arm for arm in arms if any(figure(results, arm, name) for name, _, _ in panels)]
    if not shown:
        return None
    drawn, axes = drawing.canvas(1, len(panels), 0.9 + 0.27 * len(shown), sharey=True)
    for ax, (name, heading, whole) in zip(axes, panels, strict=True):
        drawing.heading(ax, heading)
        row_of_dots(ax, results, shown, name)
        if whole:
            drawing.share_axis(ax, "x", top=1)
        elif not is_score(name):
            ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color=GRID, linewidth=0.7)
        ax.tick_params(labelsize=8)
    drawing.categories(axes[0], [title_of(arm) for arm in shown], "y")
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    return drawn


def row_of_dots(ax: Axes, results: Results, arms: Sequence[str], name: str) -> None:
    """One mean with its interval an arm; the model that all start from is hollow."""
    for y, arm in enumerate(arms):
        if (found := figure(results, arm, name)) is None:
            continue
        colour = MUTED if arm == SFT else BLUE
        ax.plot([found.low, found.high], [y, y], color=colour, linewidth=1.4)
        face = PAPER if arm == SFT else colour
        ax.plot(found.mean, y, "o", ms=5, color=face, mec=colour, zorder=3, clip_on=False)
        if arm == "rejection":
            ax.axvline(found.mean, color=INK, linewidth=0.5, alpha=0.5, zorder=0)
