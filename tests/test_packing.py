"""Packing keeps every token and crosses no border. Run: python -m pytest tests/test_packing.py"""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.packed import flat_sequences
from puna.core.text.chat import encode_dialogue
from puna.core.text.tokenizer import Tokenizer, train_tokenizer
from puna.trainers.data.corpus import Corpus
from puna.trainers.data.formats import Preference
from puna.trainers.data.packing import (
    CorpusRows,
    LMBatch,
    PackedRows,
    Pair,
    best_fit,
    encode_pairs,
    pair_batch,
)
from puna.trainers.data.visits import epoch_order, rows_at, shuffled
from puna.trainers.distill import DistillConfig
from puna.trainers.gatt import GAttConfig
from puna.trainers.rejection import RejectionConfig
from puna.trainers.reward import RewardConfig
from puna.trainers.rl.losses import MARGINS
from puna.trainers.sft import SFTConfig

VOCAB = 100
ids = st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=12)


def check_invariants(batch: LMBatch) -> list[tuple[list[int], list[int], list[float]]]:
    """Checks what holds in every batch; returns (tokens, targets, weights) of each segment."""
    n_rows, row_tokens = batch.tokens.shape
    borders = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert [t.dtype for t in batch[:4]] == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert borders[0] == 0 and borders[-1] == n_rows * row_tokens
    assert set(range(0, n_rows * row_tokens, row_tokens)) <= set(borders)  # no segment spans rows
    flat = [tensor.flatten().tolist() for tensor in batch[:4]]
    segments = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        assert start < end
        tokens, targets, weights, positions = (values[start:end] for values in flat)
        assert positions == list(range(end - start))
        for place, weight in enumerate(weights):
            if place + 1 < len(tokens) and weight:
                assert targets[place] == tokens[place + 1]
        segments.append((tokens, targets, weights))
    return segments


@st.composite
def weighted(draw) -> tuple[list[int], list[float]]:
    sequence = draw(ids)
    values = st.sampled_from([0.0, 0.5, 1.0])
    return sequence, draw(st.lists(values, min_size=len(sequence), max_size=len(sequence)))


@given(st.lists(weighted(), min_size=1, max_size=20), st.integers(1, 16), st.data())
def test_packed_rows_hold_every_sequence_once(sequences, row_tokens, data) -> None:
    def usable(sequence, weights) -> bool:
        return len(sequence) - 1 <= row_tokens and any(weights[1:])

    expected = [(s, w) for s, w in sequences if usable(s, w)]
    if not expected:
        with pytest.raises(ValueError, match="no sequence to train on"):
            PackedRows(sequences, row_tokens, vocab_size=VOCAB)
        return
    rows = PackedRows(sequences, row_tokens, vocab_size=VOCAB)
    assert sum(rows.skipped.values()) == len(sequences) - len(expected)
    batch = rows.batch(data.draw(st.permutations(range(len(rows)))))
    found: Counter = Counter()
    for tokens, targets, weights in check_invariants(batch):
        if any(weights):
            # The whole sequence comes back: its inputs, and its last id as the last target.
            found[(tuple(tokens) + (targets[-1],), tuple(weights))] += 1
        else:
            assert not any(tokens) and not any(targets)  # padding
    assert found == Counter((tuple(s), tuple(w[1:])) for s, w in expected)


@given(st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=4), st.integers(1, 16))
def test_corpus_rows_hold_every_token_once(shards, row_tokens) -> None:
    bos = VOCAB
    shards = [[[bos, *document] for document in documents] for documents in shards]
    documents = sum(shards, [])
    streams = [sum(inside, []) for inside in shards]
    arrays = tuple(np.array(stream, np.uint16) for stream in streams)
    rows = CorpusRows(Corpus(arrays, bos, VOCAB + 1), row_tokens)
    assert len(rows) == sum(-(-len(stream) // row_tokens) for stream in streams)
    batch = rows.batch(range(len(rows)))
    padded = [stream + [0] * (-len(stream) % row_tokens) for stream in streams]
    assert batch.tokens.flatten().tolist() == sum(padded, [])
    pairs = []
    for tokens, targets, weights in check_invariants(batch):
        assert bos not in tokens[1:]  # a document begins a segment
        assert bos not in targets  # nothing predicts across documents
        assert set(weights) <= {0.0, 1.0}
        pairs += [(a, b) for a, b, w in zip(tokens, targets, weights, strict=True) if w]
    expected = [(a, b) for d in documents for a, b in zip(d[:-1], d[1:], strict=True)]
    assert pairs == expected


@given(st.data())
def test_a_row_does_not_depend_on_its_batch(data) -> None:
    stream = np.arange(1, 60, dtype=np.uint16)
    stream[[13, 14, 40]] = 0
    rows = CorpusRows(Corpus((stream, stream[:7]), 0, 60), 8)
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
    batch = rows.batch(indices)
    for place, index in enumerate(indices):
        alone = rows.batch([index])
        for together, single in zip(batch[:4], alone[:4], strict=True):
            assert torch.equal(together[place], single[0])


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_best_fit(lengths, capacity) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(index for found in bins for index in found) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in found) for found in bins]
    assert all(0 < size <= capacity for size in sizes)
    assert len(bins) <= -(-sum(lengths) * 3 // (2 * capacity)) + 1  # at most half as many too many


@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 9))
def test_steps_visit_every_row_once_an_epoch(n, batch_size, seed) -> None:
    batches = [range(step * batch_size, (step + 1) * batch_size) for step in range(n)]
    visited = np.concatenate([rows_at(n, seed, places) for places in batches])
    for epoch in range(batch_size):  # n steps of batch_size rows are batch_size epochs
        assert sorted(visited[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert np.array_equal(visited[epoch * n : (epoch + 1) * n], epoch_order(n, seed, epoch))


@given(st.integers(1, 3000), st.integers(0, 5), st.integers(0, 5))
def test_a_computed_order_visits_every_row_once(n, seed, epoch) -> None:
    order = shuffled(n, seed, epoch, np.arange(n))
    assert sorted(order) == list(range(n))
    places = np.array([n // 2, 0, n - 1])
    assert np.array_equal(shuffled(n, seed, epoch, places), order[places])


def test_a_computed_order_is_as_mixed_as_a_stored_one() -> None:
    """Rank correlation with the place, neighbours' distance and fixed points, of 20 orders each."""
    n = 4096

    def looks(order: np.ndarray) -> list[float]:
        apart = np.abs(np.diff(order)).mean() / n
        return [np.corrcoef(order, np.arange(n))[0, 1], apart, float((order == np.arange(n)).sum())]

    ours = np.mean([looks(shuffled(n, seed, 1, np.arange(n))) for seed in range(20)], axis=0)
    theirs = np.mean([looks(epoch_order(n, seed, 1)) for seed in range(20)], axis=0)
    assert np.all(np.abs(ours - theirs) < [0.02, 0.005, 1.2])
    assert len({tuple(shuffled(n, s, e, np.arange(9))) for s in range(3) for e in range(3)}) == 9


def test_rows_beyond_memory_have_an_order() -> None:
    n = 488_281_250  # 2T tokens in rows of 4,096
    starts = [1024 * step for step in (0, 1, 476_836, 476_837)]
    found = np.concatenate([rows_at(n, 0, range(start, start + 1024)) for start in starts])
    assert len(set(found.tolist())) == len(found) and 0 <= found.min() <= found.max() < n
    assert abs(found.mean() / n - 0.5) < 0.05


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert not np.array_equal(epoch_order(50, 0, 1), epoch_order(50, 1, 0))
    with pytest.raises(ValueError, match="no rows"):
        rows_at(0, 0, range(4))


@given(st.lists(ids, min_size=1, max_size=8))
def test_flat_sequences(sequences) -> None:
    tokens, positions, cu_seqlens = flat_sequences(sequences)
    assert tokens.shape == positions.shape == (1, sum(map(len, sequences)))
    borders = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32 and len(borders) == len(sequences) + 1
    for sequence, start, end in zip(sequences, borders[:-1], borders[1:], strict=True):
        assert tokens[0, start:end].tolist() == sequence
        assert positions[0, start:end].tolist() == list(range(len(sequence)))


def test_pair_batch() -> None:
    pairs = [
        Pair([1, 2, 3], [1, 4], "better", "chosen_safe"),
        Pair([5], [6, 7], None, None),
        Pair([8], [9], "negligibly_better", "both_unsafe"),
        Pair([8], [9], "significantly_better", "both_safe"),
    ]
    batch = pair_batch(pairs, MARGINS["large"])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9]]  # 1 is there once
    assert batch.last.tolist() == [2, 3, 4, 6, 7, 8, 9, 10]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 9, 10, 11, 12]
    assert batch.margins.tolist() == [2.0, 0.0, 0.0, 3.0]
    assert batch.ratings.tolist() == [1, -1, 3, 0]
    nan = float("nan")
    assert torch.equal(batch.safe[:2], torch.tensor([1.0, 0.0]))
    assert str(batch.safe[2:4].tolist()) == str([nan, nan])
    assert batch.safe[4:].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("packing") / "tokenizer.model"
    return train_tokenizer(["[INST] a question [/INST] an answer"] * 20, path, vocab_size=280)


def test_pairs_are_dialogues_and_long_ones_are_counted(tokenizer: Tokenizer) -> None:
    question = {"role": "user", "content": "a question"}
    rows = [
        Preference([question], "an answer", "no", "better", "both_safe"),
        Preference([question], "an answer", "long " * 50),
    ]
    pairs, skipped = encode_pairs(tokenizer, rows, context=60)
    assert len(pairs) == 1 and dict(skipped) == {"longer than the context of 60 tokens": 1}
    whole, _ = encode_dialogue(tokenizer, [question, {"role": "assistant", "content": "an answer"}])
    assert pairs[0].chosen == whole
    assert pairs[0].rejected[-1] == tokenizer.eos_id
    with pytest.raises(ValueError, match="no pair to train on: skipped 2 rows: longer than"):
        encode_pairs(tokenizer, rows, context=5)


def test_long_pairs_are_cut_where_asked(tokenizer: Tokenizer) -> None:
    """Where the prompt leaves room, and what is left of the answers differs."""
    question = {"role": "user", "content": "a question"}
    rows = [
        Preference([question], "an answer", "long " * 50, where="p.jsonl:1"),
        Preference([question], "same " * 50 + "a", "same " * 50 + "b", where="p.jsonl:2"),
        Preference([{"role": "user", "content": "long " * 50}], "a", "b", where="p.jsonl:3"),
        Preference([question], "an answer", "no", where="p.jsonl:4"),
    ]
    pairs, skipped = encode_pairs(tokenizer, rows, 60, truncate=True)
    whole, _ = encode_pairs(tokenizer, rows, 10_000)
    assert skipped.notes == ["cut 1 to the context of 60 tokens (first p.jsonl:1)"]
    assert dict(skipped) == {"the answers do not differ within the context of 60 tokens": 2}
    assert pairs[0].chosen == whole[0].chosen  # which fits, with its EOS
    assert pairs[0].rejected == whole[0].rejected[:60] and len(whole[0].rejected) > 60
    assert pairs[1] == whole[3] and len(pairs) == 2
    short, _ = encode_pairs(tokenizer, rows[3:], 60, truncate=True)
    assert short == whole[3:]


def test_a_stage_cuts_what_it_is_told_to_cut() -> None:
    """Every stage that trains on rows has the option, off."""
    for config in (SFTConfig, RewardConfig, GAttConfig, RejectionConfig, DistillConfig):
        assert {field.name: field.default for field in fields(config)}["truncate"] is False


def test_where_nothing_is_left_the_way_out_is_that_of_the_reason() -> None:
    long, unlearned = ([5] * 9, [1.0] * 9), ([5] * 3, [0.0] * 3)
    with pytest.raises(ValueError, match="longer than the 5 tokens of a row .*; raise row_tokens"):
        PackedRows([long, unlearned], 5, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="no token to learn .*; give other data"):
        PackedRows([unlearned], 5, vocab_size=VOCAB)
