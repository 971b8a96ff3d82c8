"""README's "Train on your own data", command for command as it is printed there, one after the
other in one folder. Files have README's names, and are small; the only other differences are the
values below, taken in place of README's or beside them, so that it ends within a minute, and how
wide the model of README's size is. How long an answer may be, and the context that it must fit, are
README's, or the defaults. And every `puna ...` line of README and docs/ is a command.
Run: python -m pytest tests/test_walk_through.py -q"""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import uvicorn
from annotate_pages import free_port
from test_readme import README

from puna.cli.main import VERBS, main, with_names
from puna.core.config import SIZES
from puna.trainers.train.arguments import several_valued
from puna.trainers.train.config import parse

FILES = {  # README's name -> the tiny one's
    "dialogues.jsonl": "dialogues.jsonl",
    "helpful.jsonl": "preferences.jsonl",
    "safe.jsonl": "preferences.jsonl",
    "instructed.jsonl": "ghosts.jsonl",
}
QUICK = {"--batch": "4", "--device": "cpu"}
INSTEAD = {  # verb -> options in place of README's; a model that was hardly trained never stops
    "tokenizer train": {"--vocab-size": "330"},
    "pretrain": QUICK | {"--steps": "4"},
    "sft": QUICK | {"--epochs": "60", "--lr": "3e-3"},
    "reward": QUICK,
    "rejection": QUICK | {"--samples": "2", "--epochs": "1"},
    "ppo": QUICK | {"--iterations": "2", "--minibatch": "4"},
    "gatt": QUICK,
    "distill": QUICK,
    "chat": {"--device": "cpu"},
    "generate": {"--device": "cpu"},
    "annotate": {"--device": "cpu", "--port": ""},
    "annotate export": {},
}


def commands() -> list[list[str]]:
    """The `puna ...` lines of the section's blocks, as lists of words."""
    section = README.read_text(encoding="utf-8").split("\n## Train on your own data\n")[1]
    blocks = re.findall(r"^```\n(.*?)^```$", section.split("\n## ")[0], re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("puna ")]


def documented() -> list[tuple[str, list[str]]]:
    """(page, words) of every `puna ...` line in a block of README or a page of docs/."""
    found = []
    for page in [README, *sorted(README.parent.glob("docs/*.md"))]:
        blocks = re.findall(r"^```\w*\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
        whole = re.sub(r"\$\w+", "0.5", "".join(blocks).replace("\\\n", " "))  # a shell's variables
        for line in whole.splitlines():
            if named := re.match(r"\s*(?:\.venv/bin/)?puna (.*)", line):
                found.append((page.name, shlex.split(named[1], comments=True)))
    return found


@pytest.mark.parametrize(("page", "words"), documented())
def test_every_documented_command_is_one(page, words, tmp_path, monkeypatch):
    """Its verb is there, and every option with such a value; nothing is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('model = "m"\nout = "o"\nprompts = ["p"]\n')
    verb = max((each for each in VERBS if each.split() == words[: len(each.split())]), key=len)
    module = importlib.import_module(VERBS[verb].module)
    config = getattr(module, VERBS[verb].config)
    rest = words[len(verb.split()) :]
    assert parse(config, with_names(VERBS[verb], rest, several_valued(config)), verb) is not None


def verb_of(words: list[str]) -> str:
    return " ".join(words[: next(i for i, word in enumerate(words) if word[:2] == "--")])


def quick(words: list[str]) -> list[str]:
    """The same command with the values of `INSTEAD`."""
    words = list(words)
    for flag, value in INSTEAD[verb_of(words)].items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


def test_what_is_asked_of_answers_stays_as_it_is_printed():
    names = {flag for options in INSTEAD.values() for flag in options}
    assert not names & {"--size", "--context", "--max-new-tokens", "--row-tokens"}
    assert INSTEAD.keys() == {verb_of(words) for words in commands()}


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """What README's commands find; the current folder is theirs."""
    for name, source in FILES.items():
        shutil.copy(tiny / source, tmp_path / name)
    texts = [json.loads(line)["text"] for line in (tiny / "text.jsonl").open()]
    (tmp_path / "corpus.txt").write_text("\n".join(texts * 3))
    prompts = [json.loads(line) for line in (tiny / "prompts.jsonl").open()]
    tagged = [row | {"safety": number % 4 > 0} for number, row in enumerate(prompts)]
    # of twelve some are answered better under a pre-prompt, whatever the reward model is worth
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    (tmp_path / "questions.txt").write_text("why red cup\nhow old\n")
    monkeypatch.chdir(tmp_path)
    narrow = {each: replace(SIZES["mini"], context=SIZES[each].context) for each in SIZES}
    for each, shape in narrow.items():
        monkeypatch.setitem(SIZES, each, shape)
    monkeypatch.setitem(INSTEAD["annotate"], "--port", str(free_port()))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)  # nobody comes
    typed = iter(["why red cup"])

    def read(prompt: str = "") -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    return tmp_path


def test_every_command_does_what_it_says(folder, capsys):
    for words in commands():
        if verb_of(words) == "annotate export":  # there must be something that people have said
            given = ["--annotations", "comparisons.db", "--data", "helpful.jsonl"]
            assert main(["annotate", "import", *given]) == 0
        status = main(quick(words))
        said = capsys.readouterr()
        assert status == 0, f"{' '.join(words)}: {said.err}"
        for flag in {"--out", "--output"} & {*words}:
            assert (folder / words[words.index(flag) + 1]).exists()
    rows = (folder / "answers.jsonl").read_text().splitlines()
    assert len(rows) == 2 and (folder / "runs" / "safer" / "model").is_dir()
