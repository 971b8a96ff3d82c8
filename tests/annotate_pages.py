"""Visitors of the page where people compare; without the extra `annotate` tests are skipped."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest

WHY = "needs the extra: pip install 'puna[annotate]'"
starlette, uvicorn, jinja2, httpx = (
    pytest.importorskip(name, reason=WHY) for name in ("starlette", "uvicorn", "jinja2", "httpx")
)

HOST = "http://127.0.0.1:8765"


def visitor(store, guidelines=None, *, origin=HOST, **options):
    """A browser on the page."""
    from starlette.testclient import TestClient

    from puna.annotate.app import application
    from puna.annotate.visits import Desk

    app = application(Desk(store, guidelines or {}, **options), {"127.0.0.1", "localhost"})
    return TestClient(app, base_url=HOST, headers={"origin": origin} if origin else {})


@contextmanager
def served(store, guidelines=None, **options):
    """The page in a thread of this process; gives its address."""
    from puna.annotate.app import application
    from puna.annotate.visits import Desk

    port = free_port()
    app = application(Desk(store, guidelines or {}, **options), {"127.0.0.1"})
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


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


class Server:
    """`puna annotate` in a process of its own, which can be killed and started again."""

    def __init__(self, out, *extra):
        self.port = free_port()
        self.at = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "puna.cli.main", "annotate", "--out", str(out),
                        "--port", str(self.port), *extra]  # fmt: skip

    def start(self):
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.2):
                    return
            except OSError:
                assert self.process.poll() is None, self.process.stdout.read()
                time.sleep(0.1)

    def end(self, how) -> str:
        self.process.send_signal(how)
        said = self.process.stdout.read()
        self.process.wait()
        return said
