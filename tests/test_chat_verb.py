"""`puna chat`: what its commands do, Ctrl-C, and a terminal's keys.
Run: python -m pytest tests/test_chat_verb.py -q"""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puna.cli.main import main
from puna.core.llama import Llama
from puna.trainers.data.readers import read_dialogues

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
HOT = ("--temperature", "2", "--top-p", "1")  # the tiny model then answers whatever it is asked


def talk(monkeypatch, tiny: Path, *lines: str, options: tuple = ("--temperature", "0")) -> int:
    """The verb in this process, told these lines."""
    said = iter(lines)

    def read(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    return main(["chat", "--model", str(tiny / "chat"), *options])


def saved(path: Path) -> list[tuple[str, str]]:
    """(role, content) of each message."""
    (row,) = map(json.loads, path.read_text().splitlines())
    return [(message["role"], message["content"]) for message in row["messages"]]


@pytest.fixture
def stopped(monkeypatch):
    """Streams after which Ctrl-C comes: for each call its pieces, None for one left alone."""
    planned: list[list[str] | None] = []
    whole = Llama.stream

    def stream(self, messages, **options):
        pieces = planned.pop(0) if planned else None
        if pieces is None:
            yield from whole(self, messages, **options)
            return
        yield from pieces
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "stream", stream)
    return planned


def test_ctrl_c_ends_the_answer_and_keeps_what_is_there(
    tiny, tmp_path, monkeypatch, capsys, stopped
):
    stopped += [None, ["a ", "half"], []]
    file = tmp_path / "talk.jsonl"
    lines = ["red cup", "blue cup", "not answered", "how", f"/save {file}"]
    assert talk(monkeypatch, tiny, *lines) == 0
    messages = saved(file)
    assert [text for role, text in messages if role == "user"] == ["red cup", "blue cup", "how"]
    assert messages[3] == ("assistant", "a half") and all(text for _, text in messages)
    shown = capsys.readouterr().out
    assert shown.count("(stopped; what is there of the answer is kept)") == 1
    assert shown.count("(stopped; the message is taken back)") == 1


def test_a_retry_that_is_stopped_at_once_leaves_the_answer(
    tiny, tmp_path, monkeypatch, capsys, stopped
):
    stopped += [["old"], []]
    file = tmp_path / "talk.jsonl"
    assert talk(monkeypatch, tiny, "red cup", "/retry", f"/save {file}") == 0
    assert saved(file) == [("user", "red cup"), ("assistant", "old")]
    assert "(stopped; the answer before stays)" in capsys.readouterr().out


def test_a_saved_talk_is_data_and_no_file_is_lost(tiny, tmp_path, monkeypatch, capsys):
    file, mine = tmp_path / "talk.jsonl", tmp_path / "mine.txt"
    mine.write_text("mine")
    lines = [
        "/save", f"/save {file}", "red cup", "/save", f"/save {mine}", f"/save {tmp_path}",
        f"/save {file}", "how", f"/save {file}",
    ]  # fmt: skip
    assert talk(monkeypatch, tiny, *lines) == 0
    assert mine.read_text() == "mine"
    (dialogue,), skipped = read_dialogues(file)
    assert [message["role"] for message in dialogue.messages] == ["user", "assistant"] * 2
    assert not skipped
    errors = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\((.*); say it.*", r"\1", line) for line in errors] == [
        "nothing yet", "nothing yet", "/save FILE writes what has been said",
        f"{mine} is there already; give another name",
        f"{tmp_path} is there already; give another name",
    ]  # fmt: skip


def test_retry_draws_another_answer_in_the_same_place(tiny, tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{n}.jsonl" for n in range(4)]
    lines = [
        "/retry", "red cup", "blue", f"/save {files[0]}", "/retry", f"/save {files[1]}", "/retry",
        f"/save {files[2]}", "/new", "red cup", "blue", f"/save {files[3]}",
    ]  # fmt: skip
    assert talk(monkeypatch, tiny, *lines, options=HOT) == 0
    first, *others, again = map(saved, files)
    assert first == again  # /new begins the random numbers again
    for other in others:
        assert other[:3] == first[:3] and other[3] != first[3]
    assert "(there is no answer yet; " in capsys.readouterr().err


def test_a_system_message_can_be_set_and_taken_away(tiny, tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{n}.jsonl" for n in range(3)]
    lines = ["red cup", f"/save {files[0]}", "/system be red\nalways", "how", f"/save {files[1]}",
             "/system <<SYS>>", "/system", "why", f"/save {files[2]}"]  # fmt: skip
    assert talk(monkeypatch, tiny, *lines, options=("--system", "be blue")) == 0
    kept = [saved(file)[0] for file in files]
    assert kept == [("system", "be blue"), ("system", "be red\nalways"), ("user", "red cup")]
    assert len(saved(files[2])) == 6
    assert "(the system message contains the chat tag <<SYS>>; " in capsys.readouterr().err


def test_what_begins_with_a_slash_is_a_command_or_a_message(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.jsonl"
    lines = ["/help", "/nonsense", "/usr/bin", " /etc is what", "", "   ", f"/save {file}"]
    assert talk(monkeypatch, tiny, *lines, options=HOT) == 0
    shown = capsys.readouterr()
    assert [text for role, text in saved(file) if role == "user"] == ["/usr/bin", "/etc is what"]
    assert "there is no /nonsense; /help lists the commands" in shown.err
    for name in ("/new", "/retry", "/system TEXT", "/save FILE", "/help", "Ctrl-C", "Ctrl-D"):
        assert name in shown.out


class Terminal:
    """The verb on a terminal of its own, as somebody who types sees it."""

    def __init__(self, *arguments: str) -> None:
        self.end, inside = pty.openpty()
        command = [sys.executable, "-m", "puna.cli.main", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=ENVIRONMENT,
            start_new_session=True, preexec_fn=controlling,
        )  # fmt: skip
        os.close(inside)
        self.shown = b""

    def until(self, words: bytes) -> None:
        """Read until these words are shown."""
        last = time.monotonic() + 120
        while words not in self.shown:
            assert time.monotonic() < last, self.shown
            if select.select([self.end], [], [], 0.2)[0]:
                self.shown += os.read(self.end, 1 << 16)
        self.shown = self.shown.partition(words)[2]

    def type(self, keys: bytes) -> None:
        os.write(self.end, keys)


def controlling() -> None:
    """Make stdin the terminal whose Ctrl-C this process hears."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


UP, LEFT, PASTED, END_PASTED = b"\x1b[A", b"\x1b[D", b"\x1b[200~", b"\x1b[201~"
PROMPT = (
    b"\x1b[?2004h"  # what readline asks a terminal for before each line: brackets around pastes
)


def test_a_terminal_pastes_goes_back_and_drops_a_line(tiny, tmp_path):
    pytest.importorskip("readline")
    file = tmp_path / "talk.jsonl"
    terminal = Terminal("--model", str(tiny / "chat"), *HOT)
    terminal.until(PROMPT)
    terminal.type(PASTED + b"red cup\n\nblue cup" + END_PASTED + b" how\r")
    terminal.until(PROMPT)
    terminal.type(b"dropped")
    terminal.until(b"dropped")
    time.sleep(0.2)  # CPython's readline sees a Ctrl-C only while it waits for a key
    terminal.type(b"\x03")
    terminal.until(b"(Ctrl-D ends)")
    terminal.until(PROMPT)
    terminal.type(b"won" + LEFT * 2 + b"h\r")
    terminal.until(PROMPT)
    terminal.type(UP + b" why\r")
    terminal.until(PROMPT)
    terminal.type(f"/save {file}\r".encode())
    terminal.until(b"(wrote ")
    terminal.until(PROMPT)
    terminal.type(b"\x04")
    assert terminal.process.wait(60) == 0
    os.close(terminal.end)
    asked = [text for role, text in saved(file) if role == "user"]
    assert asked == ["red cup\n\nblue cup how", "whon", "whon why"]
