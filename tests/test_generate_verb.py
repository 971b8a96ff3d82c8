"""`puna generate` over files of prompts. Run: python -m pytest tests/test_generate_verb.py -q"""

import gzip
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launch import succeed
from tiny import make_tiny

import puna
from puna.cli.main import main
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.readers import read_answered, read_dialogues
from puna.trainers.rl import chunks

STARTS = ["red cup", "moon ", "why how where", "nine\n", "", "big old new cat", "sing"]
OPTIONS = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "seed": 3}
FLAGS = [word for name, value in OPTIONS.items()
         for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def generated(tiny: Path, out: Path, *words: object) -> list[dict]:
    """The rows that the verb writes; it is to end well."""
    given = ["--model", tiny / "chat", *words, "--out", out, *FLAGS]
    assert main(["generate", *map(str, given)]) == 0
    assert not list(out.parent.glob("*.partial"))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def llama(tiny):
    return puna.load(tiny / "chat", device="cpu")


@pytest.mark.parametrize("batch", [2, 64])
def test_texts_become_what_the_library_makes_of_them(tiny, llama, tmp_path, batch):
    file = lines(tmp_path / "p.jsonl", *({"prompt": each, "id": 7} for each in STARTS))
    rows = generated(tiny, tmp_path / "o.jsonl", "--prompts", file, "--batch", batch)
    assert [row["prompt"] for row in rows] == STARTS
    assert [row["response"] for row in rows] == llama.generate(STARTS, **OPTIONS)
    kept = Tokenizer(tiny / "tokenizer.model").encode(rows[0]["prompt"] + rows[0]["response"])
    assert kept[:2] == llama.tokenizer.encode(STARTS[0])[:2]  # they join: the space is there
    assert {row["finished"] for row in rows} <= {True, False}


def test_a_text_files_lines_are_prompts_and_so_are_texts_and_packed_rows(tiny, tmp_path):
    said = [each for each in STARTS if each.strip() and "\n" not in each]
    text, packed = tmp_path / "p.txt", tmp_path / "p.jsonl.gz"
    text.write_text("\n\n".join(said) + "\n")
    packed.write_bytes(gzip.compress(b"".join(json.dumps({"text": s}).encode() + b"\n"
                                              for s in said)))  # fmt: skip
    one = generated(tiny, tmp_path / "1.jsonl", "--prompts", text)
    two = generated(tiny, tmp_path / "2.jsonl", "--prompts", packed)
    assert one == two and [row["prompt"] for row in one] == said
    both = generated(tiny, tmp_path / "3.jsonl", "--prompts", text, packed)
    assert both[: len(one)] == one and len(both) == 2 * len(one)


def test_chats_are_answered_and_are_dialogues_again(tiny, llama, tmp_path):
    mine = [{"role": "system", "content": "be red"}, {"role": "user", "content": "why"}]
    rows = [{"prompt": "red cup"}, {"messages": mine}, {"messages": mine[1:]}, {"prompt": "how"}]
    file = lines(tmp_path / "p.jsonl", *rows)
    out = tmp_path / "o.jsonl"
    found = generated(tiny, out, "--prompts", file, "--chat", "--system", "be blue")
    blue = {"role": "system", "content": "be blue"}
    chats = [[blue, {"role": "user", "content": "red cup"}], mine, [blue, mine[1]],
             [blue, {"role": "user", "content": "how"}]]  # fmt: skip
    answers = llama.generate(chats, **OPTIONS)
    assert [row["messages"][:-1] for row in found] == chats
    assert [row["messages"][-1]["content"] for row in found] == answers
    spoken = sum(bool(answer) for answer in answers)
    assert spoken and len(read_dialogues(out)[0]) == len(read_answered(out)[0]) == spoken


def test_strings_end_texts_there_too(tiny, llama, tmp_path):
    file = lines(tmp_path / "p.jsonl", *({"prompt": each} for each in STARTS))
    whole = llama.generate(STARTS, **OPTIONS)
    strings = [whole[0][2:5], whole[2][4:6]]
    rows = generated(tiny, tmp_path / "o.jsonl", "--prompts", file, "--stop", *strings)
    assert [row["response"] for row in rows] == llama.generate(STARTS, **OPTIONS, stop=strings)
    assert rows[0]["finished"] and len(rows[0]["response"]) < len(whole[0])


@pytest.fixture
def stopping(monkeypatch):
    """Ctrl-C after so many looks."""
    looks = []

    @contextmanager
    def requests(path):
        yield lambda: bool(looks) and (looks.append(looks.pop() - 1) or looks[0] < 0)

    monkeypatch.setattr(chunks, "stop_requests", requests)
    return looks


def test_an_interrupted_file_goes_on_and_another_one_is_not_touched(
    tiny, tmp_path, stopping, capsys
):
    file = lines(tmp_path / "p.jsonl", *({"prompt": each} for each in STARTS))
    whole = generated(tiny, tmp_path / "whole.jsonl", "--prompts", file, "--batch", 2)
    out = tmp_path / "o.jsonl"
    command = ["generate", "--model", tiny / "chat", "--prompts", file, "--batch", 2, "--out", out]
    words = [*map(str, command), *FLAGS]
    stopping.append(1)
    assert main(words) == 1
    assert "stopped after 4 prompts; the same command continues" in capsys.readouterr().err
    assert not out.exists()
    texts = tmp_path / "o.jsonl.partial" / "texts.jsonl"
    before = texts.read_bytes()
    assert main([*words, "--top-k", "3"]) == 1
    assert "top_k 3 where it was 0" in capsys.readouterr().err and texts.read_bytes() == before
    texts.write_bytes(before + b'{"torn')  # as a kill leaves it
    stopping.clear()
    assert main(words) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == whole
    assert not texts.parent.exists()
    held = out.read_bytes()
    capsys.readouterr()
    assert main(words) == 1 and out.read_bytes() == held
    assert "o.jsonl is there already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("halves"), n_kv_heads=2)


def on_two(words: list[str]) -> int:
    torch.set_num_threads(1)
    return main(words)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_a_model_write_what_one_writes(halves, tmp_path, ranks):
    """Strings that end a text, too; with 4 ranks two pairs take the prompts in turn."""
    model = halves / "chat"
    file = lines(tmp_path / "p.jsonl", *({"prompt": each} for each in STARTS))
    words = ["--model", model, "--prompts", file, "--batch", 3, "--stop", "e", *FLAGS]
    words = [str(word) for word in ("generate", *words, "--out")]
    assert main([*words, str(tmp_path / "one.jsonl")]) == 0
    together = [*words, str(tmp_path / "both.jsonl"), "--tp", "2"]
    succeed(ranks, on_two, together, folder=tmp_path)
    whole = (tmp_path / "one.jsonl").read_text()
    assert (tmp_path / "both.jsonl").read_text() == whole
    responses = [json.loads(line)["response"] for line in whole.splitlines()]
    assert len(responses) == len(STARTS) and not any("e" in each for each in responses)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "name either a --prompt or files of --prompts"),
        ("--prompt x --prompts {0} --out {1}", "name either a --prompt or files of --prompts"),
        ("--prompts {0}", "--prompts and --out, the file of what they become, go together"),
        ("--prompt x --out {1}", "--prompts and --out, the file of what they become, go together"),
        ("--prompts {0} --out {1} --system x", "--system belongs to the chat format"),
        ("--prompts {0} --out {1} --tp 2", "tp is 2 and there is 1 rank"),
        ("--prompts {0}x --out {1}", "p.jsonlx: no such file"),
        ("--prompts {2} --out {1}", "long.jsonl:1"),
        ("--prompt x --stop=", "stop holds ''; it must be a text that is not empty"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(tiny, tmp_path, words, said, capsys):
    file = lines(tmp_path / "p.jsonl", {"prompt": "red"})
    long = lines(tmp_path / "long.jsonl", {"prompt": "red " * 400})
    given = words.format(file, tmp_path / "o.jsonl", long).split()
    assert main(["generate", "--model", str(tiny / "chat"), *given]) == 1
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.jsonl", "p.jsonl"]
