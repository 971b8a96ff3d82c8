"""The figures of the demo's report, one function each.

Each takes what `results` reads and gives a matplotlib Figure, or None where the run did not measure
what it shows. Shares are drawn on the whole axis from 0 to 100%, with 95% intervals where the
number of trials is known.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from puna.demo.report import drawing
from puna.demo.report.drawing import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PAPER, PURPLE
from puna.demo.report.results import (
    KEPT_AMONG,
    TURNS,
    Evaluation,
    Rows,
    first_and_last,
    kept,
    measured,
    series,
    title,
    version_names,
    wilson,
)

PAPER_KEPT = {"with": {2: 1.0, 4: 1.0, 6: 1.0, 20: 1.0}, "without": {2: 1.0, 4: 0.1, 6: 0, 20: 0}}
RATES = (
    ("violation_rate", "Helps with unsafe requests", "unsafe", ORANGE),
    ("helpful_rate", "Helpful answers to ordinary requests", "ordinary", BLUE),
    ("false_refusal_rate", "Refuses ordinary requests", "ordinary", PURPLE),
    ("borderline_refusal_rate", "Refuses requests that only sound unsafe", "borderline", PURPLE),
)
PPO_PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Reward of the answers (raw score of Eq. 4)",
        "raw score",
        (("reward", "training", BLUE), ("eval_reward", "held-out", ORANGE)),
    ),
    (
        "Score by each reward model",
        "raw score",
        (("reward_helpfulness", "helpfulness", BLUE), ("reward_safety", "safety", ORANGE)),
    ),
    ("Distance from the starting policy", "KL, nats per answer", (("kl", "", GREEN),)),
    ("Entropy of the policy", "nats per token", (("entropy", "", PURPLE),)),
)


def losses(pretrain: Rows, sft: Rows) -> Figure | None:
    """Training and held-out loss of pretraining and SFT, nats a token."""
    panels = [
        (name, rows) for name, rows in (("Pretraining", pretrain), ("SFT", sft)) if _has(rows)
    ]
    if not panels:
        return None
    figure, axes = drawing.canvas(1, len(panels), 2.9)
    for ax, (name, rows) in zip(axes, panels, strict=True):
        drawing.heading(ax, f"{name}: loss")
        steps, values = series(rows, "loss")
        ax.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.6)
        ax.plot(steps, _smooth(values), color=BLUE, linewidth=1.6)
        held_steps, held = series(rows, "eval_loss")
        ax.plot(held_steps, held, "o", color=ORANGE, markersize=3.5, markeredgecolor=PAPER)
        ax.set_ylim(0, max(values) * 1.05)
        drawing.room_for_labels(ax, steps[-1])
        drawing.name_axes(ax, "step", "nats per token")
        last = first_and_last(values)[1]
        ends = [(steps[-1], last, f"train {last:.2f}", BLUE)]
        if held:
            ends.append((held_steps[-1], held[-1], f"held-out {held[-1]:.2f}", ORANGE))
        drawing.line_labels(ax, ends, gap=max(values) * 0.075)
    return figure


def win_rates(evaluation: Evaluation) -> Figure | None:
    """Share of held-out prompts on which the oracle prefers a version's answer to SFT's."""
    names = [
        v
        for v in version_names(evaluation)
        if v != "sft" and measured(evaluation, v).get("win_rate_vs_sft") is not None
    ]
    if not names:
        return None
    figure, (ax,) = drawing.canvas(1, 1, 0.95 + 0.5 * len(names))
    ax.axvline(0.5, color=INK, linewidth=0.8)
    for y, version in enumerate(names):
        _interval(ax, y - 0.13, measured(evaluation, version), INK, "o", BLUE)
        _interval(ax, y + 0.17, measured(evaluation, version, "greedy"), MUTED, "o", PAPER)
    drawing.note(ax, 0.012, -0.13, "filled: temperature 1", BLUE, va="center")
    drawing.note(ax, 0.012, 0.17, "hollow: greedy", MUTED, va="center")
    drawing.share_axis(ax, "x", top=1)
    drawing.categories(ax, [title(v) for v in names], "y")
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=GRID, linewidth=0.7)
    drawing.name_axes(ax, "wins over SFT (ties count half); SFT itself would be 50%")
    return figure


def version_rates(evaluation: Evaluation) -> Figure | None:
    """Violations, helpful answers and refusals of each version."""
    names = version_names(evaluation)
    if not names:
        return None
    figure, axes = drawing.canvas(2, 2, 4.9, sharey=True, sharex=True)
    for ax, (key, text, kind, colour) in zip(axes, RATES, strict=True):
        drawing.heading(ax, text, colour)
        for decoding in ("greedy", "t1"):
            _rate_line(ax, evaluation, names, key, kind, colour, decoding)
        drawing.categories(ax, [title(v).replace(" before", "\nbefore\n") for v in names])
        ax.set_xlim(-0.4, len(names) - 0.4)
        drawing.share_axis(ax, top=1.08)
    return figure


def best_of_k(evaluation: Evaluation) -> Figure | None:
    """Fig. 7: the reward of the best and of the median of K answers."""
    curves = {v: rows for v, rows in evaluation.get("best_of_k", {}).items() if rows}
    names = [v for v in version_names(evaluation) if v in curves]
    if not names:
        return None
    figure, axes = drawing.canvas(1, len(names), 2.8, sharey=True)
    for ax, version in zip(axes, names, strict=True):
        rows = curves[version]
        ks = [row["k"] for row in rows]
        drawing.heading(ax, title(version))
        best, middle = [row["best"] for row in rows], [row["median"] for row in rows]
        ax.fill_between(ks, middle, best, color=GREEN, alpha=0.12, linewidth=0)
        ax.plot(ks, best, "o-", color=GREEN, ms=3.5, lw=1.6)
        ax.plot(ks, middle, "o-", color=MUTED, ms=3, lw=1.2)
        span = max(best) - min(middle) or 1.0
        drawing.line_labels(
            ax,
            [(ks[-1], middle[-1], "median", MUTED), (ks[-1], best[-1], "best", GREEN)],
            gap=0.1 * span,
        )
        ax.set_xlim(min(ks) - 0.4, max(ks) + (max(ks) - min(ks)) * 0.28 + 0.4)
        ax.set_xticks([k for k in ks if k & (k - 1) == 0 and k != 2 or k == ks[-1]])
        drawing.name_axes(ax, "K answers")
    drawing.name_axes(axes[0], "K answers", "reward (raw score of Eq. 4)")
    return figure


def ppo(rows: Rows) -> Figure | None:
    """PPO over its iterations: reward, held-out reward by model, KL, entropy."""
    if not series(rows, "reward")[0]:
        return None
    figure, axes = drawing.canvas(2, 2, 4.9)
    for ax, (text, unit, lines) in zip(axes, PPO_PANELS, strict=True):
        drawing.heading(ax, text)
        ends = []
        for key, name, colour in lines:
            steps, values = series(rows, key)
            if not steps:
                continue
            if key.startswith("eval_"):
                last = values[-1]
                ax.plot(steps, values, "-o", ms=3.5, color=colour, linewidth=1.5)
            else:
                last = first_and_last(values)[1]
                ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
                ax.plot(steps, _smooth(values), color=colour, linewidth=1.5)
            ends.append((steps[-1], last, f"{name} {last:.2f}".strip(), colour))
        if unit.startswith(("KL", "nats")):
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        low, high = ax.get_ylim()
        drawing.line_labels(ax, ends, gap=0.085 * (high - low))
        drawing.room_for_labels(ax, rows[-1]["step"])
        drawing.name_axes(ax, "iteration", unit)
    return figure


def instruction_kept(evaluation: Evaluation) -> Figure | None:
    """Table 30's experiment: share of answers that keep the instruction, by answer number."""
    if not any(kept(evaluation, which, d) for which in PAPER_KEPT for d in ("greedy", "t1")):
        return None
    figure, (ax,) = drawing.canvas(1, 1, 3.5)
    ends = []
    for which, colour in (("with", GREEN), ("without", ORANGE)):
        for decoding, style in (("t1", (0, (3, 2))), ("greedy", "-")):
            found = kept(evaluation, which, decoding)
            turns = [int(t) for t in TURNS if found.get(t) is not None]
            if not turns:
                continue
            values = [found[str(t)] for t in turns]
            bold = decoding == "greedy"
            ax.plot(
                turns,
                values,
                color=colour,
                linestyle=style,
                linewidth=2 if bold else 1.2,
                marker="o",
                ms=5 if bold else 3,
                markeredgecolor=PAPER,
                zorder=3,
            )
            name = f"{which} GAtt" + ("" if bold else ", T=1")
            ends.append((turns[-1], values[-1], f"{name} {values[-1]:.0%}", colour))
        paper = PAPER_KEPT[which]
        ax.plot(
            list(paper),
            list(paper.values()),
            "D",
            color="none",
            markeredgecolor=MUTED,
            ms=6,
            zorder=4,
            clip_on=False,
        )
    drawing.line_labels(ax, ends, gap=0.065, least=0.03)
    ax.set_xlim(0.4, 25)
    ax.set_xticks([int(t) for t in TURNS])
    drawing.share_axis(ax, top=1.08)
    drawing.name_axes(ax, "answer of the dialogue", "keep the instruction")
    drawing.heading(
        ax,
        "solid: greedy, dashed: temperature 1, diamonds: the paper's 70B (Table 30)",
        MUTED,
    )
    return figure


def instruction_attention(evaluation: Evaluation) -> Figure | None:
    """Fig. 10: how strongly answers look back at the instruction, by answer number."""
    found = evaluation.get("gatt_attention", {})
    if not any(found.get(which) for which in PAPER_KEPT):
        return None
    figure, (ax,) = drawing.canvas(1, 1, 3.0)
    ends = []
    for which, colour in (("with", GREEN), ("without", ORANGE)):
        turns = [int(t) for t in TURNS if found.get(which, {}).get(t) is not None]
        values = [found[which][str(t)] for t in turns]
        ax.plot(turns, values, color=colour, marker="o", ms=5, linewidth=2)
        ends.append((turns[-1], values[-1], f"{which} GAtt {values[-1]:.2f}", colour))
    drawing.line_labels(ax, ends, gap=0.08 * ax.get_ylim()[1])
    ax.set_xlim(0.4, 25)
    ax.set_ylim(bottom=0)
    ax.set_xticks([int(t) for t in TURNS])
    drawing.name_axes(ax, "answer of the dialogue", "largest attention weight")
    return figure


def instruction_kept_among(evaluation: Evaluation) -> Figure | None:
    """Share of answers that keep the instruction, greedy, by what is new about it."""
    if not any(kept(evaluation, "with", among=among) for among in KEPT_AMONG):
        return None
    figure, axes = drawing.canvas(1, 2, 3.1, sharey=True)
    colours = (MUTED, GREEN, BLUE, PURPLE)
    for ax, which in zip(axes, ("without", "with"), strict=True):
        ends = []
        for (among, name), colour in zip(KEPT_AMONG.items(), colours, strict=True):
            found = kept(evaluation, which, among=among)
            turns = [int(t) for t in TURNS if found.get(t) is not None]
            if turns:
                values = [found[str(t)] for t in turns]
                ax.plot(turns, values, color=colour, marker="o", ms=4, linewidth=1.6)
                ends.append((turns[-1], values[-1], f"{values[-1]:.0%} {name}", colour))
        drawing.line_labels(ax, ends, gap=0.075, least=0.03)
        ax.set_xlim(0.4, 37)
        ax.set_xticks([int(t) for t in TURNS])
        drawing.share_axis(ax, top=1.28)
        drawing.name_axes(ax, "answer of the dialogue", "keep the instruction")
        drawing.heading(ax, f"{which} Ghost Attention, greedy", MUTED)
    return figure


def margins(tables: dict[str, dict[str, float]]) -> Figure:
    """How hard Eq. 2 pushes a pair apart: |dL/dD| = sigma(m - D), for the margins m of `tables`
    (name -> rating -> m) at the two ends of the rating scale."""
    figure, (ax,) = drawing.canvas(1, 1, 3.0)
    difference = np.linspace(-4, 8, 200)
    places = ((0.72, -6, "right"), (0.3, 6, "left"), (0.5, 6, "left"))  # height, shift, side
    for name, colour, (height, shift, side) in zip(
        tables, (MUTED, BLUE, GREEN), places, strict=True
    ):
        margin = tables[name]["significantly_better"]
        ax.plot(difference, 1 / (1 + np.exp(difference - margin)), color=colour, linewidth=1.8)
        drawing.note(
            ax,
            margin + np.log(1 / height - 1),
            height,
            f"{name}: m = {margin:g}",
            colour,
            ha=side,
            va="center",
            xytext=(shift, 0),
            textcoords="offset points",
        )
    ax.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    drawing.share_axis(ax)
    ax.set_xlim(-4, 8)
    drawing.heading(ax, "Push on a pair rated significantly better, by margin table (arithmetic)")
    drawing.name_axes(ax, "score of the chosen answer minus score of the rejected one", "push")
    return figure


def _has(rows: Rows) -> bool:
    return bool(series(rows, "loss")[0])


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a fortieth of the curve, of what lies on both sides."""
    reach = max(1, len(values) // 80)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def _interval(ax: Axes, y: float, row: dict, ink: str, marker: str, face: str) -> None:
    """A win rate with its interval and its figures."""
    value = row.get("win_rate_vs_sft")
    if value is None:
        return
    low, high = row.get("win_rate_ci95") or (value, value)
    colour = face if face != PAPER else ink
    ax.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    ax.plot(value, y, marker, ms=6, color=face, markeredgecolor=colour, zorder=3)
    drawing.note(
        ax, high, y, f"{value:.0%}", colour, xytext=(6, 0), textcoords="offset points", va="center"
    )


def _rate_line(
    ax: Axes,
    evaluation: Evaluation,
    names: list[str],
    key: str,
    kind: str,
    colour: str,
    decoding: str,
) -> None:
    places = [
        x for x, v in enumerate(names) if measured(evaluation, v, decoding).get(key) is not None
    ]
    rows = [measured(evaluation, names[x], decoding) for x in places]
    values = [row[key] for row in rows]
    if decoding == "greedy":
        ax.plot(
            [x + 0.2 for x in places],
            values,
            "o",
            ms=4.5,
            color=PAPER,
            markeredgecolor=MUTED,
            zorder=2,
        )
        return
    ax.plot(places, values, "-o", ms=5, lw=1.2, color=colour, markeredgecolor=PAPER, zorder=3)
    for x, value, row in zip(places, values, rows, strict=True):
        top = value
        if count := row.get("count", {}).get(kind):
            low, top = wilson(value, count)
            ax.plot([x, x], [low, top], color=colour, linewidth=1)
        drawing.note(
            ax,
            x,
            top,
            f"{value:.0%}",
            colour,
            ha="center",
            va="bottom",
            xytext=(-4, 4),
            textcoords="offset points",
        )
