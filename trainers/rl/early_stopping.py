"""When to end PPO, and which model to keep: decided from the rows of metrics.jsonl alone.

So a resumed run, whose metrics are cut to its checkpoint, decides as it would have. The paper
stops early on held-out prompts (section 3.2.3) and does not give the rule; this is ours.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from puna.core import parallel
from puna.core.checkpoint.folder import atomic_folder
from puna.core.documents import json_rows
from puna.core.model import Transformer
from puna.trainers.train.run import Run, write_model


def history(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl so far."""
    if not metrics.exists():
        return []
    return [row for _, row in json_rows(metrics)]


def rewards(rows: list[dict[str, Any]]) -> list[float]:
    """The held-out rewards in the order of the evaluations."""
    return [row["eval_reward"] for row in rows if "eval_reward" in row]


def is_best(rows: list[dict[str, Any]]) -> bool:
    """Whether the last row is an evaluation, and better than every one before."""
    found = rewards(rows)
    return "eval_reward" in rows[-1] and found[-1] > max(found[:-1], default=-math.inf)


def stop_reason(rows: list[dict[str, Any]], patience: int, max_kl: float | None) -> str | None:
    """Why to end after the last row; None to go on. patience 0 and max_kl None never end it."""
    if max_kl is not None and rows[-1].get("kl", 0.0) > max_kl:
        return f"the KL of {rows[-1]['kl']:.2f} nats an answer exceeds max_kl {max_kl}"
    found = rewards(rows)
    if patience and len(found) > patience and max(found[-patience:]) <= max(found[:-patience]):
        return f"no better held-out reward in {patience} evaluations"
    return None


def save_best(run: Run, policy: Transformer) -> None:
    """Keep the policy as `best/` in the run folder, in place of an earlier one (all ranks)."""
    if parallel.is_main():
        with atomic_folder(run.path / "best") as partial:
            write_model(partial, policy, run.tokenizer)
    else:
        for _ in parallel.full_parameters(policy):
            pass
    parallel.barrier()


def finish_with_best(run: Run) -> Path:
    """Make `best/` the finished model; returns its folder."""
    if parallel.is_main():
        with atomic_folder(run.final) as partial:
            shutil.copytree(run.path / "best", partial, dirs_exist_ok=True)
    return run.finished()
