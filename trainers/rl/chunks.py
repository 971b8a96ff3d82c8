"""Answers drawn in chunks of prompts and appended to a file as they come: what a kill leaves of a
chunk is drawn again, and a run goes on from the last whole one."""

import json
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from puna.core import parallel
from puna.core.checkpoint.atomic import atomic_file
from puna.core.documents import append_rows, count_of
from puna.trainers.train import written
from puna.trainers.train.interrupts import stop_requests
from puna.trainers.train.progress import meter


def append_chunks(
    title: str,
    path: Path,
    asked: Sequence[Any],
    chunk: int,
    each: int,
    draw: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
    answers_to: Callable[[Any], Any] = itemgetter("messages"),
) -> None:
    """Append `each` rows a prompt to `path`, chunk after chunk of prompts, from where it ends.
    `asked`: the prompts, which `answers_to` reads off a row, as JSON has them; `draw` makes the
    rows of those with the numbers that it is given, in their order. Collective; SystemExit where
    it is asked to stop."""
    done = parallel.on_main(lambda: whole_chunks(path, asked, chunk, each, answers_to))
    starts = range(0, len(asked), chunk)
    bar = meter(title, len(starts), start=done, unit="answers", show=parallel.is_main())
    with bar as progress, stop_requests(path) as stop:
        for start in starts[done:]:
            numbers = range(start, min(start + chunk, len(asked)))
            append_chunk(path, draw(numbers[parallel.rank() :: parallel.world_size()]), each)
            progress.advance(len(numbers) * each)
            if stop():  # after the last one, too: more may follow
                raise SystemExit(
                    f"stopped after {count_of(numbers.stop, 'prompt')}; the same command "
                    f"continues {path}"
                )


def whole_chunks(
    path: Path, asked: Sequence[Any], chunk: int, each: int, answers_to: Callable[[Any], Any]
) -> int:
    """How many chunks `path` holds; what a kill left of a further one is cut off. ValueError
    where they answer other prompts.

    Chunks are repeated whole, so that they meet the same batches as in an uninterrupted run.
    """
    if not path.exists():
        return 0
    written.check(path.parent, path.name, grows=True)
    lines = path.read_bytes().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    size = chunk * each
    whole = len(complete) == len(asked) * each  # the last chunk may be shorter
    chunks = -(-len(complete) // size) if whole else len(complete) // size
    for number, line in enumerate(complete[: chunks * size]):
        prompt = number // each
        if prompt >= len(asked) or answers_to(json.loads(line)) != asked[prompt]:
            raise ValueError(
                f"{path}:{number + 1}: an answer to another prompt than prompt {prompt + 1} "
                "of those given now; give the former ones, or remove the file to draw anew"
            )
    if len(lines) > min(len(complete), chunks * size):
        with atomic_file(path) as partial:
            partial.write_bytes(b"".join(complete[: chunks * size]))
    return chunks


def append_chunk(path: Path, rows: Sequence[Mapping[str, Any]], each: int) -> None:
    """All ranks' rows of a chunk, `each` to a prompt, at the end of `path`, in the order of the
    prompts, which the ranks took in turn."""
    parts = parallel.gather(rows)
    if parallel.is_main():
        starts = [(start, part) for start in range(0, len(parts[0]), each) for part in parts]
        merged = [row for start, part in starts for row in part[start : start + each]]
        append_rows(path, merged)
        written.note(path.parent, path.name)
    parallel.barrier()
