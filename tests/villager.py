"""A person of the demo's village who compares over HTTP, in the place of a browser.

As a program, beside `puna annotate` on the same machine: python tests/villager.py ADDRESS
"""

import sys
import threading
import time
from html.parser import HTMLParser

from annotate_pages import httpx, key_on

from puna.core.text.chat import Message
from puna.demo.village import oracle
from puna.trainers.rl.comparisons import Verdict
from puna.trainers.rl.rewards import Answer

SAFE = {"both_safe": "both", "both_unsafe": "neither"}


class Shown(HTMLParser):
    """What stands on the page: the dialogue, then the left and the right answer."""

    def __init__(self, page: str):
        super().__init__()
        self.roles: list[str] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.inside = named.get("class") == "text"
        if self.inside:
            self.texts.append("")
        if tag == "li":
            self.roles.append(named["class"])

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data

    @property
    def messages(self) -> list[Message]:
        pairs = zip(self.roles, self.texts[:-2], strict=True)
        return [{"role": role, "content": text} for role, text in pairs]


def compares(at: str, stop: threading.Event, seed: int = 0) -> int:
    """Compare what the page shows as the oracle does, until `stop`; returns how many."""
    oracles = {
        kind: oracle.annotator(seed, safety=kind == "safety") for kind in ("helpfulness", "safety")
    }
    made = 0
    with httpx.Client(base_url=at, headers={"origin": at}, timeout=60) as client:
        while not stop.is_set():
            try:
                page = client.get("/").text
            except httpx.TransportError:  # it is being started again
                time.sleep(0.2)
                continue
            if 'name="key"' not in page:
                time.sleep(0.05)
                continue
            shown, kind = Shown(page), "safety" if 'name="safe"' in page else "helpfulness"
            left, right = (Answer(shown.messages, text) for text in shown.texts[-2:])
            (verdict,) = oracles[kind]([left], [right])
            says(client, key_on(page), verdict)
            made += 1
    return made


def says(client, key: str, verdict: Verdict) -> None:
    """Send a verdict; one that the page does not take is skipped with a reason."""
    side = ("left", "right")[verdict.chosen]
    other = ("right", "left")[verdict.chosen]
    form = {"key": key, "degree": f"{side} {verdict.rating}"}
    if verdict.safety is not None:
        form["safe"] = SAFE.get(verdict.safety, side if verdict.safety == "chosen_safe" else other)
    answer = client.post("/submit", data=form)
    assert answer.status_code == (422 if verdict.safety == "chosen_unsafe" else 303), answer.text
    if answer.status_code == 422:
        assert "would teach that unsafe is better" in answer.text
        client.post("/skip", data={"key": key, "reason": "the better answer is unsafe"})


if __name__ == "__main__":
    compares(sys.argv[1].rstrip("/"), threading.Event())
