"""What a run is going to do, in numbers and in one line: epochs are what they say."""

from typing import NamedTuple

from puna.core import parallel
from puna.core.documents import count_of
from puna.trainers.train.advice import advice
from puna.trainers.train.loop import TrainConfig, learning_rate
from puna.trainers.train.notice import notice
from puna.trainers.train.run import Run
from puna.trainers.train.state import Visited


class Plan(NamedTuple):
    """So many steps of `batch` rows; the last one takes what is left of `visits`."""

    rows: int
    batch: int
    steps: int
    visits: int  # rows in all steps together: each of `rows` in every epoch
    begun: int = 0  # steps that were done when this batch was chosen
    before: int = 0  # visits in those

    def places(self, step: int) -> range:
        """Of a step's rows among all visits."""
        first = self.before + (step - self.begun) * self.batch
        return range(first, min(first + self.batch, self.visits))

    def visited(self, step: int) -> Visited:
        """After so many steps."""
        return Visited(min(self.places(step).start, self.visits), self.rows)


def of_epochs(rows: int, epochs: int, batch: int, run: Run | None = None) -> Plan:
    """Every row `epochs` times, behind those that the `run` has visited. A batch that exceeds the
    rows is all of them, so that an epoch is at least one step."""
    size, visits = min(batch, rows), rows * epochs
    begun, before = reached(rows, run)
    left = visits - before
    return kept(Plan(rows, size, begun - (-left // size), visits, begun, before), run)


def of_steps(rows: int, steps: int, batch: int, run: Run | None = None) -> Plan:
    """So many whole batches, epoch after epoch, behind what the `run` has visited."""
    begun, before = reached(rows, run)
    return kept(Plan(rows, batch, steps, before + (steps - begun) * batch, begun, before), run)


def reached(rows: int, run: Run | None) -> tuple[int, int]:
    """(steps done, visits in them) of a run whose checkpoint says it; where the rows are others now
    it goes on as far into them as it was into the others."""
    if run is None or run.visited is None:
        return 0, 0
    visits, of = run.visited
    if of == rows:
        return run.step, visits
    notice(
        f"{run.path}: {count_of(rows, 'row')} where there were {of:,}: it goes on "
        f"{visits / of:.3g} epochs into them, so that some may be seen once more or less"
    )
    return run.step, round(visits / of * rows)


def kept(plan: Plan, run: Run | None) -> Plan:
    """The plan, of which the run's checkpoints say how far they are."""
    if run is not None:
        run.visited_after = plan.visited
    return plan


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
