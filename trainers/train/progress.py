"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from puna.core.terminal import say

LINE_SECONDS = 20.0  # between lines where the output is no terminal


class Meter:
    """Counts steps and units (tokens, answers) and shows their rate, the loss and the time left."""

    def __init__(self, title: str, total: int, start: int, unit: str, show: bool):
        self.title, self.total, self.unit = title, total, unit
        self.step = self.first = start
        self.units = 0
        self.began = self.spoke = time.monotonic()
        self.show = show
        self.bar: Progress | None = None

    def advance(self, units: int, note: str = "") -> None:
        """One step done, `units` further units; `note` is shown beside the rate."""
        self.step += 1
        self.units += units
        now = time.monotonic()
        rate = self.units / max(now - self.began, 1e-9)
        text = f"{rate:,.0f} {self.unit}/s {note}".rstrip()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.step, note=text)
        elif self.show and (now - self.spoke > LINE_SECONDS or self.step == self.total):
            self.spoke = now
            left = (now - self.began) / max(self.step - self.first, 1) * (self.total - self.step)
            say(f"{self.title}: {self.step}/{self.total}, {text}, {left:.0f} s left")


@contextmanager
def meter(
    title: str, total: int, *, start: int = 0, unit: str = "tok", show: bool = True
) -> Iterator[Meter]:
    """A Meter for `total` steps of which `start` are done; drawn as a bar on a terminal."""
    counter = Meter(title, total, start, unit, show)
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield counter
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        bar.add_task(title, total=total, completed=start, note="")
        counter.bar = bar
        yield counter
