"""A first start that is refused leaves nothing that was not there before, whatever the verb.
Run: python -m pytest tests/test_refused.py -q"""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_hands import OUT, WORDS, ended, hints, models, words_of

from puna.cli.main import VERBS, main

MADE = {"out", "output", "target", "annotations", "cache"}  # options that name what is made
LATER = {"judgements", "kept"}  # what people write may come when all else is done
MAKING = [verb for verb in VERBS if hints(verb).keys() & MADE and not verb.startswith("bench")]
NEW = {  # words that make something, where those of test_hands do not or do it somewhere else
    "evaluate": WORDS["evaluate"] + " --out {1}/new/report.json",
    "score": WORDS["score"] + " --out {1}/new/scored.jsonl",
    "generate": "--model {0}/chat --chat --prompts {0}/prompts.jsonl --max-new-tokens 4 "
    "--out {1}/new/texts.jsonl",
    "tokenizer encode": "--tokenizer {0}/tokenizer.model --data {0}/text.jsonl --output {1}/new",
    "tokenizer train": WORDS["tokenizer train"].replace("{1}", "{1}/new"),
    "convert": WORDS["convert"].replace("{1}", "{1}/new"),
    **{verb: words.replace("{1}", "{1}/new") for verb, words in WORDS.items() if "c.db" in words},
}


def line(verb: str, tiny: Path, work: Path) -> list[str]:
    """One whose first start makes a folder."""
    if verb in NEW:
        return [*verb.split(), *NEW[verb].format(tiny, work).split()]
    return [each.replace(f"{work}/run", f"{work}/new/run") for each in words_of(verb, tiny, work)]


def mistakes(verb: str, tiny: Path, zeros: Path) -> list[tuple[str, str]]:
    """(option, value): files that are not there and damaged ones; models of another kind, too."""
    named = [name for name, hint in hints(verb).items() if "Path" in str(hint)]
    read = [name for name in named if name not in MADE | LATER]
    found = [(name, str(zeros.with_name("absent"))) for name in read]
    found += [(name, str(zeros)) for name in read if "guidelines" not in name]  # any text is one
    talking = {"model", "models", "policy", "student", "source"}
    for name in models(verb):
        found.append((name, str(tiny / ("safety" if name in talking else "lm"))))
        found.append((name, str(zeros.with_name("lm" if name in talking else "safety"))))
    if "sampling_tp" in hints(verb):
        found.append(("sampling_tp", "3"))
    if "max_new_tokens" in hints(verb):
        found.append(("max_new_tokens", "1000000"))
    if "vocab_size" in hints(verb):
        found.append(("vocab_size", "30000"))
    return found


def with_option(words: list[str], name: str, value: str) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if option not in words:
        return [*words, option, value]
    place = words.index(option) + 1
    return [*words[:place], value, *words[place + 1 :]]


@pytest.mark.parametrize("verb", MAKING)
def test_nothing_is_left(verb, tiny, tmp_path):
    work, zeros = tmp_path / "work", tmp_path / "zeros.jsonl"
    zeros.write_bytes(bytes(4096))
    for model in ("lm", "safety"):  # a weight is missing
        (weights,) = shutil.copytree(tiny / model, tmp_path / model).glob("*.safetensors")
        save_file(dict([*load_file(weights).items()][:-1]), weights)
    for name, value in mistakes(verb, tiny, zeros):
        work.mkdir()
        words = with_option(line(verb, tiny, work), name, value)
        before = {*work.rglob("*")}
        status, _, said = ended(lambda words=words: main(words))
        left = sorted({*work.rglob("*")} - before)
        assert status == 0 or not left, (name, value, said[-300:], left)
        shutil.rmtree(work)


@pytest.mark.parametrize("verb", [verb for verb in sorted(OUT) if "device" in hints(verb)])
def test_what_was_there_stays(verb, tiny, tmp_path):
    """Hidden and empty things, which do not make a folder somebody else's."""
    run = tmp_path / "run"
    (run / "checkpoints" / "mine").mkdir(parents=True)
    (run / ".mine").write_text("mine")
    before = {*run.rglob("*")}
    model = models(verb)[0]
    words = with_option(words_of(verb, tiny, tmp_path), model, str(tmp_path / "absent"))
    assert ended(lambda: main(words))[0] == 1
    assert {*run.rglob("*")} == before and (run / ".mine").read_text() == "mine"


def test_what_was_begun_stays(tiny, tmp_path):
    """A second start that is refused, of a run that has done something."""
    words = words_of("sft", tiny, tmp_path)
    assert ended(lambda: main(words))[0] == 0
    before = {*(tmp_path / "run").rglob("*")}
    assert ended(lambda: main([*words, "--lr", "0.5"]))[0] == 1
    assert {*(tmp_path / "run").rglob("*")} == before
