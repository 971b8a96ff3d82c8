"""What is held out of a file's rows: whole prompts, not rows.

Each group of rows has a place of its own, a hash of the seed and what it has in common, and those
with the first places are held out. So a row that was held out stays so when others come in later:
a model that goes on with more data is not measured on what it has learned.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

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

    With more items the share is more of them, so that a few may come to it that were trained on
    before: a run that goes on from another had better have held-out data of its own. Items of one
    `group` stay on one side: an answer to a prompt that was trained on is not held out. (130 of 154
    held-out pairs of one public set shared their prompt with a training pair.)
    Raises ValueError where nothing is left to train on.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(index if group is None else group(item), []).append(index)
    members = [groups[key] for key in in_places(groups, seed)]
    count = max(1, round(eval_share * len(items))) if eval_share > 0 else 0
    chosen: set[int] = set()
    for group_of in members:
        if len(chosen) + len(group_of) <= count:
            chosen.update(group_of)
    if count and not chosen:  # each group is larger than the share
        smallest = min(members, key=len)
        chosen.update(smallest)
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
    than half of it. Items of one `group` stay on one side, that which the first of its batches
    gives it, so that what was held out of a batch does not change when another follows; where many
    come again in later batches, a few more may be held out of those.

    Raises ValueError where no item has a batch.
    """
    sizes = Counter(number for item in items if (number := batch(item)) is not None)
    if not sizes:
        raise ValueError(
            "no row has a batch to hold some of it out; name its column in [columns], or use "
            f"{advice('eval_share', '--eval-share', 'eval_share')}"
        )
    room = {number: min(per_batch, size // 2) for number, size in sizes.items()}
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(group(item), []).append(index)
    found = {
        key: Counter(each for i in members if (each := batch(items[i])) is not None)
        for key, members in groups.items()
    }
    chosen: set[int] = set()
    placed = [key for key in in_places(groups, seed) if found[key]]
    for key in sorted(placed, key=lambda key: min(found[key])):  # batch after batch
        if found[key][min(found[key])] <= room[min(found[key])]:
            chosen.update(groups[key])
            for number, count in found[key].items():
                room[number] -= count
    kept = [item for i, item in enumerate(items) if i not in chosen]
    return kept, [items[i] for i in sorted(chosen)]


def in_places(groups: Iterable[Hashable], seed: int) -> list[Hashable]:
    """The groups by a hash of each alone and the seed."""

    def place(group: Hashable) -> bytes:
        text = repr((seed, group)).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=16).digest()

    return sorted(groups, key=place)


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
