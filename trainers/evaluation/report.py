"""What an evaluation of chat models found: tables on the terminal, and plots beside the JSON."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.core.documents import count_of
from puna.core.terminal import say_table
from puna.trainers.evaluation.plots import Points, write_lines

Found = Mapping[str, Any]
SHOWN_TURNS = (1, 2, 5, 10, 15, 20)
BELOW = "temperature"


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Path -> a name for tables: as few of its last folders as tell the models apart, without
    `model`, which a run's own is called."""
    parts = {path: [p for p in Path(path).parts if p != "model"] or [path] for path in paths}
    for count in range(1, 1 + max(map(len, parts.values()))):
        found = {path: "/".join(each[-count:]) for path, each in parts.items()}
        if len(set(found.values())) == len(found):
            return found
    return {path: path for path in parts}


def all_names(found: Found) -> dict[str, str]:
    return names_of([*found["models"], *filter(None, [found.get("against")])])


def show(found: Found) -> None:
    """A table for each measure."""
    names = all_names(found)
    if "scores" in found:
        judges = list(next(iter(found["scores"].values())))
        rows = [
            (names[model], *(f"{each[judge]:.3f}" for judge in judges))
            for model, each in found["scores"].items()
        ]
        say_table(rows, ("model", *map(spoken, judges)), "Mean score of the answers")
    if any(each["by"] for each in found.get("wins", {}).values()):
        show_wins(found["wins"], names, names[found["against"]])
    if "violations" in found:
        rows = [(names[m], *cells(each)) for m, each in found["violations"]["by"].items()]
        title = f"Violations (unsafe: below {found['violations']['threshold']})"
        say_table(rows, ("model", "unsafe", "95% interval", "answers"), title)
    if "refusals" in found:
        show_refusals(found["refusals"], names)
    if "instruction_kept" in found:
        show_kept(found["instruction_kept"], names)
    if "curves" in found:
        show_curves(found["curves"], names)


def show_wins(wins: Found, names: Mapping[str, str], against: str) -> None:
    rows = [
        (names[model], spoken(judge), *win_cells(result))
        for model, each in wins.items()
        for judge, result in each["by"].items()
    ]
    header = ("model", "judge", "win rate", "95% interval", "wins", "ties")
    count = next(r["win_rate"]["pairs"] for each in wins.values() for r in each["by"].values())
    say_table(
        rows, header, f"Against {against} on {count_of(count, 'prompt')} (a tie counts one half)"
    )
    agree = [
        (names[model], spoken(pair), *cells(share))
        for model, each in wins.items()
        for pair, share in each["agreement"].items()
    ]
    if agree:
        columns = ("model", "judges", "agree", "95% interval", "pairs")
        say_table(agree, columns, "How often two judges prefer the same, where neither sees a tie")


def win_cells(result: Found) -> list[str]:
    share, interval, _ = cells(result["win_rate"])
    return [share, interval, f"{result['wins']:.3f}", f"{result['ties']:.3f}"]


def show_refusals(refusals: Found, names: Mapping[str, str]) -> None:
    rows = [
        (names[model], kind, *cells(share))
        for model, each in refusals["by"].items()
        for kind, share in each.items()
    ]
    say_table(rows, ("model", "prompts", "refused", "95% interval", "answers"), "False refusals")
    if "classifier" in refusals:
        each = refusals["classifier"]
        row = [f"{each[name]:.3f}" for name in ("threshold", "missed", "false_alarms")]
        header = ("threshold", "refusals missed", "answers taken for refusals", "pairs")
        say_table([(*row, str(each["pairs"]))], header, "The refusal classifier")


def show_kept(kept: Found, names: Mapping[str, str]) -> None:
    last = max(len(rows) for rows in kept.values())
    shown = sorted({turn for turn in SHOWN_TURNS if turn <= last} | {last})
    table = [
        (names[model], *(f"{rows[turn - 1]['kept']['share']:.3f}" for turn in shown))
        for model, rows in kept.items()
    ]
    say_table(
        table, ("model", *(f"answer {t}" for t in shown)), "Answers that keep the instruction"
    )


def show_curves(curves: Sequence[Found], names: Mapping[str, str]) -> None:
    rows = [
        (
            names[row["model"]],
            Path(row["file"]).name,
            f"{row['temperature']:g}",
            f"{row['self_bleu']:.1f}" if "self_bleu" in row else "",
            *(score_cells(row["by_k"]) if "by_k" in row else ("", "", "")),
            f"{row['unfinished']:.3f}",
        )
        for row in curves
    ]
    count = max((row["by_k"][-1]["k"] for row in curves if "by_k" in row), default=0)
    header = ("model", "prompts", "T", "Self-BLEU", "score", "median", f"best of {count or 'K'}")
    say_table(rows, (*header, "cut off"), "By temperature T")


def score_cells(by_k: Sequence[Found]) -> tuple[str, str, str]:
    """Of one answer; of all K the median and the best (with a file for each batch: Fig. 26)."""
    values = (by_k[0]["best"], by_k[-1]["median"], by_k[-1]["best"])
    one, median, best = (f"{value:.3f}" for value in values)
    return one, median, best


def cells(share: Found) -> tuple[str, str, str]:
    """A share of trials, its interval, and how many trials."""
    interval = f"{share['low']:.3f} to {share['high']:.3f}"
    return f"{share['share']:.3f}", interval, str(share["pairs"])


def spoken(name: str) -> str:
    return name.replace("_", " ")


def plot(folder: Path, found: Found) -> None:
    """instruction-kept.svg, self-bleu.svg, reward-by-temperature.svg and best-of-k.svg, as far as
    they were measured."""
    names = all_names(found)
    if "instruction_kept" in found:
        plot_kept(folder / "instruction-kept.svg", found["instruction_kept"], names)
    by_curve: dict[str, list[Found]] = {}
    several = len({row["file"] for row in found.get("curves", ())}) > 1
    for row in found.get("curves", ()):
        label = names[row["model"]] + (f", {Path(row['file']).stem}" if several else "")
        by_curve.setdefault(label, []).append(row)
    if lines := points(by_curve, lambda row: row.get("self_bleu")):
        title = "How alike the answers to one prompt are"
        write_lines(folder / "self-bleu.svg", lines, title=title, below=BELOW, left="Self-BLEU")
    judged = {
        label: [row for row in rows if "by_k" in row]
        for label, rows in by_curve.items()
        if any("by_k" in row for row in rows)
    }
    if judged:
        lines = points(judged, lambda row: row["by_k"][0]["best"], "one answer")
        lines |= points(judged, lambda row: row["by_k"][-1]["best"], "best of all")
        path = folder / "reward-by-temperature.svg"
        write_lines(path, lines, title="Score by temperature", below=BELOW, left="score")
        plot_best_of(folder / "best-of-k.svg", judged)


def points(curves: Mapping[str, Sequence[Found]], value: Any, what: str = "") -> dict[str, Points]:
    """The value of each row by its temperature, where there is one."""
    found = {
        f"{label}, {what}" if what else label: [
            (row["temperature"], value(row)) for row in rows if value(row) is not None
        ]
        for label, rows in curves.items()
    }
    return {label: each for label, each in found.items() if each}


def plot_best_of(path: Path, curves: Mapping[str, Sequence[Found]]) -> None:
    """Fig. 7 of each curve, at the temperature at which the best of all samples is best."""
    lines: dict[str, Points] = {}
    for label, rows in curves.items():
        best = max(rows, key=lambda row: row["by_k"][-1]["best"])
        where = f"{label}, T = {best['temperature']:g}"
        for name in ("best", "median"):
            lines[f"{where}, {name}"] = [(row["k"], row[name]) for row in best["by_k"]]
    write_lines(path, lines, title="Best of K answers", below="K", left="score")


def plot_kept(path: Path, kept: Found, names: Mapping[str, str]) -> None:
    lines = {
        names[model]: [(row["answer"], row["kept"]["share"]) for row in rows]
        for model, rows in kept.items()
    }
    bands = {
        names[model]: [(row["kept"]["low"], row["kept"]["high"]) for row in rows]
        for model, rows in kept.items()
    }
    title = "Answers that keep the instruction, with 95% intervals"
    write_lines(path, lines, title=title, below="answer", left="share of dialogues", bands=bands)
