"""Samples drawn in chunks of prompts and appended to a file as they come: what a kill leaves of a
chunk is drawn again, and a run goes on from the last whole one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from puna.core import parallel
from puna.core.chat import Message
from puna.core.checkpoint.atomic import atomic_file
from puna.trainers.rl.best_of import Drawn, write_samples
from puna.trainers.train import written
from puna.trainers.train.interrupts import stop_requests
from puna.trainers.train.progress import meter


def append_chunks(
    title: str,
    path: Path,
    asked: Sequence[list[Message]],
    chunk: int,
    each: int,
    draw: Callable[[Sequence[int]], Sequence[Drawn]],
) -> None:
    """Append `each` samples a prompt to `path`, chunk after chunk of prompts, from where it ends.
    `asked`: the prompts; `draw` makes the samples of those with the numbers
    that it is given. Collective; SystemExit where it is asked to stop."""
    done = parallel.on_main(lambda: whole_chunks(path, asked, chunk, each))
    starts = range(0, len(asked), chunk)
    bar = meter(title, len(starts), start=done, unit="answers", show=parallel.is_main())
    with bar as progress, stop_requests() as stop:
        for start in starts[done:]:
            if parallel.all_max(int(stop())):
                raise SystemExit(
                    f"stopped after {start} prompts; the same command continues {path}"
                )
            numbers = range(start, min(start + chunk, len(asked)))
            append_chunk(path, draw(numbers[parallel.rank() :: parallel.world_size()]))
            progress.advance(len(numbers) * each)


def whole_chunks(path: Path, asked: Sequence[list[Message]], chunk: int, each: int) -> int:
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
        if prompt >= len(asked) or json.loads(line)["messages"] != asked[prompt]:
            raise ValueError(
                f"{path}:{number + 1}: an answer to another prompt than prompt {prompt + 1} "
                "of those given now; give the former ones, or remove the file to draw anew"
            )
    if len(lines) > min(len(complete), chunks * size):
        with atomic_file(path) as partial:
            partial.write_bytes(b"".join(complete[: chunks * size]))
    return chunks


def append_chunk(path: Path, samples: Sequence[Drawn]) -> None:
    """All ranks' samples of a chunk at the end of `path`, in the order of the prompts."""
    merged = [sample for part in parallel.gather(samples) for sample in part]
    if parallel.is_main():
        merged.sort(key=lambda sample: (sample["prompt"], sample["sample"]))
        write_samples(path, merged, mode="a")
        written.note(path.parent, path.name)
    parallel.barrier()
