"""Two processes, one of which is not like the other.

`torchrun tests/test_ranks.py OUT INPUTS CASE` is a worker where torchrun itself matters.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import on_ranks

from puna.trainers import sft
from puna.trainers.train.command import command

SLOW = pytest.mark.slow
SECONDS = 100  # a rank that hangs waits for half an hour; a busy machine takes half a minute


LAYOUTS = {"together": "parallel.tp", "copies": "parallel.replicate"}


def arguments(inputs: Path, out: Path, case: str, rank: int) -> list[str]:
    given = {
        "model": inputs / "lm", "data": inputs / "dialogues.jsonl", "out": out, "batch": 4,
        "device": "cpu", "epochs": 3, "save-every": 2, "lr": 1e-3, "eval-share": 0.3,
    }  # fmt: skip
    layout, _, what = case.partition(", ")
    if layout in LAYOUTS:
        given[LAYOUTS[layout]], case = 2, what
    if case == "wrong lr":
        given["lr"] = -1
    if case == "long":
        given["epochs"] = 4000
    if case == "one stands still":
        given["timeout"] = 5
    if rank == 1:
        if case == "another layout":
            given["parallel.tp"] = 2
        if case == "another lr":
            given["lr"] = 2e-3
        if case == "another seed":
            given["seed"] = 1
        if case == "other rows":
            given["data"] = inputs / "shuffled.jsonl"
        if case == "no checkpoint":
            given["out"] = out.with_name("elsewhere")
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def worker(out: Path, inputs: Path, case: str) -> int:
    rank = int(os.environ["RANK"])

    def work(config: sft.SFTConfig) -> None:
        if case == "long":
            print(f"worker {os.getpid()}", flush=True)
        if rank == 1 and case == "one stands still":
            out.with_name("stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == 1 and case == "one fails":
            raise ValueError("a file of rank 1 is not there")
        if rank == 1 and case == "one is wrong":
            raise KeyError("rank 1")
        sft.run(config)

    return command("puna sft", sft.SFTConfig, work, arguments(inputs, out, case, rank))


def torchrun(out: Path, inputs: Path, case: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*command, __file__, str(out), str(inputs), case]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def inputs(tiny, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "lm").symlink_to(tiny / "lm")
    (folder / "dialogues.jsonl").symlink_to(tiny / "dialogues.jsonl")
    rows = (tiny / "dialogues.jsonl").read_text().splitlines(keepends=True)
    (folder / "shuffled.jsonl").write_text("".join(rows[::-1]))
    return folder


def said(text: str) -> list[str]:
    """What the workers said on stderr."""
    return [line for line in text.splitlines() if "puna sft" in line or "Traceback" in line[:9]]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("wrong lr", "puna sft: lr is -1.0; it must be above 0"),
        ("another lr", "rank 1 has another option lr than rank 0 (0.002, not 0.001); start every"),
        ("another seed", "rank 1 has another option seed than rank 0 (1, not 0)"),
        ("another layout", "rank 1 has another option parallel.tp than rank 0 (2, not 1)"),
        ("together, another seed", "rank 1 has another option seed than rank 0 (1, not 0)"),
        ("other rows", "rank 1 has another contents of data than rank 0"),
        *[
            pytest.param(f"{layout}, {what}", f"rank 1 has another {said}", marks=SLOW)
            for layout in LAYOUTS
            for what, said in (
                ("another lr", "option lr than rank 0 (0.002, not 0.001)"),
                ("another seed", "option seed than rank 0 (1, not 0)"),
                ("other rows", "contents of data than rank 0"),
            )
            if (layout, what) != ("together", "another seed")
        ],
        ("one fails", "puna sft: a file of rank 1 is not there"),
        ("one is wrong", "this is a mistake in Puna"),
    ],
)
def test_one_rank_that_differs_ends_them_all_with_one_sentence(tmp_path, inputs, case, sentence):
    run = tmp_path / "run"
    ended = on_ranks(2, worker, run, inputs, case, folder=tmp_path, seconds=SECONDS)
    assert any(ended.codes) and -signal.SIGKILL not in ended.codes  # nobody hung until the end
    found = [line for line in said(ended.stderr) if line.startswith("puna sft")]
    assert len(found) == 1 and sentence in found[0]
    assert not (run / "model").exists()


def test_a_rank_that_stands_still_is_waited_for_as_long_as_asked(tmp_path, inputs):
    process = subprocess.Popen(
        torchrun(tmp_path / "run", inputs, "one stands still"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    began = time.monotonic()
    try:
        found = next(line for line in process.stderr if line.startswith("puna sft"))
    finally:
        os.kill(int((tmp_path / "stopped").read_text()), signal.SIGKILL)
        process.kill()
        process.wait()
    assert "rank 1 did not come to where the others waited" in found
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(
    "layout",
    ["", pytest.param("together, ", marks=SLOW), pytest.param("copies, ", marks=SLOW)],
)
def test_a_checkpoint_that_one_rank_does_not_see_is_refused(tmp_path, inputs, layout):
    out = tmp_path / "run"
    alone = arguments(inputs, out, "one process", 0)
    assert command("puna sft", sft.SFTConfig, sft.run, alone) == 0
    (out / "finished.json").unlink()
    case = f"{layout}no checkpoint"
    ended = on_ranks(2, worker, out, inputs, case, folder=tmp_path, seconds=SECONDS)
    found = [line for line in said(ended.stderr) if line.startswith("puna sft")]
    assert len(found) == 1 and "rank 1 has another checkpoint newest than rank 0 (none," in found[0]


def test_the_held_out_loss_is_that_of_one_process(tmp_path, inputs):
    one = arguments(inputs, tmp_path / "one", "", 0)
    assert command("puna sft", sft.SFTConfig, sft.run, one) == 0
    subprocess.run(
        torchrun(tmp_path / "two", inputs, ""), check=True, env=ENVIRONMENT, timeout=SECONDS
    )
    rows = [
        [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for ours, theirs in zip(*rows, strict=True):
        for name in ("loss", "eval_loss"):
            assert name not in theirs or ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_workers_whose_torchrun_is_killed_stop_with_a_checkpoint(tmp_path, inputs):
    out = tmp_path / "run"
    process = subprocess.Popen(
        torchrun(out, inputs, "long"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    workers: set[int] = set()
    began = time.monotonic()
    try:
        for line in process.stdout:
            if line.startswith("worker "):
                workers.add(int(line.split()[1]))
            if len(workers) == 2:
                break
        while not (out / "metrics.jsonl").exists() and time.monotonic() - began < SECONDS:
            time.sleep(0.1)
        process.kill()
        process.wait()
        other = [sys.executable, "-m", "puna.trainers.sft", *arguments(inputs, out, "long", 0)]
        second = subprocess.run(
            [*other, "--epochs", "5"],
            capture_output=True, text=True, env=ENVIRONMENT, timeout=SECONDS,
        )  # fmt: skip
        holders = [f"being written to by process {worker}" for worker in workers]
        assert second.returncode == 1 and any(
            words in second.stderr for words in (*holders, "epochs 5 where it was 4000")
        )
        while any(alive(worker) for worker in workers) and time.monotonic() - began < SECONDS:
            time.sleep(0.1)
        assert not any(alive(worker) for worker in workers)
        assert list((out / "checkpoints").glob("step-*"))
    finally:
        process.kill()
        for each in workers:
            if alive(each):
                os.kill(each, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(worker(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
