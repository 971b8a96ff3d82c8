"""Files of comparisons for the tests that need them."""

from pathlib import Path

from puna.trainers.annotations.items import Given, add_item, ask_batch, put_answers
from puna.trainers.annotations.store import Store, open_store


def ask(text="what is red?"):
    return [{"role": "user", "content": text}]


def filled(path: Path, count=4, *, kind="helpfulness", people=1) -> Store:
    """A file with a batch of `count` items that have answers."""
    store = open_store(path, create=True)
    with store.writing():
        batch = ask_batch(store, "test", count)
        for number in range(count):
            source = f"test:{number}"
            item = add_item(store, batch, kind, source, ask(f"no. {number}?"), people=people)
            left = Given(f"left {number}", "A", "1", 0.5, 3)
            put_answers(store, item, left, Given(f"right {number}", "B", "2", 1.0, 4))
    return store
