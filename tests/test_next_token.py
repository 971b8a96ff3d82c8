"""Run: python -m pytest tests/test_next_token.py -q"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core import parallel
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.data.packing import PackedRows
from puna.trainers.data.split import split
from puna.trainers.data.visits import rows_at
from puna.trainers.train import loop, next_token
from puna.trainers.train.plan import announce, check_shares, of_epochs, of_steps

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
    batch_at = next_token.row_batches(rows, of_steps(len(rows), 99, 5), 2, 3, CPU)
    everything = rows.batch(range(len(rows))).tokens.tolist()
    seen = [row for step in range(len(rows)) for b in batch_at(step) for row in b.tokens.tolist()]
    assert [len(b.tokens) for b in batch_at(0)] == [2, 2, 1]
    for epoch in range(5):
        part = seen[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert sorted(part) == sorted(everything)
    again = next_token.row_batches(rows, of_steps(len(rows), 99, 5), 2, 3, CPU)(4)
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(again, batch_at(4), strict=True))


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_the_held_out_loss_is_the_mean_over_all_weights(rows, model, micro_batch):
    batch = rows.batch(range(len(rows)))
    expected = next_token.next_token_loss(model, batch)[0] / batch.weights.sum()
    evaluate = next_token.evaluation(rows, micro_batch, CPU)
    found = loop.evaluated(model, evaluate)
    assert found == {"eval_loss": pytest.approx(expected.item(), rel=1e-6)}
    assert next_token.evaluation(None, 1, CPU) is None


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9))
def test_the_ranks_parts_are_equally_long_and_every_row_counts_once(count, ranks, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: ranks)
        counting, lengths = [], set()
        for rank in range(ranks):
            patch.setattr(parallel, "rank", lambda rank=rank: rank)
            pieces = list(next_token.parts(range(100, 100 + count), size))
            lengths.add(tuple(len(piece) for piece, _ in pieces))
            counting += [index for piece, real in pieces for index in piece[:real]]
    assert counting == list(range(100, 100 + count)) and len(lengths) == 1


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared equally by 2 processes"):
        check_shares(3)


@given(st.integers(2, 60), st.floats(0, 0.9), st.integers(0, 3))
def test_a_split_loses_nothing_and_is_the_same_every_time(count, share, seed):
    items = list(range(count))
    if share > 0 and max(1, round(share * count)) >= count:
        with pytest.raises(ValueError, match="too few rows"):
            split(items, share, seed)
        return
    kept, held = split(items, share, seed)
    assert sorted(kept + held) == items and kept == sorted(kept) and held == sorted(held)
    assert len(held) == (max(1, round(share * count)) if share else 0)
    assert split(items, share, seed) == (kept, held)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.floats(0.01, 0.5))
def test_rows_of_one_prompt_stay_together(prompts, share):
    items = list(enumerate(prompts))
    if len(set(prompts)) == 1:
        with pytest.raises(ValueError, match="of 1 different prompt"):
            split(items, share, 0, lambda item: item[1])
        return
    kept, held = split(items, share, 0, lambda item: item[1])
    assert sorted(kept + held) == items and held
    assert not {prompt for _, prompt in kept} & {prompt for _, prompt in held}
    smallest = min(prompts.count(prompt) for prompt in prompts)
    assert len(held) <= max(round(share * len(items)), smallest)


@given(st.integers(50, 400), st.integers(0, 200), st.integers(0, 3))
def test_rows_that_come_later_change_few_sides(count, more, seed):
    _, before = split(list(range(count)), 0.1, seed)
    _, after = split(list(range(count + more)), 0.1, seed)
    gone, new = set(before) - set(after), {row for row in after if row < count} - set(before)
    assert not (gone and new)  # the border alone moves, one way
    assert len(new) <= round(0.1 * (count + more)) - round(0.1 * count)


def test_one_row_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"too few rows \(1\) to hold some out; .*--eval-share 0"):
        split(["a"], 0.02, 0)


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 70), st.integers(0, 3))
def test_epochs_are_epochs(count, epochs, batch, seed):
    """Every row is visited once an epoch, whatever the batch is: also the remainder, also where
    the batch exceeds the rows."""
    plan = of_epochs(count, epochs, batch)
    seen = [
        int(row)
        for step in range(plan.steps)
        for row in rows_at(plan.rows, seed, plan.places(step))
    ]
    assert len(seen) == count * epochs and plan.steps >= epochs
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize(
    ("plan", "asked", "warmup", "lines"),
    [
        (of_epochs(59, 2, 64), 64, 0, ["2 steps of 59, each seen 2 times; peak learning rate 0.1",
                                       "a batch of 64 exceeds the 59"]),
        (of_epochs(3, 10, 64), 64, 0, ["10 steps of 3, each seen 10 times", "a batch of 64"]),
        (of_epochs(1, 2, 4), 4, 0, ["2 steps of 1, each seen 2 times",
                                    "only one for a batch of 4, so each step takes that one; give "
                                    "more data for more steps"]),
        (of_epochs(100, 1, 40), 40, 0, ["3 steps of 40, each seen once"]),
        (of_steps(100, 2, 40), 40, 1000, ["2 steps of 40, each seen 0.8 times; peak learning rate "
                                          "0.0002", "the warm-up of 1,000 steps is as long"]),
    ],
)  # fmt: skip
def test_a_run_says_what_it_is_going_to_do(capsys, tmp_path, plan, asked, warmup, lines):
    config = loop.TrainConfig(out=tmp_path, lr=0.1, warmup_steps=warmup)
    announce("sft", "rows", plan, config, asked)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(lines)
    assert all(part in line for part, line in zip(lines, said, strict=True))
