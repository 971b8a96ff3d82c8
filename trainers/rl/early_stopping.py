"""When to end PPO, and which policy to keep: decided from the rows of metrics.jsonl alone.

So a resumed run, whose metrics are cut to its checkpoint, decides as it would have. The paper
stops early on held-out prompts (section 3.2.3) and does not give the rule; this is ours.

Row k holds what policy k - 1 sampled (`reward`, `kl`), then the held-out reward of policy k, after
its step. `best_reward` stands in the row of an iteration that began by keeping the policy. Where
what makes a reward was amended, a row with `anew` begins another history: rewards before it are no
measure for those behind.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from puna.core import parallel
from puna.core.checkpoint.folder import atomic_folder
from puna.core.documents import count_of, json_rows
from puna.core.model import Transformer
from puna.core.terminal import say
from puna.trainers.rl.config import PPOConfig
from puna.trainers.train.claim import amended_names
from puna.trainers.train.run import Run, save_model

Row = dict[str, Any]

COLLAPSED_ROWS = 3  # in a row: one batch may be odd
SHORTER = 0.2  # of the first batch's tokens an answer
MORE_UNFINISHED = 0.5  # share of answers, beyond the first batch's
LEAST_ENTROPY = 1e-3  # nats a token: all samples of a prompt are one answer, nothing is compared


JUDGING = {  # options that decide what a policy's reward is
    "helpfulness", "safety", "reward", "combine", "safety_threshold", "unfinished",
    "unfinished_penalty", "eval_prompts", "eval_count", "max_new_tokens", "temperature",
}  # fmt: skip


def all_rows(metrics: Path) -> list[Row]:
    """The rows of a metrics.jsonl so far."""
    if not metrics.exists():
        return []
    return [row for _, row in json_rows(metrics)]


def history(metrics: Path) -> list[Row]:
    """Those whose rewards can be compared."""
    rows = all_rows(metrics)
    begins = [place for place, row in enumerate(rows) if "anew" in row]
    return rows[begins[-1] :] if begins else rows


def judged_anew(run: Run) -> int:
    """How often what makes a reward was amended, where no row says so yet; else 0 (collective)."""

    def times() -> int:
        found = sum(not JUDGING.isdisjoint(names) for names in amended_names(run.path))
        said = max((int(row.get("anew", 0)) for row in all_rows(run.metrics)), default=0)
        return found if found > said else 0

    return parallel.on_main(times)


def best(rows: list[Row]) -> Row | None:
    """The row of the iteration that began by keeping its policy, last of all."""
    return next((row for row in reversed(rows) if "best_reward" in row), None)


def worth(rows: list[Row], found: Row) -> float | None:
    """The reward by which the policy that sampled `found` is judged: the held-out one, or where
    nothing is held out that of its samples; None where it has not been measured."""
    if any("eval_reward" in row for row in rows):
        return rows[-1].get("eval_reward")
    return found["reward"]


def is_best(rows: list[Row], found: Row, max_kl: float | None) -> bool:
    """Whether to keep the policy that sampled `found`, after the iterations of `rows`: it is
    within the limit and better than the one that is kept, or the one that PPO began with."""
    reward, before = worth(rows, found), best(rows)
    if before is None:
        return True
    within = exceeds(rows, found, max_kl) is None
    return within and reward is not None and reward > before["best_reward"]


def exceeds(rows: list[Row], found: Row, max_kl: float | None) -> str | None:
    """How the policy that sampled `found` is past the limit; None where it is not. The policy that
    PPO begins with is within any: what its KL differs from 0 by is rounding."""
    if max_kl is not None and best(rows) is not None and found["kl"] > max_kl:
        return f"the KL of {found['kl']:.3g} nats an answer exceeds max_kl {max_kl}"
    return None


def collapse(rows: list[Row]) -> str | None:
    """What shows in the last rows that the policy has broken down; None where nothing does."""
    sampled = [row for row in rows if "answer_tokens" in row]
    if len(sampled) <= COLLAPSED_ROWS:
        return None
    first, last = sampled[0], sampled[-COLLAPSED_ROWS:]
    if all(row["answer_tokens"] < SHORTER * first["answer_tokens"] for row in last):
        return (
            f"answers are {last[-1]['answer_tokens']:.1f} tokens long where they were "
            f"{first['answer_tokens']:.1f}"
        )
    if all(row["unfinished"] > first["unfinished"] + MORE_UNFINISHED for row in last):
        return (
            f"{last[-1]['unfinished']:.0%} of the answers do not end where "
            f"{first['unfinished']:.0%} did not"
        )
    if all(row.get("entropy", math.inf) < LEAST_ENTROPY for row in last):
        return f"the entropy is {last[-1]['entropy']:.1e} nats a token: one answer to a prompt"
    return None


def out_of_patience(rows: list[Row], patience: int) -> str | None:
    """Why waiting for a better held-out reward is over; None to go on. patience 0 never ends."""
    found = [row["eval_reward"] for row in rows if "eval_reward" in row]
    if patience and len(found) > patience and max(found[-patience:]) <= max(found[:-patience]):
        return f"no better held-out reward in {count_of(patience, 'evaluation')}"
    return None


def check_kept(run: Run, iteration: int) -> None:
    """ValueError where the run has gone on without its best policy: before it was kept, or since
    somebody removed it."""

    def there() -> None:
        rows = all_rows(run.metrics)
        if iteration and (best(rows) is None or not (run.path / "best").is_dir()):
            raise ValueError(f"{run.path / 'best'} is missing; give another --out")

    parallel.on_main(there)


def too_far(config: PPOConfig, run: Run, row: Row) -> str | None:
    """Why the policy that sampled `row` must not be trained further, on every rank."""
    found = exceeds(all_rows(run.metrics), row, config.max_kl) if parallel.is_main() else None
    return parallel.broadcast(found)


def broken(config: PPOConfig, run: Run) -> str | None:
    """Why to end after the iteration just logged, on every rank."""
    reason = None
    if parallel.is_main():
        reason = out_of_patience(history(run.metrics), config.patience)
        if reason is None and config.stop_on_collapse:
            reason = collapse(all_rows(run.metrics))
    return parallel.broadcast(reason)


def keep_if_best(config: PPOConfig, run: Run, policy: Transformer, iteration: int, row: Row) -> Row:
    """Keep the policy as `best/` where it is time to look and there is none better, or none that
    was judged alike; {"best_reward"} then, else {}."""
    reward = None
    if parallel.is_main():
        rows = history(run.metrics)
        if not iteration % config.eval_every or best(rows) is None:
            reward = worth(rows, row) if is_best(rows, row, config.max_kl) else None
    reward = parallel.broadcast(reward)
    if reward is None:
        return {}
    save_best(run, policy)
    return {"best_reward": reward}


def give_best(run: Run, when: str, reason: str) -> Path:
    """Say why the run ends, and finish with the best policy that was within the limits."""
    if parallel.is_main():
        kept = best(history(run.metrics))
        assert kept is not None, "the policy that PPO begins with is kept"
        say(
            f"ppo: stopped {when}: {reason}; took the policy after iteration {kept['step'] - 1}, "
            f"with reward {kept['best_reward']:.3f} and a KL of {max(kept['kl'], 0.0):.2f}"
        )
    return finish_with_best(run)


def save_best(run: Run, policy: Transformer) -> None:
    """Keep the policy as `best/` in the run folder, in place of an earlier one (all ranks)."""
    save_model(run.path / "best", policy, run.tokenizer, run.dtype)


def finish_with_best(run: Run) -> Path:
    """Make `best/` the finished model; returns its folder."""
    if parallel.is_main():
        with atomic_folder(run.final) as partial:
            shutil.copytree(run.path / "best", partial, dirs_exist_ok=True)
    return run.finished()
