"""A stage as a command: its configuration from the command line, its exit status, its mistakes."""

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from puna.core import ranks, starting
from puna.core.errors import Notice, UserError
from puna.core.terminal import outlasting, say
from puna.trainers.train.config import Config, parse


def command(
    prog: str,
    config: type[Config],
    work: Callable[[Config], Any],
    arguments: Sequence[str] | None = None,
) -> int:
    """Do `work` with the configuration of `arguments` (left out: the process's own).

    Returns the exit status. A user's mistake is one sentence on stderr, from one rank; a mistake
    of ours shows where it happened.
    """
    starting.is_done()
    library = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, Notice):
            library(message, category, *where, **more)
        elif ranks.is_main():
            say(message)

    with outlasting():
        warnings.showwarning = show
        try:
            ranks.init()
            work(parse(config, sys.argv[1:] if arguments is None else arguments, prog))
            ranks.close()
            return 0
        except KeyboardInterrupt as error:
            return ended("; ".join([f"{prog}: interrupted", *map(str, error.args)]), 130)
        except SystemExit as stop:
            if not isinstance(stop.code, str):
                raise
            return ended(f"{prog}: {stop.code}", 1)
        except Exception as error:
            if ranks.is_lost(error):
                return ended(f"{prog}: {ranks.who_is_missing()}", 1, by_others=True)
            return ended(f"{prog}: {sentence(error)}", 1)
        finally:
            warnings.showwarning = library


def ended(line: str, status: int, *, by_others: bool = False) -> int:
    """Say why, where this rank is the one to say it."""
    if ranks.fail(line, by_others=by_others):
        say(line, error=True)
    return status


def sentence(error: Exception) -> str:
    """What to tell the user of an error: its own sentence, or where Puna went wrong."""
    if isinstance(error, (ValueError, OSError, UserError)):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(error):
        return (
            f"the memory is full ({str(error).splitlines()[0] if str(error) else 'of this machine'}"
            "); take smaller pieces (micro_batch, generation_batch, row_tokens) or a smaller model"
        )
    lines = "".join(traceback.format_exception(error))
    return f"this is a mistake in Puna, not in what you did; please report these lines\n{lines}"
