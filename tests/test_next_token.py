"""Run: python -m pytest tests/test_next_token.py -q"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core import parallel
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.data.packing import PackedRows
from puna.trainers.train import loop, next_token

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    """Sequences of several lengths and weights, several to a row."""
    sequences = [([(7 * i + j) % 30 for j in range(4 + i % 9)], i % 3) for i in range(25)]
    weighted = [(ids, [0.0] + [1.0 + which] * (len(ids) - 1)) for ids, which in sequences]
    return PackedRows(weighted, 16, vocab_size=30)


@pytest.fixture(scope="module")
def model():
    made = Transformer(ModelConfig(16, 2, 2, 1, 24, vocab_size=30, context=16))
    made.init_weights(0)
    return made


def test_the_loss_is_the_weighted_cross_entropy_of_each_sequence_alone(rows, model):
    batch = rows.batch(range(len(rows)))
    total = next_token.next_token_loss(model, batch)[0]
    expected = torch.zeros(())
    flat = [column.flatten() for column in batch[:3]]
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        tokens, targets, weights = (column[begin:end] for column in flat)
        logits = model(tokens[None])[0] @ model.lm_head.weight.T
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        expected = expected + (losses * weights).sum()
    torch.testing.assert_close(total, expected)
    assert next_token.OBJECTIVE.weight(batch) == float(batch.weights.sum()) > 0
    assert next_token.OBJECTIVE.tokens(batch) == 16 * len(rows)


def test_micro_batches_visit_every_row_once_an_epoch_and_depend_on_the_step_only(rows):
    batch_at = next_token.row_batches(rows, batch=5, micro_batch=2, seed=3, device=CPU)
    everything = rows.batch(range(len(rows))).tokens.tolist()
    seen = [row for step in range(len(rows)) for b in batch_at(step) for row in b.tokens.tolist()]
    assert [len(b.tokens) for b in batch_at(0)] == [2, 2, 1]
    for epoch in range(5):
        part = seen[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert sorted(part) == sorted(everything)
    again = next_token.row_batches(rows, batch=5, micro_batch=2, seed=3, device=CPU)(4)
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(again, batch_at(4), strict=True))


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_the_held_out_loss_is_the_mean_over_all_weights(rows, model, micro_batch):
    batch = rows.batch(range(len(rows)))
    expected = next_token.next_token_loss(model, batch)[0] / batch.weights.sum()
    evaluate = next_token.evaluation(rows, micro_batch, CPU)
    found = loop.evaluated(model, evaluate)
    assert found == {"eval_loss": pytest.approx(expected.item(), rel=1e-6)}
    assert next_token.evaluation(None, 1, CPU) is None


def test_a_batch_is_shared_equally_or_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert next_token.rank_part([1, 2, 3, 4]) == [3, 4]
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared equally by 2 processes"):
        next_token.rank_part([1, 2, 3])


@given(st.integers(2, 60), st.floats(0, 0.9), st.integers(0, 3))
def test_a_split_loses_nothing_and_is_the_same_every_time(count, share, seed):
    items = list(range(count))
    if share > 0 and max(1, round(share * count)) >= count:
        with pytest.raises(ValueError, match="too few rows"):
            next_token.split(items, share, seed)
        return
    kept, held = next_token.split(items, share, seed)
    assert sorted(kept + held) == items and kept == sorted(kept) and held == sorted(held)
    assert len(held) == (max(1, round(share * count)) if share else 0)
    assert next_token.split(items, share, seed) == (kept, held)


def test_one_row_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"too few rows \(1\) to hold some out; .*--eval-share 0"):
        next_token.split(["a"], 0.02, 0)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "steps"), [(100, 2, 64, 3), (64, 1, 64, 1), (3, 1, 64, 1)]
)
def test_steps_of_an_epoch(rows, epochs, batch, steps):
    assert next_token.epoch_steps(rows, epochs, batch) == steps
