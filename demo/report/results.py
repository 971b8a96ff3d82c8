"""What a demo run measured, as its report reads it: `evaluation.json` and the stages' metrics.

A run scaled down may lack parts of the file; every reader here then gives something empty.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from puna.core.documents import read_object
from puna.demo.kept import seconds

Evaluation = dict[str, Any]
Rows = list[dict[str, Any]]

RATINGS = ("negligibly_better", "slightly_better", "better", "significantly_better")
TURNS = ("1", "2", "4", "6", "10", "20")
# What is new about the instructions that Ghost Attention is measured on.
KEPT_AMONG = {
    "seen": "trained values",
    "value": "held-out values",
    "phrasing": "held-out phrasing",
    "kind": "a kind never trained on",
}
REWARD_MODELS = ("helpfulness", "safety")
TITLES = {
    "sft": "SFT",
    "gatt": "GAtt",
    "student-sft": "smaller SFT",
    "student": "smaller, taught",
}


def load_evaluation(folder: Path) -> Evaluation:
    """The run's `evaluation.json`; ValueError where the run has not come that far."""
    path = folder / "evaluation.json"
    return read_object(path, "no such file; let the demo finish, then write the report")


def rlhf_versions(evaluation: Evaluation) -> list[str]:
    """rlhf-v1, rlhf-v2, ... in order of their numbers."""
    found = [name for name in evaluation.get("versions", {}) if re.fullmatch(r"rlhf-v\d+", name)]
    return sorted(found, key=lambda name: int(name.removeprefix("rlhf-v")))


def version_names(evaluation: Evaluation) -> list[str]:
    """The models that were measured, in the order in which they were made."""
    return list(evaluation.get("versions", {}))


def gatt_base(evaluation: Evaluation) -> str | None:
    """The version that Ghost Attention was applied to: the one made before it."""
    names = version_names(evaluation)
    return names[names.index("gatt") - 1] if "gatt" in names[1:] else None


def title(version: str) -> str:
    """A version's name for people: SFT, V1, GAtt, V5 before PPO."""
    if version in TITLES:
        return TITLES[version]
    number, _, step = version.removeprefix("rlhf-").partition("-")
    return f"{number.upper()} before PPO" if step else number.upper()


def measured(evaluation: Evaluation, version: str | None, decoding: str = "t1") -> dict[str, Any]:
    """A version's rates at temperature 1 ("t1") or "greedy"."""
    return evaluation.get("versions", {}).get(version, {}).get(decoding) or {}


def rate(evaluation: Evaluation, version: str | None, key: str, decoding: str = "t1"):
    """One rate of `measured`, None where it was not measured."""
    return measured(evaluation, version, decoding).get(key)


def last_version(evaluation: Evaluation) -> str | None:
    """The newest RLHF version."""
    names = rlhf_versions(evaluation)
    return names[-1] if names else None


def accuracies(evaluation: Evaluation, model: str) -> dict[str, float]:
    """A reward model's accuracy by rating, and "all"."""
    return evaluation.get("reward_models", {}).get(model, {}).get("accuracy", {})


def pairs_by_rating(evaluation: Evaluation, model: str) -> dict[str, int]:
    """The held-out comparisons behind each of a reward model's accuracies."""
    return evaluation.get("reward_models", {}).get(model, {}).get("counts", {})


def kept(
    evaluation: Evaluation, which: str, decoding: str = "greedy", among: str = "value"
) -> dict[str, float]:
    """Share of answers that keep the instruction, by answer number; which: "with" | "without"
    | "last";
    among: a key of KEPT_AMONG."""
    found = evaluation.get("gatt" if among == "value" else "gatt_other", {})
    return (found if among == "value" else found.get(among, {})).get(decoding, {}).get(which, {})


def kept_count(evaluation: Evaluation, among: str = "value") -> int | None:
    """Dialogues behind each share of `kept`."""
    return evaluation.get("gatt_counts", {}).get(among)


def stage(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """The stage of that name, else the last one with the name as a word in its own; or {}."""
    stages = evaluation.get("stages", [])
    exact = [s for s in stages if s["name"] == name]
    near = [s for s in stages if name in re.findall(r"[a-z]+", s["name"])]
    return (exact or near or [{}])[-1]


def metrics(folder: Path, evaluation: Evaluation, name: str) -> Rows:
    """The rows of a stage's metrics.jsonl; a row cut short by a kill is left out."""
    path = _file_of(folder, evaluation, name)
    if path is None or not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _file_of(folder: Path, evaluation: Evaluation, name: str) -> Path | None:
    relative = stage(evaluation, name).get("metrics")
    return folder / relative if relative else None


def series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have `key`."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def first_and_last(values: list[float]) -> tuple[float, float]:
    """Means over the first and over the last tenth of a noisy curve that has a point at least."""
    assert values, "an empty curve has no ends"
    few = max(1, len(values) // 10)
    return sum(values[:few]) / few, sum(values[-few:]) / few


def chat_model(evaluation: Evaluation) -> str | None:
    """The newest chat model's folder, relative to the run's."""
    judges = {"reward", *REWARD_MODELS}
    chats = [
        s["model"]
        for s in evaluation.get("stages", [])
        if s.get("model") and not judges & set(re.findall(r"[a-z]+", s["name"]))
    ]
    return chats[-1] if chats else None


def stage_seconds(folder: Path, evaluation: Evaluation) -> dict[str, float]:
    """Seconds by stage: what the pipeline noted in seconds.json, which goes on after the
    evaluation was written, else what the evaluation says of each stage."""
    if noted := seconds(folder):
        return noted
    stages = evaluation.get("stages", [])
    return {s.get("title", s["name"]): s["seconds"] for s in stages if s.get("seconds") is not None}


def total_seconds(folder: Path, evaluation: Evaluation) -> float | None:
    """Seconds of the whole run, installation not counted."""
    if noted := seconds(folder):
        return sum(noted.values())
    return evaluation.get("seconds")


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share seen in `count` trials (Wilson): stays in 0..1 near the ends."""
    if count <= 0:
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half *= z / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def percent(value: float | None, digits: int = 0) -> str:
    """A rate for reading; "not measured" for None."""
    return "not measured" if value is None else f"{100 * value:.{digits}f}%"


def duration(seconds: float) -> str:
    """12 min 5 s, 48 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
