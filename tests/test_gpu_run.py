"""`make gpu` without a GPU: its parts, their times, what a cut leaves, and a dry run.

Run: python -m pytest tests/test_gpu_run.py -q
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puna.benchmarks.gpu import run as program
from puna.benchmarks.gpu.parts import TESTS, Part, parts

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("generation", "first-calls", "bench-losses", "bench-recompute", "memcheck", "profile")


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call with parts; returns the status and the summary."""

    def call(*given, **options):
        monkeypatch.setattr(program, "parts", lambda dry, layers: list(given))
        status = program.run(tmp_path / "out", dry_run=True, **options)
        return status, json.loads((tmp_path / "out" / "summary.json").read_text())

    return call


def states(summary):
    return {record["name"]: record["status"] for record in summary["parts"]}


GOOD, BAD = Part("good", python("print('well')"), 60), Part("bad", python("1 / 0"), 60)


def test_a_part_that_fails_takes_nothing_with_it(run, tmp_path, capsys):
    slow = Part("slow", python("import time; print('begun', flush=True); time.sleep(99)"), 2)
    absent = Part("absent", ["no-such-tool"], 60, tool="no-such-tool")
    status, summary = run(BAD, slow, absent, GOOD)
    assert status == 1
    assert states(summary) == {
        "bad": "failed", "slow": "ran out of time", "absent": "left out", "good": "passed",
    }  # fmt: skip
    assert "ZeroDivisionError" in (tmp_path / "out" / "bad.log").read_text()
    assert (tmp_path / "out" / "slow.log").read_text().startswith("begun\n")
    said = capsys.readouterr().out
    assert "absent: left out, no-such-tool is not installed" in said
    assert "not passed: bad, slow" in said
    assert summary["parts"][0]["command"] == "python -c 1 / 0"
    assert {bar["measured"] for bar in summary["bars"]} == {"not measured"}


def test_what_has_passed_is_not_run_again_and_what_failed_comes_last(run, tmp_path):
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    named = [
        Part(name, python(f"{note}({name!r}); {'1 / 0' * (name == 'b')}"), 60) for name in "abc"
    ]
    run(*named[:2])
    status, summary = run(*named)
    assert status == 1 and (tmp_path / "order").read_text() == "abcb"
    run(*named, only=("a",))
    assert (tmp_path / "order").read_text() == "abcba"
    assert states(summary) == {"a": "passed", "b": "failed", "c": "passed"}


def test_the_whole_call_has_an_end_and_the_next_one_goes_on(run, monkeypatch):
    monkeypatch.setattr(program, "GRACE", 1.0)
    monkeypatch.setattr(program, "LEAST", 1.0)
    slow = Part("slow", python("import time; time.sleep(99)"), 60)
    status, summary = run(slow, GOOD, seconds=4)
    assert status == 1 and states(summary) == {"slow": "stopped"}
    status, summary = run(slow._replace(command=GOOD.command), GOOD)
    assert status == 0 and set(states(summary).values()) == {"passed"}


def test_a_part_may_keep_what_it_has_and_its_workers_end(run, tmp_path):
    """Ctrl-C reaches it first; then whatever is left of its group is ended."""
    code = f"""
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
try:
    time.sleep(99)
except KeyboardInterrupt:
    print("kept")
"""
    _, summary = run(Part("workers", python(code), 3))
    assert states(summary) == {"workers": "ran out of time"}
    assert (tmp_path / "out" / "workers.log").read_text() == "kept\n"
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid, within=10.0):
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_part_and_leaves_the_summary_true(number, tmp_path):
    script = f"""
import sys
from pathlib import Path
from puna.benchmarks.gpu import run as program
from puna.benchmarks.gpu.parts import Part
slow = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); "
program.parts = lambda dry, layers: [
    Part("good", [sys.executable, "-c", ""], 60),
    Part("slow", [sys.executable, "-c", slow + "time.sleep(99)"], 60),
    Part("never", [sys.executable, "-c", ""], 60),
]
program.run(Path({str(tmp_path / "out")!r}), dry_run=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(python(script), env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) != 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert states(summary) == {"good": "passed", "slow": "stopped"}
    assert ended(int((tmp_path / "pid").read_text()))


def test_what_cannot_be_run_is_said(run, tmp_path):
    with pytest.raises(ValueError, match="no part is called 'fast'; there is good"):
        run(GOOD, only=("fast",))
    with pytest.raises(ValueError, match="leave out --layers"):
        run(GOOD, layers=3)
    with pytest.raises(ValueError, match="are counts"):
        run(GOOD, seconds=-1)
    run(GOOD)
    path = tmp_path / "out" / "summary.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "machine": {**found["machine"], "gpu": "another"}}))
    with pytest.raises(ValueError, match="holds another machine's parts"):
        run(GOOD)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no summary of this program"):
        run(GOOD)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU is visible"):
        program.run(tmp_path / "out")


def test_every_test_of_a_gpu_belongs_to_a_part():
    marked = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"mark\.gpu|triton_device|mark\(\"gpu\"\)", path.read_text())
    }
    known = [name for names in TESTS.values() for name in names]
    assert marked - {"gpu_run"} == set(known) and len(known) == len(set(known))


def test_no_part_runs_what_takes_minutes():
    """A -m takes the place of pyproject's, which leaves them out."""
    commands = [part.command for part in parts() if "pytest" in part.command]
    assert len(commands) == len(TESTS) + 2  # and two sanitizers
    assert all("gpu and not slow" in command for command in commands)


def test_each_part_has_a_name_and_a_time_of_its_own():
    for dry in (False, True):
        found = parts(dry)
        names = [part.name for part in found]
        assert len(set(names)) == len(names) and all(part.seconds > 0 for part in found)
    cut = [part.name for part in parts(layers=4) if "--layers 4" in " ".join(part.command)]
    models = ("train", "recompute", "generate", "rlhf", "rollout")
    assert cut == [f"bench-{name}" for name in (*models, "all")]
    assert names.index("stages") < names.index("bench-norms") < names.index("memcheck")


def dry_run(out, *only):
    command = [sys.executable, "-m", "puna.benchmarks.gpu", "--dry-run", "--out", str(out)]
    command += ["--only", *only] if only else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert set(states(summary).values()) <= {"passed", "left out"}
    assert {bar["met"] for bar in summary["bars"]} == {None}  # nothing of it was measured
    return states(summary)


def test_a_dry_run_of_a_part_of_each_kind(tmp_path):
    pytest.importorskip("triton")
    assert set(dry_run(tmp_path / "out", *QUICK)) == set(QUICK)


@pytest.mark.slow
def test_a_dry_run_of_all(tmp_path):
    pytest.importorskip("triton")
    assert list(dry_run(tmp_path / "out")) == [part.name for part in parts(dry=True)]
