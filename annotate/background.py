"""Work beside the page: a thread that takes one step after the other, as long as there is some."""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from puna.core.errors import UserError
from puna.core.terminal import say

PAUSE_SECONDS = 0.5  # before it is asked again whether there is something to do
PATIENCE_SECONDS = 0.2  # the longest that a step waits for people, who may be many


class Requests:
    """How many people wait for a page now: the processor is theirs first."""

    def __init__(self) -> None:
        self.count, self.none = 0, threading.Event()
        self.none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request; entered and left by one and the same thread always, the server's."""
        self.count += 1
        self.none.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self.none.set()

    def give_way(self) -> None:
        """Wait until nobody waits, but not for long."""
        self.none.wait(PATIENCE_SECONDS)


requests = Requests()  # of this process


class Background:
    """Calls `step` until it says that nothing is left to do, then waits and asks again."""

    def __init__(self, step: Callable[[], bool], broken: str):
        """`broken`: what is said where a step ends in an error that will not pass."""
        self.step, self.broken, self.problem = step, broken, ""
        self.wake, self.stop = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        while not self.stop.is_set():
            requests.give_way()
            try:
                busy = self.step()
                self.problem = ""
            except (UserError, OSError) as error:  # a locked file, a full disk: it may pass
                self.problem, busy = str(error), False
            except Exception as error:
                self.problem = f"{self.broken}: {error}"
                say("".join(traceback.format_exception(error)), error=True)
                return
            if not busy:
                self.wake.wait(PAUSE_SECONDS)
                self.wake.clear()

    def start(self) -> None:
        self.thread.start()

    def end(self) -> None:
        """Let the thread finish its step."""
        self.stop.set()
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join()
