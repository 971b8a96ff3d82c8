"""One line for people, from rank 0."""

from puna.core import parallel


def notice(line: object) -> None:
    if parallel.is_main():
        print(line, flush=True)
