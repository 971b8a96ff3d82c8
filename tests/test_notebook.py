"""docs/notebook.ipynb from top to bottom. Run: pytest -m slow tests/test_notebook.py -q"""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"


def cells(kind: str) -> list[str]:
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == kind]


def test_it_is_a_notebook_without_outputs():
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names = [cell["id"] for cell in document["cells"]]
    assert len(set(names)) == len(names) and cells("markdown")[0].startswith("# ")
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
def test_it_runs_and_ppo_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict = {}
    for number, cell in enumerate(cells("code")):
        exec(compile(cell, f"cell {number}", "exec"), names)
    share, before, after = names["share"], names["before"], names["after"]
    assert 0.2 < share(before) < 0.8 and share(after) > share(before) + 0.1
    old, new = names["lists"]
    assert len(old) == len(new) == len(names["ids"]) and new[0] > old[0] + 0.2
    assert all(value <= 0 for value in old + new)
