"""A round's comparisons by people: asked for in their file, waited for, taken when complete.

The loop and the page (`puna annotate`) share nothing but the file: either may end and begin again.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core import parallel
from puna.core.checkpoint.hashes import digest
from puna.trainers.annotations.exchange import preferences
from puna.trainers.annotations.items import (
    KINDS,
    Given,
    Progress,
    add_item,
    ask_batch,
    close_batch,
    progress_of,
    put_answers,
)
from puna.trainers.annotations.store import Store, opened
from puna.trainers.rl.comparisons import Annotator, read_pairs, write_rows
from puna.trainers.rl.config import RLHFConfig
from puna.trainers.rl.rewards import Reward
from puna.trainers.train.notice import notice
from puna.trainers.train.progress import Meter, meter

POLL_SECONDS = 2.0  # between two looks at the file
LEARNED = ("messages", "chosen", "rejected", "rating", "safety", "chosen_model", "rejected_model",
           "chosen_temperature", "rejected_temperature")  # fmt: skip


def check_people(
    config: RLHFConfig, annotators: Mapping[str, Annotator] | None, reward: Reward | None
) -> None:
    """ValueError where somebody else compares, or the file is of something else."""
    if config.annotations is None:
        return
    if annotators is not None or reward is not None:
        raise ValueError(
            "annotations is for people's comparisons: leave annotators and reward of your own out"
        )
    if config.annotations.exists() and parallel.is_main():
        with opened(config.annotations):
            pass


def collect(path: Path, number: int, folder: Path) -> None:
    """Have people compare the pairs of round `number`; returns when they have compared them all and
    what they said lies beside the pairs. Interrupted, the same call goes on. Collective.

    Raises ValueError where every comparison of a kind was skipped.
    """
    kinds = [kind for kind in KINDS if not parallel.broadcast((folder / f"{kind}.jsonl").exists())]
    if not kinds:
        return
    batches: dict[str, int] = parallel.on_main(lambda: ask(path, number, folder, kinds))
    done, total = parallel.on_main(lambda: progress(path, batches))
    with meter("compared", total, start=done, unit="comparisons", show=parallel.is_main()) as bar:
        while not parallel.on_main(lambda: are_complete(path, batches, bar)):
            pass
    parallel.on_main(lambda: take(path, number, folder, batches))


def ask(path: Path, number: int, folder: Path, kinds: list[str]) -> dict[str, int]:
    """Put the pairs of these kinds into the file, each once; returns their batches' numbers."""
    with opened(path, create=True) as store:
        batches = {kind: ask_kind(store, folder / f"{kind}-pairs.jsonl", kind) for kind in kinds}
        asked = ", ".join(
            f"{left.total - left.done} for {kind} (batch {batch})"
            for kind, batch in batches.items()
            for left in [progress_of(store, batch)]
        )
    notice(f"V{number} waits for comparisons: {asked}; people come by puna annotate --out {path}")
    return batches


def ask_kind(store: Store, pairs: Path, kind: str) -> int:
    """The batch of a file of pairs; which answer is a was drawn when they were sampled."""
    source, rows = f"rlhf:{kind}:{digest(pairs).sha256[:32]}", read_pairs(pairs)
    with store.writing():
        batch = ask_batch(store, source, len(rows))
        for place, row in enumerate(rows):
            item = add_item(store, batch, kind, f"{source}:{place}", row["messages"])
            if item is not None:
                put_answers(store, item, given(row, "a"), given(row, "b"))
    return batch


def given(row: dict[str, Any], side: str) -> Given:
    return Given(
        row[side], row.get(f"{side}_model", ""), temperature=row.get(f"{side}_temperature")
    )


def progress(path: Path, batches: Mapping[str, int]) -> Progress:
    """How far the batches are, together."""
    with opened(path) as store:
        found = [progress_of(store, batch) for batch in batches.values()]
    return Progress(sum(each.done for each in found), sum(each.total for each in found))


def are_complete(path: Path, batches: Mapping[str, int], bar: Meter) -> bool:
    """Whether all is compared, and from now on stays so; waits a little where not."""
    done, total = progress(path, batches)
    for _ in range(done - bar.step):
        bar.advance(1)
    if done == total:
        with opened(path) as store:
            if all(close_batch(store, batch) for batch in batches.values()):
                return True
    time.sleep(POLL_SECONDS)
    return False


def take(path: Path, number: int, folder: Path, batches: Mapping[str, int]) -> None:
    """Write what people said; the reward models read no more than is in these files."""
    with opened(path) as store:
        for kind, batch in batches.items():
            rows = [
                {**{name: row[name] for name in LEARNED if name in row}, "batch": number}
                for row in preferences(store, batch)
            ]
            if not rows:
                raise ValueError(
                    f"every comparison of batch {batch} in {path} was skipped, so that there is "
                    f"nothing to learn of {kind}; write {folder / f'{kind}.jsonl'} yourself or "
                    "start a loop with other prompts"
                )
            write_rows(folder / f"{kind}.jsonl", rows)
