"""One line for people, from rank 0."""

from puna.core import parallel
from puna.core.terminal import say


def notice(line: object) -> None:
    if parallel.is_main():
        say(line)
