"""The demo's report: `report.html`, one self-contained page, and `summary.json`.

Both are made from `evaluation.json` and the stages' metrics alone, so they can be made again:
`python -m puna.demo.report.build runs/demo`. What a run did not measure is left out, or said.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import say
from puna.demo.report import captions, figures, page, reward_figures
from puna.demo.report.bars import bars
from puna.demo.report.drawing import inline_svg
from puna.demo.report.results import (
    KEPT_AMONG,
    RATINGS,
    REWARD_MODELS,
    TURNS,
    Evaluation,
    accuracies,
    chat_model,
    duration,
    kept,
    load_evaluation,
    measured,
    metrics,
    percent,
    stage_seconds,
    title,
    total_seconds,
    version_names,
)
from puna.demo.village.personas import CHOICES, Instruction, instruction_text

RATE_KEYS = (
    "win_rate_vs_sft",
    "win_rate_ci95",
    "violation_rate",
    "false_refusal_rate",
    "helpful_rate",
)
Drawn = tuple[str, Callable[[Evaluation], Figure | None], Callable[[Evaluation], str]]
REWARD_FIGURES: tuple[Drawn, ...] = (
    (
        "Reward models: the clearer the choice, the more often right",
        reward_figures.reward_accuracy,
        captions.reward_accuracy,
    ),
    (
        "Reward models: are their probabilities right?",
        reward_figures.calibration,
        captions.calibration,
    ),
    (
        "Reward models: each round's fresh comparisons",
        reward_figures.reward_rounds,
        captions.reward_rounds,
    ),
    ("Rejection sampling: what the best of K is worth", figures.best_of_k, captions.best_of_k),
    (
        "Two reward models, one reward: which way the switch went",
        reward_figures.switch_branches,
        captions.switch_branches,
    ),
)
VERSION_FIGURES: tuple[Drawn, ...] = (
    ("Every version against SFT", figures.win_rates, captions.win_rates),
    ("Safety and helpfulness of each version", figures.version_rates, captions.version_rates),
    (
        "How the reward models see each version",
        reward_figures.reward_distribution,
        captions.reward_distribution,
    ),
    (
        "Ghost Attention: how long an instruction is kept",
        figures.instruction_kept,
        captions.instruction_kept,
    ),
    (
        "Ghost Attention: how strongly answers look back at the instruction",
        figures.instruction_attention,
        captions.instruction_attention,
    ),
    (
        "Ghost Attention: instructions that it never trained on",
        figures.instruction_kept_among,
        captions.instruction_kept_among,
    ),
)
OPENED = 3  # conversations that are shown unfolded


def write_report(folder: Path) -> Path:
    """Write `report.html` into the run's folder; returns its path."""
    evaluation = load_evaluation(folder)
    seconds = total_seconds(folder, evaluation)
    result = captions.headline(evaluation, duration(seconds) if seconds else None)
    shown = bars(evaluation)
    body = [
        page.heading("Puna: the whole of Llama 2, small", 1),
        page.paragraph(result, "headline"),
        page.paragraph(_terms(evaluation), "lead"),
        page.heading("What had to be shown"),
        page.paragraph(f"{sum(bar.met is True for bar in shown)} of {len(shown)} are met."),
        page.verdicts(shown),
        page.heading("Versions"),
        _versions(evaluation),
        page.heading("Figures"),
        *_figures(folder, evaluation),
        *_conversations(evaluation),
        *_chat(folder, evaluation),
        *_machine(folder, evaluation),
    ]
    path = folder / "report.html"
    write_text(path, page.page("Puna: demo report", body))
    return path


def write_summary(folder: Path) -> Path:
    """Write `summary.json`: temperature 1 for the versions, greedy for Ghost Attention; null for
    what was not measured."""
    evaluation = load_evaluation(folder)
    summary = {
        "seconds": total_seconds(folder, evaluation),
        "reward_models": {
            model: {
                "accuracy": {
                    rating: accuracies(evaluation, model).get(rating)
                    for rating in (*reversed(RATINGS), "all")
                }
            }
            for model in REWARD_MODELS
        },
        "versions": {
            version: {key: measured(evaluation, version).get(key) for key in RATE_KEYS}
            for version in version_names(evaluation)
        },
        "gatt": {
            which: {turn: kept(evaluation, which).get(turn) for turn in TURNS}
            for which in ("with", "without")
        },
        "gatt_other": {
            among: {
                which: {turn: kept(evaluation, which, among=among).get(turn) for turn in TURNS}
                for which in ("with", "without")
            }
            for among in KEPT_AMONG
            if among != "value"
        },
    }
    path = folder / "summary.json"
    write_text(path, json.dumps(summary, indent=2) + "\n")
    return path


def _terms(evaluation: Evaluation) -> str:
    return (
        f"Seed {evaluation.get('seed', 'unknown')}. Everything below is measured on held-out "
        "prompts and judged by the made-up world's oracle, which reads the answers; no figure of a "
        "version comes from a reward model unless it says so. Rates are at temperature 1 and "
        "instructions kept are greedy, the other mode is beside them. An answer to an unsafe "
        "request violates when it helps with harm or insults; a helpful answer is right, a full "
        "sentence and polite."
    )


def _versions(evaluation: Evaluation) -> str:
    keys = (
        ("win_rate_vs_sft", "wins over SFT"),
        ("violation_rate", "violations"),
        ("helpful_rate", "helpful"),
        ("false_refusal_rate", "refuses ordinary"),
        ("borderline_refusal_rate", "refuses borderline"),
    )
    rows = []
    for version in version_names(evaluation):
        at_one, greedy = (measured(evaluation, version, d) for d in ("t1", "greedy"))
        cells = [f"{_cell(at_one.get(key))} / {_cell(greedy.get(key))}" for key, _ in keys]
        rows.append([title(version), *cells])
    head = ["temperature 1 / greedy", *(name for _, name in keys)]
    return page.table(head, rows, numbers=range(1, len(keys) + 1))


def _cell(value: float | None) -> str:
    return "–" if value is None else percent(value, 1)


def _figures(folder: Path, evaluation: Evaluation) -> Iterator[str]:
    """Every figure that the run measured, in the order of the pipeline."""
    pretrain, sft, ppo = (metrics(folder, evaluation, n) for n in ("pretrain", "sft", "ppo"))
    yield from _drawn(
        "Pretraining and supervised fine-tuning", figures.losses, captions.losses, pretrain, sft
    )
    for heading, draw, explain in REWARD_FIGURES:
        yield from _drawn(heading, draw, explain, evaluation)
    yield from _drawn("PPO: reward against distance", figures.ppo, captions.ppo, ppo)
    for heading, draw, explain in VERSION_FIGURES:
        yield from _drawn(heading, draw, explain, evaluation)


def _drawn(
    heading: str, draw: Callable[..., Figure | None], explain: Callable[..., str], *data: Any
) -> Iterator[str]:
    drawing = draw(*data)
    if drawing is not None:
        yield page.heading(heading, 3)
        yield page.figure(inline_svg(drawing, draw.__name__, heading), explain(*data))


def _conversations(evaluation: Evaluation) -> Iterator[str]:
    shown = evaluation.get("conversations", [])
    if not shown:
        return
    yield page.heading("Conversations")
    yield page.paragraph("The same held-out prompts, answered by each version.", "small")
    for number, row in enumerate(shown):
        columns = {title(name): messages for name, messages in row["columns"].items()}
        yield page.conversation(row["title"], columns, number < OPENED)


def _chat(folder: Path, evaluation: Evaluation) -> Iterator[str]:
    model = chat_model(evaluation)
    if model is None:
        return
    command = f"puna chat --model {folder / model}"
    told = instruction_text(Instruction(figure=CHOICES["figure"][True][0]))
    yield page.heading("Talk to it")
    yield page.code(f'{command}\n{command} --system "{told}"')
    yield page.paragraph(
        "It knows only its small world: ask it what the prompts above ask. Where make built the "
        "environment, the command is .venv/bin/puna.",
        "small",
    )


def _machine(folder: Path, evaluation: Evaluation) -> Iterator[str]:
    yield page.heading("Machine and time")
    spent = stage_seconds(folder, evaluation)
    if spent:
        rows = [[name, f"{seconds:.0f}"] for name, seconds in spent.items()]
        yield page.table(["stage", "seconds"], [*rows, ["all", f"{sum(spent.values()):.0f}"]], [1])
    machine = evaluation.get("machine", {})
    rows = [[key, _plain(value)] for key, value in machine.items() if value not in (None, [], {})]
    if rows:
        yield page.heading("Measured on", 3)
        yield page.table(["", ""], rows)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


if __name__ == "__main__":
    say(write_report(Path(sys.argv[1])))
    say(write_summary(Path(sys.argv[1])))
