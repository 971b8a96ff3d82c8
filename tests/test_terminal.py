"""What others wrote is shown and never sent. Run: python -m pytest tests/test_terminal.py -q"""

import ast
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import puna
from puna.cli import chat, generate, tokenizer
from puna.cli.main import VERBS, main
from puna.core.terminal import say, say_table, shown
from puna.trainers.evaluate import EvaluateConfig
from puna.trainers.train.command import command

ROOT = Path(__file__).parents[1]
EVIL = "a\x1b]0;own\x07\x9b2J\r\x08\u202eb\u2066\x00\x7f\udcff"
SHOWN = r"a\x1b]0;own\x07\x9b2J\x0d\x08\u202eb\u2066\x00\x7f\udcff"


def clean(text: str) -> bool:
    """Whether nothing in it is obeyed by a terminal."""
    return text == shown(text)


def test_shown() -> None:
    assert shown(EVIL) == SHOWN and clean(SHOWN)
    plain = "tab\tline\n ü 🙂 中 é עברית 100%"
    assert shown(plain) == plain


def test_a_stream_that_lacks_a_character(monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say(f"ü{EVIL}")
    assert stream.buffer.getvalue() == rb"\xfc" + SHOWN.encode() + b"\n"


def prints(path: Path) -> list[str]:
    """The places of a file that print by themselves."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                found.append(f"{path}:{node.lineno}: print")
            case ast.Call(func=ast.Attribute(attr="print" | "write", value=ast.Name(id=who))):
                if who in ("console", "stdout", "stderr"):
                    found.append(f"{path}:{node.lineno}: {who}")
            case ast.Call(
                func=ast.Attribute(
                    attr=asked,
                    value=ast.Attribute(attr="stdout" | "stderr", value=ast.Name(id="sys")),
                )
            ) if asked != "isatty":
                found.append(f"{path}:{node.lineno}: sys.{asked}")
            case ast.Call(func=ast.Name(id="Console")) if path.name != "progress.py":
                found.append(f"{path}:{node.lineno}: Console")
    return found


def test_there_is_one_way_to_the_terminal() -> None:
    rooms = ("core", "trainers", "demo", "annotate", "cli", "puna")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 80
    allowed = {ROOT / "core" / "terminal.py"}
    found = [place for path in files if path not in allowed for place in prints(path)]
    assert found == []
    assert len(prints(ROOT / "core" / "terminal.py")) == 2  # what is looked for is found


class Talker:
    """A model that says what is evil."""

    head = "lm"
    tokenizer = None

    def __init__(self) -> None:
        self.model = self

    def stream(self, *args, **kwargs):
        yield from EVIL


@pytest.fixture
def talking(monkeypatch) -> None:
    monkeypatch.setattr(puna, "load", lambda *args, **kwargs: Talker())


def test_generate(talking, capsys) -> None:
    said = generate.run(generate.GenerateConfig(model=Path("m"), prompt="x"))
    assert said == EVIL and capsys.readouterr().out == SHOWN  # the caller gets what was said


def test_chat(talking, capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", Mock(side_effect=[EVIL, "hello", EOFError]))
    chat.run(chat.ChatConfig(model=Path("m")))
    captured = capsys.readouterr()
    assert captured.out.count(SHOWN) == 2 and clean(captured.out) and clean(captured.err)


def test_tables(capsys) -> None:
    say_table([("name", EVIL.replace("\n", ""))], ("a", "b"), "t")
    assert clean(capsys.readouterr().out)


def test_a_tokenizers_pieces(tiny, capsys) -> None:
    tokenizer.run(tokenizer.Encode(tiny / "tokenizer.model", text="\x1b]0;own\x07"))
    tokenizer.run(tokenizer.Inspect(tiny / "tokenizer.model"))
    assert clean(capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_what_is_in_its_mistake(verb: str, capsys, monkeypatch) -> None:
    """A file's name or a column's, in the error of any verb."""

    def fail(*args) -> None:
        raise ValueError(f"{EVIL}.jsonl:1: the row has the columns '{EVIL}'")

    monkeypatch.setattr("puna.trainers.train.command.parse", fail)
    assert main([*verb.split(), "x.toml"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"puna {verb}: {SHOWN}.jsonl") and clean(captured.err)


def test_a_files_columns_and_skipped_rows(tiny, tmp_path, capsys) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b c", EVIL[:-1]: 1}] * 3
    file = tmp_path / "p\x1b[2J.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(tiny / "safety"), "--data", str(file)]
    from puna.trainers import evaluate

    assert command("puna evaluate", EvaluateConfig, evaluate.run, arguments) == 0
    captured = capsys.readouterr()
    assert "is not used" in captured.out and clean(captured.out) and clean(captured.err)
    file.write_text(json.dumps({EVIL[:-1]: 1}))
    assert command("puna evaluate", EvaluateConfig, evaluate.run, arguments) == 1
    assert clean(capsys.readouterr().err)


def test_in_a_process_of_its_own(tmp_path) -> None:
    """A name that is no UTF-8, on a terminal that knows ASCII only."""
    name = bytes(tmp_path) + b"/\xff\x1b[2J"
    arguments = [sys.executable, "-m", "puna.cli.main", "generate", "--prompt", "x", "--model"]
    done = subprocess.run(
        [*map(str.encode, arguments), name],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert rb"\udcff\x1b[2J: no such model; give" in done.stderr and b"\x1b" not in done.stderr
