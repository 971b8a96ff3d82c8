"""`puna annotate` as it runs: answers ahead of time, options, servers that are killed.

Run: python -m pytest tests/test_annotate_server.py -q
"""

import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from annotate_pages import Server, free_port, httpx, key_on, visitor
from annotated import filled

from puna.annotate.config import AnnotateConfig
from puna.annotate.run import hosts_of, run
from puna.annotate.supply import Supply
from puna.core.checkpoint.folder import load_model
from puna.core.generation.generate import generate
from puna.core.text.chat import decode_answer, encode_prompt
from puna.trainers.annotations.exchange import preferences
from puna.trainers.annotations.items import hand_out, progress_of
from puna.trainers.annotations.people import new_token, person
from puna.trainers.annotations.store import open_store, opened
from puna.trainers.annotations.verdicts import submit


def config_of(tiny, tmp_path, **options) -> AnnotateConfig:
    given = {
        "models": [tiny / "chat", tiny / "lm"], "prompts": [tiny / "prompts.jsonl"],
        "out": tmp_path / "c.db", "max_new_tokens": 8, "device": "cpu", "ahead": 3,
    }  # fmt: skip
    return AnnotateConfig(**{**given, **options})


def test_answers_are_made_ahead_and_can_be_drawn_again(tiny, tmp_path):
    store = open_store(tmp_path / "c.db", create=True)
    supply = Supply(store, config_of(tiny, tmp_path))
    while supply.step():
        pass
    assert progress_of(store, 1) == (0, 16)
    rows = store.rows("SELECT * FROM answer JOIN item ON item.id = answer.item")
    assert len(rows) == len({(row["item"], row["text"]) for row in rows}) == 6
    assert {row["model"] for row in rows} == {str(tiny / "chat"), str(tiny / "lm")}
    assert len({row["version"] for row in rows}) == 2
    for row in rows:
        messages = json.loads(row["messages"])
        (drawn,) = generate(
            load_model(row["model"]), [encode_prompt(supply.tokenizer, messages)],
            max_new_tokens=8, eos_id=supply.tokenizer.eos_id, temperature=row["temperature"],
            seed=row["seed"],
        )  # fmt: skip
        assert decode_answer(supply.tokenizer, drawn.tokens) == row["text"]
    item = hand_out(store, person(store, "ann"))
    submit(store, person(store, "ann"), item.key, chosen="left", rating="better")
    again = Supply(store, config_of(tiny, tmp_path))  # the server was started again
    while again.step():
        pass
    sources = [row[0] for row in store.rows("SELECT source FROM item ORDER BY id")]
    assert sources == [f"annotate:1:{place}" for place in range(4)]


def test_equal_answers_are_never_shown(tiny, tmp_path):
    store = open_store(tmp_path / "c.db", create=True)
    same = config_of(tiny, tmp_path, models=[tiny / "chat"], temperatures=[0.01], pairs=3)
    supply = Supply(store, same)
    while supply.step():
        pass
    pairs = [{each["text"] for each in store.rows("SELECT text FROM answer WHERE item = ?", n)}
             for n in range(1, 4)]  # fmt: skip
    assert all(len(pair) in (0, 2) for pair in pairs)
    failed = store.number("SELECT count(*) FROM item WHERE failed IS NOT NULL")
    assert progress_of(store, 1) == (0, 3 - failed) and failed == pairs.count(set())


def test_a_dialogue_goes_on_with_the_chosen_answer(tiny, tmp_path):
    store = open_store(tmp_path / "c.db", create=True)
    supply = Supply(store, config_of(tiny, tmp_path, pairs=1))
    client = visitor(store, supply=supply, turns=2)
    assert "One moment" in client.get("/").text
    mine = {"nonce": "n", "kind": "safety"}
    for wrong in (" ", "[INST]"):
        assert client.post("/own", data={**mine, "text": wrong}).status_code == 422
    long = client.post("/own", data={**mine, "text": "red " * 400})
    assert long.status_code == 422 and "write less" in long.text and "red red" in long.text
    for _ in range(2):  # sent twice
        client.post("/own", data={**mine, "text": "red cup?"})
    assert supply.step()
    page = client.get("/").text
    form = {"key": key_on(page), "degree": "left better", "safe": "both"}
    asked = client.post("/submit", data=form)
    assert asked.url.path == "/continue" and "red cup?" in asked.text
    (verdict,) = re.findall(r'name="verdict" value="(\d+)"', asked.text)
    reply = {"verdict": verdict, "text": "why?"}
    assert "One moment" in client.post("/continue", data=reply).text
    client.post("/continue", data=reply)
    assert supply.step()
    (first,) = preferences(store)
    item = hand_out(store, person(store, "me"))
    assert [each["content"] for each in item.messages] == ["red cup?", first["chosen"], "why?"]
    assert item.kind == "safety" and progress_of(store, 1) == (1, 3)
    client.post("/undo")  # back to the first question: its reply is gone
    assert progress_of(store, 1) == (0, 2)
    page = client.get("/").text
    client.post("/submit", data={**form, "key": key_on(page), "degree": "right better"})
    (again,) = preferences(store)
    assert again["chosen"] == first["rejected"]


def options(**given):
    return {"out": "c.db", **given}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"host": "0.0.0.0"}, "is open to others; name with --annotators"),
        ({"models": ["a"]}, "models and prompts belong together"),
        ({"models": ["a", "b", "c"], "prompts": ["p"]}, "models names 3; two are compared"),
        ({"annotators": [" "]}, "expected a name"),
        ({"annotators": ["owner"]}, "whoever started the server"),
        ({"renew": True}, "renew is for the people"),
        ({"port": 70000}, "port is 70000; it must be at most 65535"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        run(AnnotateConfig(**options(**given)))


def test_what_cannot_be_served_is_one_sentence(tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="cannot be listened at .*; give another --port"):
            run(AnnotateConfig(out=tmp_path / "c.db", port=taken.getsockname()[1]))
    free = free_port()
    with pytest.raises(ValueError, match="no such model"):
        run(config_of(tiny, tmp_path, models=[tmp_path / "none"], port=free))
    with pytest.raises(ValueError, match="is a reward model"):
        run(config_of(tiny, tmp_path, models=[tiny / "safety"], port=free))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        run(config_of(tiny, tmp_path, max_new_tokens=256, port=free))
    with pytest.raises(ValueError, match="guidelines are a Markdown file"):
        run(config_of(tiny, tmp_path, safety_guidelines=tmp_path / "none.md", port=free))
    assert hosts_of(AnnotateConfig(out="c.db", names=["Ex.org"])) >= {"ex.org", "localhost"}


def test_a_server_killed_between_two_requests_loses_nothing(tmp_path):
    filled(tmp_path / "c.db", 8).close()
    with opened(tmp_path / "c.db") as store:
        token = new_token(store, "ann")
    server = Server(tmp_path / "c.db", "--annotators", "ann")
    sent = []
    with httpx.Client(base_url=server.at, headers={"origin": server.at}, timeout=60) as client:
        for _ in range(2):
            server.start()
            client.get(f"/enter/{token}")
            for degree in ("left better", "right better"):
                sent.append({"key": key_on(client.get("/").text), "degree": degree})
                assert client.post("/submit", data=sent[-1]).status_code == 303
            sent.append({"key": key_on(client.get("/").text), "degree": "left better"})
            said = server.end(signal.SIGKILL)  # between the page and its answer
            assert token not in said
        server.start()
        for form in sent:  # everything once more, as a browser that goes on where it was
            client.post("/submit", data=form)
        said = server.end(signal.SIGINT)
    assert token not in said and server.process.returncode == 130
    with opened(tmp_path / "c.db") as store:
        kept = [row["chosen_side"] for row in preferences(store)]
        keys = [row[0] for row in store.rows("SELECT key FROM verdict")]
    assert len(keys) == len(set(keys)) == len(kept) and set(keys) <= {each["key"] for each in sent}
    assert len(kept) == 5 and kept[:2] == ["left", "right"]


@pytest.mark.slow
def test_fifty_people_at_once(tmp_path):
    """0 errors, 0 lost rows; `-s` shows how long 95 of 100 answers took at the most."""
    count, each = 50, 6
    filled(tmp_path / "c.db", count * (each + 1)).close()  # the next one lies before everybody
    with opened(tmp_path / "c.db") as store:
        tokens = [new_token(store, f"person {number}") for number in range(count)]
    server = Server(tmp_path / "c.db", "--annotators", "person 0")
    server.start()
    took, barrier = [], threading.Barrier(count)

    def work(token):
        with httpx.Client(base_url=server.at, headers={"origin": server.at}, timeout=60) as client:
            client.get(f"/enter/{token}")
            barrier.wait()
            for _ in range(each):
                key = key_on(client.get("/").text)
                began = time.monotonic()
                answer = client.post("/submit", data={"key": key, "degree": "left better"})
                took.append(time.monotonic() - began)
                assert answer.status_code == 303
                time.sleep(0.5)  # a person reads; nobody is faster than two a second

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, tokens))
    server.end(signal.SIGINT)
    with opened(tmp_path / "c.db") as store:
        items = [row["item"] for row in preferences(store)]
    assert len(items) == len(set(items)) == count * each
    print(f"the slowest twentieth took over {sorted(took)[int(0.95 * len(took))]:.2f} s")
