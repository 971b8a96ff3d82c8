"""What a run is going to do, in numbers and in one line: epochs are what they say."""

from typing import NamedTuple

from puna.core import parallel
from puna.core.documents import count_of
from puna.trainers.train.advice import advice
from puna.trainers.train.loop import TrainConfig, learning_rate
from puna.trainers.train.notice import notice


class Plan(NamedTuple):
    """So many steps of `batch` rows; the last one takes what is left of `visits`."""

    rows: int
    batch: int
    steps: int
    visits: int  # rows in all steps together: each of `rows` in every epoch


def of_epochs(rows: int, epochs: int, batch: int) -> Plan:
    """Every row `epochs` times. A batch that exceeds the rows is all of them, so that an epoch is
    at least one step."""
    size = min(batch, rows)
    return Plan(rows, size, -(-rows * epochs // size), rows * epochs)


def of_steps(rows: int, steps: int, batch: int) -> Plan:
    """So many whole batches, epoch after epoch."""
    return Plan(rows, batch, steps, steps * batch)


def check_shares(batch: int, tp: int = 1, called: str = "a batch of") -> None:
    """ValueError where a batch cannot be shared equally by the ranks, `tp` of which take one share
    together."""
    ranks = parallel.share(tp).ranks
    if batch % max(1, ranks):
        groups = f"groups of {tp} processes" if tp > 1 else "processes"
        raise ValueError(
            f"{called} {batch} cannot be shared equally by {ranks} {groups}; choose a multiple, or "
            f"let more work on the same rows{advice('parallel', ' (--parallel.tp)', '')}"
        )


def announce(title: str, what: str, plan: Plan, config: TrainConfig, asked: int) -> None:
    """The line at the start, and one for each thing that is probably not meant."""
    seen = plan.visits / plan.rows
    times = "once" if seen == 1 else f"{seen:.3g} times" if seen < 1000 else f"{seen:,.0f} times"
    peak = max(
        learning_rate(step, plan.steps, config)
        for step in {0, plan.steps - 1, min(config.warmup_steps, plan.steps - 1)}
    )
    rate = f"peak learning rate {peak:.3g}"
    notice(
        f"{title}: {what}; {count_of(plan.steps, 'step')} of {plan.batch:,}, each seen "
        f"{times}; {rate}"
    )
    if asked > plan.rows:
        notice(f"{title}: {too_large(plan.rows, asked, hasattr(config, 'row_tokens'))}")
    if config.warmup_steps >= plan.steps:
        notice(
            f"{title}: the warm-up of {count_of(config.warmup_steps, 'step')} is as long as the "
            f"run or longer, so {config.lr:.3g} is hardly reached; lower warmup_steps"
        )


def too_large(rows: int, asked: int, in_rows: bool) -> str:
    """What a batch that exceeds the rows comes to, and how there are more steps; `in_rows`: they
    are packed ones, whose length is an option."""
    if rows == 1:
        shorter = ", or lower row_tokens," if in_rows else ""
        return (
            f"there is only one for a batch of {asked:,}, so each step takes that one; give more "
            f"data{shorter} for more steps"
        )
    shorter = ", or row_tokens," if in_rows else ""
    return (
        f"a batch of {asked:,} exceeds the {rows:,} there are, so a step takes them all; lower "
        f"batch{shorter} for more steps"
    )
