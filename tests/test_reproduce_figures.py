"""Which files of an arm's figures are taken as measured.

Run: python -m pytest tests/test_reproduce_figures.py -q
"""

import json

import pytest

from puna.demo.reproduce import results


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"wins": 1}', '{"wins": [true]}', '{"wins": ["1"]}', '{"wins": [null]}',
     '{"wins": [NaN, 1]}', '{"wins": [Infinity]}', '{"wins": [1' + "0" * 400 + "]}"],
)  # fmt: skip
def test_a_damaged_arm_counts_as_not_measured(tmp_path, text):
    results.note(tmp_path, "rejection", 0, {"wins": [1.0, 0.5]})
    assert results.figures_of(tmp_path, "rejection", 0) == {"wins": [1.0, 0.5]}
    results.folder_of(tmp_path, "rejection", 0).with_suffix(".json").write_text(text)
    assert results.figures_of(tmp_path, "rejection", 0) is None
    assert "rejection" in results.missing(tmp_path, 1)[0]
    found = results.read_results(tmp_path, 1)
    said = json.dumps(results.document(found, 0, 1, 1.0, []), allow_nan=False)
    assert "rejection" not in json.loads(said)["arms"]
