"""What is held out of a file's rows: whole prompts, not rows."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from puna.core.documents import count_of
from puna.core.text.chat import Message
from puna.trainers.train.advice import advice

Item = TypeVar("Item")


def split(
    items: Sequence[Item],
    eval_share: float,
    seed: int,
    group: Callable[[Item], Hashable] | None = None,
) -> tuple[list[Item], list[Item]]:
    """(training, held-out): a random share of the items, at least one where the share is not 0.

    Items of one `group` stay on one side: an answer to a prompt that was trained on is not held
    out. (130 of 154 held-out pairs of one public set shared their prompt with a training pair.)
    Raises ValueError where nothing is left to train on.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(index if group is None else group(item), []).append(index)
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    members = list(groups.values())
    count = max(1, round(eval_share * len(items))) if eval_share > 0 else 0
    chosen: set[int] = set()
    for number in order:
        if len(chosen) + len(members[number]) <= count:
            chosen.update(members[number])
    if count and not chosen:  # each group is larger than the share
        smallest = min(order, key=lambda number: len(members[number]))
        chosen.update(members[smallest])
    if len(chosen) >= len(items):
        of = f" of {count_of(len(groups), 'different prompt')}" if len(groups) < len(items) else ""
        raise ValueError(
            f"there are too few rows ({len(items)}{of}) to hold some out; give held-out data of "
            f"their own, or {advice('eval_share', '--eval-share 0', 'set eval_share to 0')}"
        )
    kept = [item for i, item in enumerate(items) if i not in chosen]
    return kept, [items[i] for i in sorted(chosen)]


def split_batches(
    items: Sequence[Item],
    per_batch: int,
    seed: int,
    group: Callable[[Item], Hashable],
    batch: Callable[[Item], int | None],
) -> tuple[list[Item], list[Item]]:
    """(training, held-out): a random `per_batch` items of each batch, or a few less, never more
    than half of it; items of one `group` stay on one side, whatever their batches.

    Raises ValueError where no item has a batch.
    """
    sizes = Counter(number for item in items if (number := batch(item)) is not None)
    if not sizes:
        raise ValueError(
            "no row has a batch to hold some of it out; name its column in [columns], or use "
            f"{advice('eval_share', '--eval-share', 'eval_share')}"
        )
    room = Counter({number: min(per_batch, size // 2) for number, size in sizes.items()})
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(group(item), []).append(index)
    members = list(groups.values())
    chosen: set[int] = set()
    for number in np.random.default_rng(seed).permutation(len(members)).tolist():
        inside = Counter(each for i in members[number] if (each := batch(items[i])) is not None)
        if inside and inside <= room:
            chosen.update(members[number])
            room -= inside
    kept = [item for i, item in enumerate(items) if i not in chosen]
    return kept, [items[i] for i in sorted(chosen)]


def also_learned(
    learned: Iterable[Item], held: Sequence[Item], key: Callable[[Item], Hashable]
) -> list[str]:
    """A notice where held-out rows of their own are among those that are learned: what is measured
    on them says nothing of rows that were not seen."""
    known = {key(item) for item in learned}
    if not (both := sum(key(item) in known for item in held)):
        return []
    return [f"among those that are learned: {both:,} of {count_of(len(held), 'held-out row')}"]


def opening(messages: Sequence[Message]) -> str:
    """A dialogue's first user message: those that share it are not independent of each other."""
    return next((m["content"] for m in messages if m["role"] == "user"), "")


def exchange(messages: Sequence[Message]) -> tuple[str, str]:
    """A dialogue's first question and answer: one that goes on from another's is no other."""
    return opening(messages), next((m["content"] for m in messages if m["role"] == "assistant"), "")
