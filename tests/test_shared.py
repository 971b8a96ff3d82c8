"""Pairs whose common beginning is computed once. Run: pytest tests/test_shared.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.packed import flat_sequences
from puna.core.shared import in_twos

CONFIG = ModelConfig(vocab_size=32, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48)
IDS = st.lists(st.integers(0, 31), max_size=12).map(lambda ids: [1, *ids])
ENDS = st.lists(st.integers(0, 31), min_size=1, max_size=12)


@st.composite
def twos(draw):
    """Pairs of all kinds: alike in nothing, in their prompt, in all, one the other's beginning."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        prompt, one = draw(IDS), draw(ENDS)
        other = draw(st.one_of(ENDS, st.just(one), st.just(one[:1]), st.just([*one, 3])))
        found += [[*prompt, *one], [*prompt, *other]]
    return found


def model_of(dtype: torch.dtype, head: str = "score") -> Transformer:
    model = Transformer(CONFIG, head)
    model.init_weights(seed=1)
    return model.to(dtype)


def apart(model: Transformer, sequences: list[list[int]]) -> torch.Tensor:
    """Scores (2P,) of sequences that are laid end to end, each with a beginning of its own."""
    tokens, positions, cu_seqlens = flat_sequences(sequences)
    hidden = model(tokens, positions, cu_seqlens)[0]
    return model.logits(hidden[cu_seqlens[1:].long() - 1])[:, 0]


def together(model: Transformer, sequences: list[list[int]]) -> torch.Tensor:
    sides = in_twos(sequences)
    hidden = model(sides.tokens, sides.positions, sides.cu_seqlens, shared=sides.shared)[0]
    return model.logits(hidden[sides.last])[:, 0]


@given(twos())
@settings(max_examples=60, deadline=None)
def test_a_sequence_is_its_rows_and_each_token_is_there_once(sequences):
    sides = in_twos(sequences)
    shared, tokens, positions = sides.shared, sides.tokens[0], sides.positions[0]
    borders = sides.cu_seqlens.tolist()
    for i, sequence in enumerate(sequences):
        rows = shared.rows[borders[i] : borders[i + 1]]
        assert tokens[rows].tolist() == sequence
        assert positions[rows].tolist() == list(range(len(sequence)))
        assert sides.last[i] == rows[-1]
    assert (shared.rows[shared.own] == torch.arange(len(tokens))[:, None]).all()
    once = shared.own[shared.twice > 0]  # both rows of those that have two
    assert sorted(once.tolist()) == list(range(borders[-1]))
    assert shared.first.nonzero()[:, 0].tolist() == sorted(shared.own[:, 0].tolist())
    for one, other in zip(sequences[0::2], sequences[1::2], strict=True):
        if one[0] == other[0]:
            assert len(tokens) < borders[-1]


@given(twos())
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_sequences_apart_to_the_bit(sequences):
    model = model_of(torch.float32)
    with torch.no_grad():
        assert torch.equal(together(model, sequences), apart(model, sequences))


@given(twos(), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_gradients_are_those_of_sequences_apart(sequences, seed):
    weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(seed)).double()
    found = []
    for scores in (apart, together):
        model = model_of(torch.float64)
        (scores(model, sequences) * weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_of_native_training_agree_with_fp64():
    sequences = [[*range(20), 5], [*range(20), 7, 8], [3, 4, 5], [3, 9]]
    exact, ours = model_of(torch.float64), model_of(torch.float32)
    for model in (exact, ours):
        together(model, sequences).square().sum().backward()
    for (name, p), q in zip(exact.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad.double(), p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_tokens_behind_all_others():
    sides = in_twos([[1, 2, 3], [1, 2, 4, 5]])
    longer = sides.shared.padded(2)
    assert longer.rows.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert longer.first.tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert longer.own.tolist() == [[0, 3], [1, 4], [2, 2], [5, 5], [6, 6], [7, 7], [8, 8]]
    assert longer.twice[:, 1].tolist() == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("sequences", [[[1], []], [[1]]])
def test_no_half_pairs(sequences):
    with pytest.raises((AssertionError, ValueError)):
        in_twos(sequences)


def test_compiled_it_is_one_graph():
    """As `[parallel] compile` does, block by block."""
    sequences = [[1, 2, 3, 4], [1, 2, 5], [1, 7], [1, 7, 8]]
    found = []
    for compiled in (False, True):
        model = model_of(torch.float64)
        for block in model.model.layers if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        scores = together(model, sequences)
        scores.square().sum().backward()
        found.append([scores.detach(), *(p.grad for p in model.parameters())])
    for plain, same in zip(*found, strict=True):
        torch.testing.assert_close(same, plain)
