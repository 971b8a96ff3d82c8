"""How commands end: one sentence, the right status, nothing lost. Run: pytest tests/test_command.py

What happens on two ranks is in tests/test_ranks.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from puna.core.errors import UserError
from puna.trainers.train.command import command, sentence
from puna.trainers.train.loop import TrainConfig

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "WORLD_SIZE"},
    "OMP_NUM_THREADS": "1",
}


def sft(tiny: Path, out: Path, *options: object) -> list[str]:
    given = ["--model", tiny / "lm", "--data", tiny / "dialogues.jsonl", "--device", "cpu"]
    return [sys.executable, "-m", "puna.trainers.sft", *map(str, [*given, "--out", out, *options])]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a sentence"), "a sentence"),
        (OSError("the disk is full"), "the disk is full"),
        (UserError("the loss is nan"), "the loss is nan"),
        (MemoryError(), "the memory is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "the memory is full (CUDA out of"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(error, said, capsys):
    def work(config):
        raise error

    assert command("puna test", TrainConfig, work, ["--out", "x"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"puna test: {said}") and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError(), RuntimeError("shape"), TypeError()]
)
def test_a_mistake_of_ours_shows_where_and_asks_for_a_report(error):
    try:
        raise error
    except type(error) as caught:
        shown = sentence(caught)
    assert shown.startswith("this is a mistake in Puna, not in what you did; please report")
    assert "test_command.py" in shown and type(error).__name__ in shown


@pytest.mark.parametrize("way", ["-m", "cli"])
def test_ctrl_c_in_the_first_seconds_is_one_word(tiny, tmp_path, way):
    arguments = sft(tiny, tmp_path / "run")
    if way == "cli":
        arguments[1:3] = ["-m", "puna.cli.main", "sft"]
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)  # Python itself is up, and PyTorch is not yet imported
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2' but RANK is not set: start"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x' but RANK is not set"),
    ],
)
def test_variables_left_over_from_torchrun_are_named(tiny, tmp_path, variables, said):
    result = subprocess.run(
        sft(tiny, tmp_path / "run"), capture_output=True, text=True, env=ENVIRONMENT | variables
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_a_closed_terminal_leaves_a_checkpoint_and_a_closed_pipe_stops_nothing(tiny, tmp_path):
    out = tmp_path / "run"
    long = sft(tiny, out, "--epochs", 400, "--batch", 4, "--save-every", 100_000)
    read, write = os.pipe()
    process = subprocess.Popen(long, stdout=write, stderr=write, env=ENVIRONMENT)
    os.close(read)  # `| head`
    os.close(write)
    began = time.monotonic()
    while not (out / "metrics.jsonl").exists() and time.monotonic() - began < 60:
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 1
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) > 1
    (saved,) = (out / "checkpoints").iterdir()
    assert saved.name == f"step-{rows[-1]['step']:06d}"


def test_two_processes_on_one_folder_are_one_too_many(tiny, tmp_path):
    out = tmp_path / "run"
    first = subprocess.Popen(
        sft(tiny, out, "--epochs", 400, "--batch", 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    try:
        began = time.monotonic()
        while not (out / "metrics.jsonl").exists() and time.monotonic() - began < 60:
            time.sleep(0.05)
        second = subprocess.run(
            sft(tiny, out, "--epochs", 400, "--batch", 4),
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        assert second.returncode == 1 and second.stderr.count("\n") == 1
        assert f"is being written to by process {first.pid} on" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()  # -9: the lock goes with it
        first.wait()
    again = subprocess.run(
        sft(tiny, out, "--epochs", 401, "--batch", 4),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert "epochs 401 where it was 400" in again.stderr  # it got as far as that
