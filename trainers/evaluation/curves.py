"""What the temperature and the number of samples do: how alike the answers become (Self-BLEU, paper
Fig. 21), and what the best of K is worth (Figs. 7 and 8)."""

from collections.abc import Sequence
from typing import Any

import torch

from puna.trainers.data.formats import Prompt
from puna.trainers.evaluation.answers import (
    Reader,
    Scorer,
    common_prompts,
    drawing_of,
    drawn,
)
from puna.trainers.evaluation.config import EvaluateChatConfig
from puna.trainers.evaluation.self_bleu import self_bleu
from puna.trainers.rl.best_of import is_usable, reward_curve
from puna.trainers.rl.sampling import Drawing

Work = tuple[str, Sequence[Prompt], Drawing]


def work_of(config: EvaluateChatConfig) -> list[Work]:
    """(name, prompts, how to draw) of every file at every temperature."""
    return [
        (
            name_of(number, temperature),
            prompts,
            drawing_of(config, f"{path.name} at {temperature:g}")._replace(
                samples=config.samples, temperature=temperature
            ),
        )
        for number, path in enumerate(config.curves)
        for prompts in [common_prompts([path], config)]
        for temperature in sorted(set(config.temperatures))
    ]


def name_of(file: int, temperature: float) -> str:
    return f"curve-{file + 1}-at-{temperature:g}"


def measure(
    config: EvaluateChatConfig, models: Sequence[Reader], judge: Scorer | None
) -> list[dict[str, Any]]:
    """One row for each model, file and temperature: Self-BLEU, and what the judge says."""
    rows = []
    for number, model in enumerate(models):
        for file, path in enumerate(config.curves):
            for temperature in sorted(set(config.temperatures)):
                row = measured(config, number, model, name_of(file, temperature), judge)
                where = {"model": str(model.path), "file": str(path), "temperature": temperature}
                rows.append({**where, **row})
    return rows


def measured(
    config: EvaluateChatConfig, number: int, model: Reader, name: str, judge: Scorer | None
) -> dict[str, Any]:
    """Self-BLEU (0 to 100), averaged over prompts, where there are two samples or more; the share
    of unfinished answers; with a judge `by_k`, as of `reward_curve`, where an answer is finished.
    """
    rows = drawn(config, number, name)
    found: dict[str, Any] = {"prompts": len(rows) // config.samples}
    texts = [row["answer"] for row in rows]
    groups = [texts[i : i + config.samples] for i in range(0, len(texts), config.samples)]
    if config.samples > 1:
        found["self_bleu"] = sum(map(self_bleu, groups)) / len(groups)
    found["unfinished"] = sum(not row["finished"] for row in rows) / len(rows)
    if judge is not None:
        scores = judge(rows, model).view(-1, config.samples)
        usable = torch.tensor([is_usable(row) for row in rows]).view(-1, config.samples)
        if bool(usable.any()):
            found["by_k"] = reward_curve(scores, usable)
    return found
