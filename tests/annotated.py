"""Files of comparisons and visitors of the page, for the tests that need them."""

import re
from html.parser import HTMLParser
from pathlib import Path

from puna.trainers.annotations.items import Given, add_item, ask_batch, put_answers
from puna.trainers.annotations.store import Store, open_store

HOST = "http://127.0.0.1:8765"


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


def key_on(page: str) -> str:
    """The key of the comparison on a page."""
    found = re.search(r'name="key" value="([^"]+)"', page)
    assert found, page
    return found[1]


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes, whether inside of a label)."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict, bool]] = []
        self.labels = 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), self.labels > 0))
        self.labels += tag == "label"

    def handle_endtag(self, tag):
        self.labels -= tag == "label"
