"""The demo, scaled to a minute: everything runs, nothing is judged. `-m slow` runs all of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from puna.core import ops
from puna.demo.pipeline import Demo, DemoConfig
from puna.demo.products import products
from puna.demo.real import RealConfig
from puna.demo.report.bars import bars
from puna.trainers import pretrain, sft
from puna.trainers.train.claim import owned

VERSIONS = {"sft", *(f"rlhf-v{n}" for n in range(1, 6)), "gatt", "rlhf-v5-rejection"}


def puna(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "puna.cli.main", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo that was killed once on its way and then run to its end."""
    out = tmp_path_factory.mktemp("demo") / "run"
    arguments = ["demo", "--out", str(out), "--scale", "0.03"]
    command = [sys.executable, "-m", "puna.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (out / "rlhf" / "round-1").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
    done = puna(*arguments)
    assert done.returncode == 0, done.stderr
    assert "puna chat --model" in done.stdout
    return out


def test_the_summary_has_the_promised_keys(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert set(summary) == {"seconds", "reward_models", "versions", "gatt", "gatt_other"}
    assert VERSIONS <= set(summary["versions"])
    assert set(summary["gatt"]) == {"with", "without"}
    assert set(summary["gatt"]["with"]) == {"1", "2", "4", "6", "10", "20"}
    for row in summary["versions"].values():
        low, high = row["win_rate_ci95"]
        assert 0 <= low <= row["win_rate_vs_sft"] <= high <= 1


def test_the_report_is_one_file(demo: Path) -> None:
    html = (demo / "report.html").read_text()
    assert "<svg" in html or "data:image/png" in html
    assert 'src="http' not in html and "<script src" not in html


def test_its_chat_command_works(demo: Path) -> None:
    model = str(demo / "rlhf" / "round-5" / "ppo" / "model")
    said = puna("chat", "--model", model, "--max-new-tokens", "8", text="Where is the lamp?\n")
    assert said.returncode == 0, said.stderr
    refused = puna("chat", "--model", model, text="[INST] hello\n")
    assert "chat tag" in refused.stderr and "Traceback" not in refused.stderr


def test_a_run_that_was_killed_while_it_was_judged_goes_on(demo: Path) -> None:
    before = json.loads((demo / "evaluation.json").read_text())
    for lost in ("evaluation.json", "evaluation/persona-value-with-greedy.json"):
        (demo / lost).unlink()
    done = puna("demo", "--out", str(demo), "--scale", "0.03")
    assert done.returncode == 0, done.stderr
    after = json.loads((demo / "evaluation.json").read_text())
    assert after["gatt"] == before["gatt"] and after["versions"] == before["versions"]


def test_a_smaller_model_learns_from_the_last_versions_answers(demo: Path) -> None:
    before = json.loads((demo / "summary.json").read_text())["versions"]
    done = puna("demo", "--out", str(demo), "--scale", "0.03", "--student")
    assert done.returncode == 0, done.stderr
    after = json.loads((demo / "summary.json").read_text())["versions"]
    assert after == before | {name: after[name] for name in ("student-sft", "student")}
    shapes = [
        json.loads((demo / folder / "model" / "config.json").read_text())["hidden_size"]
        for folder in ("sft", "student/sft", "student/student")
    ]
    assert shapes == [128, 64, 64]
    html = (demo / "report.html").read_text()
    assert "smaller, taught" in html


@pytest.mark.parametrize(
    ("asked", "has", "found"),
    [
        ("auto", True, "bf16"),
        ("auto", False, "fp32"),
        ("bf16", False, "bf16"),
        ("fp32", True, "fp32"),
    ],
)
def test_all_stages_multiply_in_one_format(
    asked: Any, has: bool, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "multiplies_bf16", lambda: has)
    given: list[Any] = []
    monkeypatch.setattr(pretrain, "run", given.append)
    monkeypatch.setattr(sft, "run", given.append)
    demo = Demo(DemoConfig(out=tmp_path, dtype=asked))
    demo.pretrain()
    demo.sft()
    loop = demo.rlhf_config()
    tables = (loop.reward, loop.rejection, loop.gatt, loop.ppo)
    assert {config.dtype for config in (*given, loop)} | {t["dtype"] for t in tables} == {found}
    demo.pretrain(1_000)
    assert given[-1].steps == 1_000 != given[0].steps


def test_a_run_says_in_what_it_multiplied_and_goes_on_in_that(demo: Path) -> None:
    found = products("auto")
    assert f'dtype = "{found}"' in (demo / "config.toml").read_text()
    evaluation = json.loads((demo / "evaluation.json").read_text())
    assert evaluation["machine"]["stages multiply"] == found
    command = ("demo", "--out", str(demo), "--scale", "0.03", "--dtype")
    again = puna(*command, found)
    assert again.returncode == 0, again.stderr
    other = puna(*command, "fp32" if found == "bf16" else "bf16")
    assert other.returncode == 1
    assert "dtype" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp32"])
def test_what_has_stages_multiplies_nothing_itself(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "multiplies_bf16", lambda: True)
    configs = (
        DemoConfig(out=tmp_path / "demo", dtype=dtype),
        RealConfig(out=tmp_path / "real", data=tmp_path, dtype=dtype),
    )
    for config in configs:
        with owned(config):
            assert ops.products() == "fp32"


def test_another_seed_is_refused_in_the_same_folder(demo: Path) -> None:
    refused = puna("demo", "--out", str(demo), "--scale", "0.03", "--seed", "1")
    assert refused.returncode == 1
    assert "seed" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_full_demo_shows_what_it_promises(tmp_path: Path, seed: int) -> None:
    done = puna("demo", "--out", str(tmp_path / "run"), "--seed", str(seed))
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    missed = [bar for bar in bars(evaluation) if not bar.met]
    assert not missed
