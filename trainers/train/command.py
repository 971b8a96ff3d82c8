"""A stage as a command: its configuration from the command line, its exit status, its mistakes."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from puna.core import parallel
from puna.core.terminal import say
from puna.trainers.train.config import Config, parse


def command(
    prog: str,
    config: type[Config],
    work: Callable[[Config], Any],
    arguments: Sequence[str] | None = None,
) -> int:
    """Do `work` with the configuration of `arguments` (left out: the process's own).

    Returns the exit status; a user's mistake is one sentence on stderr.
    """
    parallel.init()
    try:
        work(parse(config, sys.argv[1:] if arguments is None else arguments, prog))
    except (ValueError, RuntimeError, OSError) as error:
        say(f"{prog}: {error}", error=True)
        return 1
    except KeyboardInterrupt:
        say(f"{prog}: interrupted", error=True)
        return 130
    finally:
        parallel.close()
    return 0
