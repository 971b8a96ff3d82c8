"""Run: python -m pytest tests/test_weights.py -q"""

import json

import pytest
import torch

from puna.benchmarks.models import weights
from puna.cli import bench
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.native.loader import extension
from puna.core.ops import use_backend

pytestmark = pytest.mark.skipif(extension() is None, reason="the native engine is not built")


def test_windows_cover_the_text_once():
    ids = list(range(10, 610))
    found = weights.windows(ids, 1, context=4096)
    assert [len(row) for row in found] == [256, 256, 91]
    assert all(row[0] == 1 for row in found)
    assert [token for row in found for token in row[1:]] == ids
    assert max(len(row) for row in weights.windows(ids, 1, context=40)) == 40


def test_loss_is_that_of_the_reference():
    model = Transformer(ModelConfig(64, 2, 4, 2, 176, vocab_size=97, context=96))
    model.init_weights(0)
    sequences = weights.windows(torch.randint(97, (700,)).tolist(), 1, 96)
    total, count = 0.0, 0
    with torch.no_grad(), use_backend("reference"):
        for ids in sequences:
            logits = model.logits(model(torch.tensor([ids[:-1]]))[0]).double()
            targets = torch.tensor(ids[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    assert weights.loss(model, sequences, "fp32") == pytest.approx(total / count, abs=1e-6)
    assert weights.loss(model, sequences, "int8") == pytest.approx(total / count, abs=5e-3)
    assert weights.loss(model, sequences, "int8") != weights.loss(model, sequences, "fp32")


@pytest.mark.shared
def test_of_a_trained_model(shared, capsys):
    folder = shared / "stories260K"
    bench.weights(
        bench.WeightsBenchConfig(
            model=folder / "stories260K.bin",
            tokenizer=folder / "tok512.model",
            text=folder / "expected_temp0_n200.txt",
            rounds=1,
        )
    )
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16", "int8"]
    assert rows[0]["error"] == 0
    assert all(0 < abs(row["error"]) < 0.01 for row in rows[1:])
