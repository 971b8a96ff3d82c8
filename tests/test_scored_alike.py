"""Answers that begin alike are scored as each alone is, to the last bit."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.native import alike
from puna.core.native.engine import Engine
from puna.core.native.loader import extension
from puna.core.packed import score

pytestmark = pytest.mark.skipif(extension() is None, reason="the extension is not built")

SEQUENCES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=20
)  # which of four prompts, and how many tokens of its own


def model(**changes: Any) -> Transformer:
    config = replace(ModelConfig(64, 2, 4, 2, 96, 131, context=128), **changes)
    made = Transformer(config, head="score")
    made.init_weights(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0.0, 0.3) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    return made


def sequences(drawn: list[tuple[int, int]]) -> list[list[int]]:
    rng = random.Random(5)
    system = [rng.randrange(131) for _ in range(12)]
    prompts = [system + [rng.randrange(131) for _ in range(n)] for n in (3, 20, 33, 60)]
    return [prompts[which] + [rng.randrange(131) for _ in range(n)] for which, n in drawn]


def alone(model: Transformer, sequence: list[int]) -> torch.Tensor:
    """By the model's own operations."""
    return model.logits(model(torch.tensor([sequence]))[0, -1:])[0]


@settings(max_examples=40, deadline=None)
@given(drawn=SEQUENCES, max_tokens=st.sampled_from([1, 90, 300, 16384]))
def test_scores_are_those_of_each_alone(drawn: list[tuple[int, int]], max_tokens: int) -> None:
    rows, made = sequences(drawn), model()
    with torch.no_grad():
        wanted = torch.cat([alone(made, row) for row in rows])
        assert torch.equal(score(made, rows, max_tokens=max_tokens), wanted)
        found = alike.last_outputs(Engine(made), rows, alike.groups(rows), max_tokens)
        assert torch.equal(found[:, 0], wanted)
        with ops.use_backend("reference"):
            torch.testing.assert_close(score(made, rows), wanted, rtol=1e-4, atol=1e-4)


@given(drawn=SEQUENCES)
def test_groups_are_neighbours_that_begin_alike(drawn: list[tuple[int, int]]) -> None:
    rows = sequences(drawn)
    found = alike.groups(rows)
    assert [i for each in found for i in range(each.first, each.end)] == list(range(len(rows)))
    for first, end, shared in found:
        for row in rows[first:end]:
            assert row[:shared] == rows[first][:shared] and len(row) > shared
        assert (shared >= alike.LEAST) == (end - first > 1)


def test_k_answers_run_their_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight answers to each of two prompts, counted where tokens are fed."""
    rows = sequences([(2, 1 + i % 3) for i in range(8)] + [(3, 1 + i % 4) for i in range(8)])
    fed: list[int] = []
    run = alike.Session._forward
    monkeypatch.setattr(
        alike.Session,
        "_forward",
        lambda self, tokens, *rest: fed.append(tokens.numel()) or run(self, tokens, *rest),
    )
    score(model(), rows)
    prompts = 45 + 72
    assert sum(fed) == sum(map(len, rows)) - 7 * prompts


@pytest.mark.skipif(not ops.multiplies_bf16(), reason="no products of bf16")
def test_products_of_bf16_too() -> None:
    rows, made = sequences([(3, n % 5 + 1) for n in range(12)]), model()
    with torch.no_grad(), ops.use_products("bf16"):
        wanted = torch.cat([alone(made, row) for row in rows])
        assert torch.equal(score(made, rows), wanted)
    assert not torch.equal(score(made, rows), wanted)


@pytest.mark.parametrize(
    "changes", [{"head_size": 8}, {"head_size": 24}, {"qkv_bias": True}, {"attention_bias": True}]
)
def test_the_bits_do_not_depend_on_who_is_beside(changes: dict[str, Any]) -> None:
    """Where the engine would give others, the model's own operations do it."""
    rows, made = sequences([(2, n % 7 + 1) for n in range(8)]), model(**changes)
    with torch.no_grad():
        assert torch.equal(score(made, rows), torch.cat([alone(made, row) for row in rows]))


def test_what_the_engine_does_not_take_is_scored_all_the_same() -> None:
    rows, made = sequences([(1, n) for n in range(1, 9)]), model()
    plain = score(made, rows)
    made.score.register_forward_hook(lambda module, given, out: 2 * out)
    torch.testing.assert_close(score(made, rows), 2 * plain)
    half = model().bfloat16()
    assert score(half, rows).isfinite().all()


def test_a_head_of_scores_draws_nothing() -> None:
    with Engine(model()).session(1, 8) as session, pytest.raises(ValueError, match="none to draw"):
        one = torch.zeros(1, dtype=torch.int64)
        session.draw(one, one, one, one, seeds=torch.zeros(1, 1, dtype=torch.int64), temperature=1)


def test_bad_sequences_are_refused_as_ever() -> None:
    prompt = list(range(100))
    with pytest.raises(ValueError, match="exceeds the model's context of 128"):
        score(model(), [prompt + [1], prompt + list(range(40))])
    with pytest.raises(ValueError, match="empty sequence"):
        score(model(), [prompt, []])
