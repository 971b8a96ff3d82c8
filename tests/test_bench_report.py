"""The page of results: every row stands in it, what others wrote is no markup, nothing is loaded.

Run: python -m pytest tests/test_bench_report.py -q
"""

import json
import re
from pathlib import Path

import pytest

from puna.benchmarks import output
from puna.benchmarks.models import growth
from puna.benchmarks.rows import Work, row
from puna.benchmarks.timing import Timing
from puna.cli.main import main

CARD = {"processor": "AMD EPYC", "threads": 2, "torch": "2.13"}


def rows():
    def made(work, provider, rate, **more):
        return row(work, provider, Timing(*[work.tokens / rate] * 3), 0.0, 1.0) | more

    found = []
    for batch in (1, 8):
        work = Work("generate", "demo", batch, 100, 9000.0 * batch)
        found += [made(work, "puna", 5000.0), made(work, "llama.cpp", 6111.0)]
    for part, share in (("sampling", 0.25), ("update", 0.75)):
        work = Work("rlhf", "demo", 4, 100, 900.0, operation=part)
        found.append(made(work, "puna", 500.0, share=share))
    for x in (1, 2, 4):
        work = Work("growth", f"batch {x}", x, 100, 900.0, operation="train by batch")
        found.append(made(work, "puna", 500.0 / x, along="batch", x=x))
    kernel = {
        "bench": "kernel", "operation": "swiglu", "direction": "forward", "shape": "8x8",
        "batch": 8, "dtype": "fp32", "provider": "torch", "value": 2.5, "unit": "GB/s",
        "p20": 2.0, "p80": 3.0, "limit": 9.0, "ms": 1.0, "error": 0.0, "peak_mb": None,
        "failed": None,
    }  # fmt: skip
    wrong = {"provider": "<b>puna</b>", "failed": "result 0 is <i>off</i>"}
    return [*found, kernel, kernel | wrong | dict.fromkeys(("value", "p20", "p80", "ms"))]


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    found = rows()
    fits = growth.exponents([each for each in found if each["bench"] != "kernel"])
    document = {"machine": CARD, "command": "puna bench", "rows": found, "growth": fits}
    (folder / "all.json").write_text(json.dumps(document | {"left_out": ["<script>x</script>"]}))
    return folder


def test_the_page_has_every_row_and_loads_nothing(results, capsys):
    assert main(["bench", "report", str(results)]) == 0
    page = (results / "report.html").read_text(encoding="utf-8")
    found = json.loads((results / "all.json").read_text())["rows"]
    cells = output.row_cells([each for each in found if each["bench"] != "kernel"])
    for line in cells:  # the lost ones, too: 5,000 to 6,111 is 0.82 times
        assert "".join(f"<td>{cell}</td>" for cell in line[:5]) in page
    assert ">0.82x<" in page
    assert page.count("<svg") == 6  # roof, batches, PPO, growth, ceilings of models and of kernels
    assert "train by batch: 1.00" in page and "exponent 1.00" in page and "not timed" in page
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    outside = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#)[^\s\"')>]+", page)
    assert [each for each in outside if "url(#" not in each] == []


def test_the_committed_results_have_a_page_and_are_as_before(tmp_path, capsys):
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    assert main(["bench", "report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    for path in folder.glob("*/*.json"):
        assert main(["bench", "compare", str(path), str(path)]) == 0, path


def test_results_of_two_machines_in_one_folder(results, capsys):
    other = {"machine": CARD | {"processor": "Apple M4"}, "rows": []}
    (results / "zz.json").write_text(json.dumps(other))
    assert main(["bench", "report", str(results)]) == 1
    assert "are of several machines; give each a folder of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "all.json"),
        ('{"machine": {}, "rows": [{"provider": "puna"}]}', "is of another format than this"),
        ('{"machine": {}, "rows": [{"provider": "puna", "bench": "train"}]}', "is missing"),
        ('{"machine": {}, "rows": [3]}', "row 1 names no provider"),
    ],
)
def test_what_is_no_document_is_named(results, capsys, text, said):
    (results / "all.json").write_text(text)
    assert main(["bench", "report", str(results)]) == 1
    error = capsys.readouterr().err
    assert said in error and "all.json" in error and error.count("\n") == 1


def test_no_results_at_all(tmp_path, capsys):
    assert main(["bench", "report", str(tmp_path)]) == 1
    assert "holds no results; measure some with" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "nowhere")]) == 1
    assert "is no folder of results" in capsys.readouterr().err
