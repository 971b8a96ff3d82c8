"""What hostile visitors send to the page. Run: python -m pytest tests/test_annotate_hostile.py -q

What other sites may do is in tests/test_annotate.py.
"""

import socket
from contextlib import suppress
from urllib.parse import quote, urlsplit

import pytest
from annotate_pages import key_on, served, visitor
from annotated import filled

from puna.annotate.background import Background
from puna.trainers.annotations.exchange import preferences
from puna.trainers.annotations.items import add_item, ask_batch


@pytest.fixture
def store(tmp_path):
    found = filled(tmp_path / "c.db", 6)
    yield found
    found.close()


def answered(at, raw: bytes, *, cut: bool = False) -> bytes:
    """What comes back for bytes that are sent, with `cut` until the line is closed after them."""
    with socket.create_connection((urlsplit(at).hostname, urlsplit(at).port), 20) as line:
        line.sendall(raw)
        if cut:
            with suppress(OSError):  # it may have answered and gone
                line.shutdown(socket.SHUT_WR)
        found = b""
        while piece := line.recv(65536):
            found += piece
    return found


UPWARDS = ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "..%5capp.py", "....//app.py",
           "/etc/passwd", "%2fetc%2fpasswd", "..%00/app.py", ".", "")  # fmt: skip


@pytest.mark.parametrize("path", UPWARDS)
def test_nothing_but_the_pages_own_files_is_given(store, path):
    with served(store) as at:
        host = urlsplit(at).netloc.encode()
        raw = b"GET /static/" + path.encode() + b" HTTP/1.1\r\nhost: " + host
        found = answered(at, raw + b"\r\nconnection: close\r\n\r\n")
    assert found.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), found[:80]
    assert b"root:" not in found and b"starlette" not in found.lower()


def test_requests_that_are_none_leave_the_page_standing(store):
    """Each is refused, or its connection closed; the next visitor is served."""
    with served(store) as at:
        host = b"host: " + urlsplit(at).netloc.encode() + b"\r\n"
        head = b"POST /submit HTTP/1.1\r\norigin: " + at.encode() + b"\r\n" + host
        sent = [
            b"\x00\xff" * 4000, b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + host + b"host: evil.example\r\n\r\n",
            b"GET http://evil.example/ HTTP/1.1\r\nhost: evil.example\r\n\r\n",
            b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n" + host + b"\r\n",
            head + b"content-length: -1\r\n\r\n", head + b"content-length: 9999999999\r\n\r\nkey=",
            head + b"transfer-encoding: chunked\r\n\r\nfffffffffffffff\r\nx",
            head + b"content-length: 300000\r\n\r\n" + b"a" * 300_000,
            head + b"content-length: 120000\r\n\r\n" + b"&a=b" * 30_000,
            head + b"cookie: puna=" + b"\xff" * 100 + b"\r\ncontent-length: 0\r\n\r\n",
        ]  # fmt: skip
        for raw in sent:
            try:
                found = answered(at, raw, cut=True)
            except ConnectionError:
                continue
            assert not found.startswith((b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 5")), raw[:60]
        assert answered(at, b"GET / HTTP/1.1\r\n" + host + b"connection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        )
    assert not list(preferences(store))


def test_lines_that_are_held_open_keep_nobody_out(store):
    with served(store) as at:
        place = (urlsplit(at).hostname, urlsplit(at).port)
        held = [socket.create_connection(place, 20) for _ in range(200)]
        for line in held:
            line.sendall(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ")
        host = urlsplit(at).netloc.encode()
        raw = b"GET / HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n"
        assert answered(at, raw).startswith(b"HTTP/1.1 200")
        for line in held:
            line.close()


ODD = ("\x00", "a\x00b", "\ufeff", "\u202e", "'; DROP TABLE verdict; --", "%s%n", "left better\x00",
       "x" * 5000)  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_odd_values_of_every_field_are_refused_or_kept_as_text(store, text):
    client = visitor(store)
    key = key_on(client.get("/").text)
    good = {"key": key, "degree": "left better", "safe": "both", "seconds": "1"}
    for name in ("key", "degree"):
        answer = client.post("/submit", data={**good, name: text}, follow_redirects=False)
        assert answer.status_code in (400, 409, 422), (name, answer.status_code)
    assert client.post("/undo").status_code == 409 and not list(preferences(store))
    reason = {"key": key, "other": text, "seconds": text}
    assert client.post("/skip", data=reason).status_code in (200, 400)
    assert client.get("/dashboard").status_code == 200
    assert client.get(f"/enter/{quote(text)}").status_code in (401, 404)
    assert client.post("/submit", data={**good, "key": key_on(client.get("/").text)}).is_success
    assert [row["seconds"] for row in preferences(store)] == [1]


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "1e400", "9" * 400, "1_0", "", "٣"])
def test_times_that_are_none_are_not_kept(store, seconds):
    client = visitor(store)
    form = {"key": key_on(client.get("/").text), "degree": "left better", "seconds": seconds}
    assert client.post("/submit", data=form).is_success
    (row,) = preferences(store)
    assert row.get("seconds") in (None, 10.0, 3.0)
    assert client.get("/dashboard").status_code == 200


def test_a_full_disk_is_said_and_the_form_can_be_sent_again(store):
    client = visitor(store)
    pages = store.number("PRAGMA page_count")
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    said, number = [], 0
    while not said and number < 200:  # until the file's last page is full
        form = {"key": key_on(client.get("/").text), "reason": "x" * 500}
        answer = client.post("/skip", data={**form, "other": f"{number} " + "y" * 490})
        said = [answer] if not answer.is_success else []
        number += 1
        with store.writing() as db:
            db.execute("UPDATE item SET wanted = 1 WHERE id IN (SELECT item FROM verdict)")
            db.execute("UPDATE verdict SET undone = 1")
    assert said[0].status_code == 503 and "disk is full" in said[0].text
    kept = store.number("SELECT count(*) FROM verdict")
    store.connection.execute("PRAGMA max_page_count = 100000")
    assert client.post("/skip", data=form).is_success
    assert store.number("SELECT count(*) FROM verdict") == kept + 1
    assert store.rows("PRAGMA integrity_check")[0][0] == "ok"


def test_when_the_sampler_breaks_the_page_says_so(tmp_path):
    store = filled(tmp_path / "c.db", 0)
    ask_batch(store, "annotate:9", 1, 9)
    add_item(store, 9, "helpfulness", "x", [{"role": "user", "content": "why?"}])

    def step():
        raise RuntimeError("<b>out of memory</b>")

    class Supply:
        batch, background = 9, Background(step, "answers can no longer be sampled")

    Supply.background.start()
    Supply.background.thread.join(20)
    page = visitor(store, supply=Supply()).get("/").text
    assert "One moment" in page and "answers can no longer be sampled: &lt;b&gt;out of" in page
