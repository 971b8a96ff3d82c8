"""What hands do, over all verbs: a device that is not there, variables left behind, numbers of
5,000 digits, a run's folder for its model, a reader that goes away, a terminal that is closed.
Run: python -m pytest tests/test_hands.py -q"""

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from campaign.options import RUNS, config_of

from puna.cli.main import VERBS, main
from puna.core import ops, ranks
from puna.trainers.train.precision import products_of

WORDS = RUNS | {
    "demo": "",
    "demo real": "--model {0}/chat --data {1}/helpful.jsonl {1}/harmless.jsonl --scale 0.02",
    "reproduce": "",
    "annotate": "--models {0}/chat {0}/lm --prompts {0}/prompts.jsonl --out {1}/c.db "
    "--max-new-tokens 8",
    "annotate export": "--annotations {1}/c.db --out {1}/x.jsonl",
    "annotate import": "--annotations {1}/c.db --data {0}/preferences.jsonl",
    "data": "{0}/dialogues.jsonl",
    "plan": "demo/sft.toml --gpu a100-80 --gpus 1",
    **dict.fromkeys((verb for verb in VERBS if verb.startswith("bench")), ""),
    "bench weights": "--model {0}/chat --text {0}/text.jsonl",
    "bench report": "{1}",
    "bench compare": "{1}/a.json {1}/b.json",
}
OUT = {"pretrain", "sft", "reward", "sample", "rejection", "ppo", "gatt", "distill", "rlhf",
       "evaluate chat", "demo", "demo real", "reproduce"}  # fmt: skip
MODELS = {"model", "models", "policy", "student", "source", "against", "judge", "second_judge",
          "helpfulness", "safety", "helpfulness_reward", "safety_reward"}  # fmt: skip
DATA = ("data", "prompts", "dialogues", "file")
READING = {  # verbs whose words name no file of rows, or the only one
    "data": "data {1}",
    "generate": "generate --model {0}/chat --prompts {1} --out {1}.o",
    "tokenizer encode": "tokenizer encode --tokenizer {0}/tokenizer.model --data {1} --output {1}o",
    "tokenizer inspect": "tokenizer inspect --tokenizer {0}/tokenizer.model --data {1}",
}
HUGE = "9" * 5000
SECONDS = 60


def ended(work: Callable[[], object], reader: bool = True) -> tuple[int | None, str, str]:
    """(status, stdout, stderr) of work in a process of its own, None where it had to be ended;
    without a `reader` nobody reads its stdout."""
    read, write = os.pipe()
    if not reader:
        os.close(read)
    errors = multiprocessing.get_context("fork").SimpleQueue()

    def child() -> None:
        torch.set_num_threads(1)  # the threads of before are not here, and would be waited for
        said = io.StringIO()
        sys.stdout, sys.stderr, sys.stdin = os.fdopen(write, "w"), said, io.StringIO("")
        sys.argv = ["puna"]
        try:
            status = work()
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
        errors.put((status, said.getvalue()))
        sys.stdout.flush()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(write)
    shown = ""
    if reader:
        with os.fdopen(read) as file:
            shown = file.read()
    process.join(SECONDS)
    hung = process.is_alive()
    process.kill()
    process.join()
    if hung or errors.empty():
        return None, shown, ""
    status, said = errors.get()
    return status, shown, said


def words_of(verb: str, tiny: Path, work: Path, *more: str) -> list[str]:
    if verb == "demo real":  # it knows its files by their names
        for kind in ("helpful", "harmless"):
            shutil.copy(tiny / "preferences.jsonl", work / f"{kind}.jsonl")
    words = WORDS[verb].format(tiny, work).split()
    return [*verb.split(), *words, *(["--out", f"{work}/run"] if verb in OUT else []), *more]


def hints(verb: str) -> dict[str, object]:
    return typing.get_type_hints(config_of(verb))


def is_one_sentence(status: object, shown: str, said: str) -> None:
    assert status == 1 and said.startswith("puna ") and said.count("\n") == 1, (status, said)
    assert "Traceback" not in said and "mistake in Puna" not in said and len(said) < 600


def test_every_verb_is_here():
    assert WORDS.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "dtype" in hints(verb)])
def test_a_dtype_is_what_the_verb_itself_computes_in(verb, monkeypatch):
    """Or nothing's, where it has no device and leaves computing to its stages."""
    monkeypatch.setattr(ops, "multiplies_bf16", lambda: True)
    device = {"device": "cpu"} if "device" in hints(verb) else {}
    assert products_of(SimpleNamespace(dtype="bf16", **device)) == ("bf16" if device else "fp32")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "device" in hints(verb)])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(verb, device, tiny, tmp_path):
    if getattr(torch, device if device == "cuda" else "mps").is_available():
        pytest.skip("it is there")
    words = [each for each in words_of(verb, tiny, tmp_path) if each not in ("--device", "cpu")]
    status, shown, said = ended(lambda: main([*words, "--device", device]))
    is_one_sentence(status, shown, said)
    assert device in said or "use --device cpu" in said


@pytest.mark.parametrize("verb", VERBS)
def test_world_size_is_left_behind(verb, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    status, shown, said = ended(lambda: main(words_of(verb, tiny, tmp_path)))
    is_one_sentence(status, shown, said)
    assert "torchrun, or unset WORLD_SIZE" in said


def test_all_of_torchruns_variables_are_left_behind(tiny, tmp_path, monkeypatch):
    """Nobody else comes: it is said whom it waits for."""
    said = []

    def meet(backend: str) -> None:
        while not said:
            time.sleep(0.01)
        raise KeyboardInterrupt

    names = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "here"}
    for name, value in (names | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "LATE_SECONDS", 0.01)
    monkeypatch.setattr(ranks, "say", lambda *words, **where: said.append((words, where)))
    monkeypatch.setattr(ranks.dist, "init_process_group", meet)
    assert main(words_of("generate", tiny, tmp_path)) == 130
    ((words,), where) = said[0]
    assert "waiting for the 2 processes of WORLD_SIZE to meet at here:1; " in words
    assert "unset WORLD_SIZE" in words and where == {"error": True}


def numbers(verb: str) -> list[str]:
    """One option that is a whole number, one that is a number, where there are such."""
    kinds = (int, float)
    ours = [[name for name, hint in hints(verb).items() if hint is kind] for kind in kinds]
    return [names[-1] for names in ours if names]  # the last are the verb's own


@pytest.mark.parametrize("verb", [verb for verb in VERBS if numbers(verb)])
def test_a_number_of_5000_digits_in_an_option(verb, tiny, tmp_path):
    for name in numbers(verb):
        option = f"--{name.replace('_', '-')}"
        words = words_of(verb, tiny, tmp_path, option, HUGE)
        status, _, said = ended(lambda words=words: main(words))
        assert status in (1, 2) and "Traceback" not in said, (name, status, said[-600:])
        assert option in said or name in said, (name, said[-600:])
        assert len(said) < 3000, (name, len(said))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if hints(verb).keys() & set(DATA)])
def test_a_number_of_5000_digits_in_a_row(verb, tiny, tmp_path):
    file = tmp_path / "helpful-rows.jsonl"
    row = {"prompt": "red", "response": "blue", "text": "red", "chosen": "red", "rejected": "blue"}
    file.write_text(json.dumps(row)[:-1] + f', "n": {HUGE}}}\n')
    words = words_of(verb, tiny, tmp_path)
    if verb in READING:
        words = READING[verb].format(tiny, file).split()
    else:
        name = next(f"--{name}" for name in DATA if f"--{name}" in words)
        words[words.index(name) + 1] = str(file)
    status, shown, said = ended(lambda: main(words))
    is_one_sentence(status, shown, said)
    assert "rows.jsonl:1: a number has more than 4,300 digits" in said, said


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft-run"
    shutil.copytree(tiny / "chat", folder / "model")
    (folder / "config.toml").write_text("lr = 1.0\n")
    return folder


def models(verb: str) -> list[str]:
    found = hints(verb)
    return sorted(name for name in MODELS & found.keys() if "Path" in str(found[name]))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if models(verb)])
def test_a_runs_folder_for_its_model(verb, tiny, tmp_path, run_folder):
    for name in models(verb):
        words = words_of(verb, tiny, tmp_path)
        option = f"--{name.replace('_', '-')}"
        if option in words:
            words[words.index(option) + 1] = str(run_folder)
        else:
            words += [option, str(run_folder)]
        status, shown, said = ended(lambda words=words: main(words))
        if status == 0:  # the right thing
            continue
        is_one_sentence(status, shown, said)
        assert f"its model is {run_folder}/model" in said, (name, said)


@pytest.mark.parametrize("verb", [*VERBS, ""])
def test_a_reader_that_goes_away(verb, tiny, tmp_path):
    """`puna VERB --help | head -0`"""
    status, _, said = ended(lambda: main([*verb.split(), "--help"]), reader=False)
    assert (status, said) == (0, "")


SHORT = ("tokenizer encode", "tokenizer inspect", "data", "plan", "score", "evaluate", "generate",
         "chat", "convert")  # fmt: skip


@pytest.mark.parametrize("verb", SHORT)
def test_a_reader_that_goes_away_from_what_is_said(verb, tiny, tmp_path):
    status, _, said = ended(lambda: main(words_of(verb, tiny, tmp_path)), reader=False)
    assert (status, said) == (0, "")


@pytest.mark.parametrize("verb", [*sorted(OUT - {"demo", "reproduce", "rlhf"}), "generate"])
def test_a_terminal_that_is_closed_leaves_what_can_go_on(verb, tiny, tmp_path, monkeypatch):
    """SIGHUP as soon as it is listened for. (Of rlhf its stages listen.)"""
    words = words_of(verb, tiny, tmp_path)
    if verb == "generate":
        words = ["generate", "--model", f"{tiny}/chat", "--chat", "--prompts",
                 f"{tiny}/prompts.jsonl", "--out", f"{tmp_path}/run"]  # fmt: skip
    from puna.trainers.train import interrupts

    listening = signal.signal

    def closed(number, handler):
        before = listening(number, handler)
        if number == signal.SIGHUP and callable(handler):
            os.kill(os.getpid(), signal.SIGHUP)
        return before

    fake = SimpleNamespace(**{**vars(signal), "signal": closed})
    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "signal", fake)
        status, shown, said = ended(lambda: main(words))
    assert status == 1 and "the same command continues" in said, (status, said)
    status, shown, said = ended(lambda: main(words))
    assert status == 0, said


@pytest.mark.parametrize(
    ("words", "read", "name"),
    [
        ("score --model {0}/helpfulness --data {1}/read", "dialogues.jsonl", "out"),
        ("tokenizer train --data {1}/read --vocab-size 300", "text.jsonl", "output"),
        (
            "tokenizer encode --tokenizer {1}/read --data {0}/text.jsonl",
            "tokenizer.model",
            "output",
        ),
        ("annotate export --annotations {1}/read", "prompts.jsonl", "out"),
    ],
)
def test_what_is_read_is_not_replaced(
    words: str, read: str, name: str, tiny: Path, tmp_path: Path, capsys
) -> None:
    """Under its own name, or another one of the same file."""
    shutil.copy(tiny / read, tmp_path / "read")
    (tmp_path / "linked").symlink_to(tmp_path / "read")
    before = (tmp_path / "read").read_bytes()
    for written in ("read", "linked"):
        argv = words.format(tiny, tmp_path).split()
        assert main([*argv, f"--{name}", str(tmp_path / written)]) == 1
        assert f"would be replaced; give another {name}" in capsys.readouterr().err
    assert (tmp_path / "read").read_bytes() == before
