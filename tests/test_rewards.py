"""Run: python -m pytest tests/test_rewards.py -q"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core import parallel
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.packed import micro_batches, score
from puna.trainers.rl.rewards import (
    Answer,
    RewardModels,
    Scores,
    score_answers,
    settle_unfinished,
    switch,
    token_rewards,
)

CONFIG = ModelConfig(16, 2, 2, 1, 24, vocab_size=13, context=32)


@pytest.fixture(scope="module")
def reward_model():
    model = Transformer(CONFIG, head="score")
    model.init_weights(3)
    return model


def sequences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(0, 13, (n,), generator=generator).tolist() for n in lengths]


def alone(model, sequence):
    hidden = model(torch.tensor([sequence]))[0, -1]
    return (hidden @ model.score.weight[0]).item()


def test_score_is_read_at_the_last_token_of_each_sequence(reward_model):
    """Trap 6: packed or alone, EOS or not, the score is that of the last real token."""
    batch = sequences(9)
    with torch.no_grad():
        expected = [alone(reward_model, sequence) for sequence in batch]
    assert score(reward_model, batch).tolist() == pytest.approx(expected, abs=1e-5)
    assert score(reward_model, batch, max_tokens=5).tolist() == pytest.approx(expected, abs=1e-5)


def test_trailing_eos_is_a_token_like_any_other(reward_model):
    """Trap 5: no id is taken for padding, so an answer's EOS changes its score."""
    with_eos, without = score(reward_model, [[1, 5, 6, 2], [1, 5, 6]]).tolist()
    assert with_eos != pytest.approx(without, abs=1e-6)
    assert with_eos == pytest.approx(alone(reward_model, [1, 5, 6, 2]), abs=1e-5)


def test_score_needs_no_gradient_and_is_fp32(reward_model):
    scores = score(reward_model.double(), [[1, 2]])
    reward_model.float()
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_score_refuses_what_it_cannot_score(reward_model):
    with pytest.raises(ValueError, match="needs a reward model"):
        score(Transformer(CONFIG), [[1]])
    with pytest.raises(ValueError, match="empty sequence"):
        score(reward_model, [[1], []])
    with pytest.raises(ValueError, match="33 tokens exceeds the model's context of 32"):
        score(reward_model, [[1] * 33])


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 20))
def test_micro_batches_cover_every_sequence_once_and_stay_small(lengths, max_tokens):
    groups = micro_batches(lengths, max_tokens)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= max_tokens


def test_micro_batches_keep_ranks_in_step(monkeypatch):
    monkeypatch.setattr(parallel, "all_max", lambda n: max(n, 3))
    assert micro_batches([4, 4], 4) == [[0], [1], []]


def test_score_is_the_same_when_another_rank_needs_more_passes(reward_model, monkeypatch):
    batch = sequences(3)
    expected = score(reward_model, batch)
    monkeypatch.setattr(parallel, "all_max", lambda n: n + 2)
    assert torch.equal(score(reward_model, batch), expected)


def raw(probability):
    return math.log(probability / (1 - probability))


@pytest.mark.parametrize(
    ("safety", "helpful", "is_safety", "expected", "branch"),
    [
        (0.10, 0.90, False, -2.197, "unsafe"),
        (0.20, 0.90, False, 2.197, "helpfulness"),
        (0.20, 0.90, True, raw(0.20), "is_safety"),
        (0.10, 0.90, True, -2.197, "is_safety"),
        (0.1501, 0.30, False, raw(0.30), "helpfulness"),
        (0.1499, 0.30, False, raw(0.1499), "unsafe"),
    ],
)
def test_the_switch_is_equation_four(safety, helpful, is_safety, expected, branch):
    score, branches = switch(
        torch.tensor([raw(helpful)]), torch.tensor([raw(safety)]), torch.tensor([is_safety])
    )
    assert score.item() == pytest.approx(expected, abs=1e-3)
    counts = {"is_safety": False, "unsafe": False, "helpfulness": False}
    assert {name: taken.item() for name, taken in branches.items()} == counts | {branch: True}


def test_the_logit_of_the_sigmoid_is_the_raw_score_even_where_the_sigmoid_saturates():
    score, _ = switch(torch.tensor([40.0]), torch.tensor([0.0]), torch.tensor([False]))
    assert score.item() == 40.0


def test_each_rule_for_unfinished_answers():
    """Trap 7: an answer without EOS is handled by the rule that was chosen, by name."""
    scores, finished = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert settle_unfinished(scores, finished, "keep", 5.0).tolist() == [2.0, 2.0]
    assert settle_unfinished(scores, finished, "subtract", 5.0).tolist() == [2.0, -3.0]
    assert settle_unfinished(scores, finished, "replace", 5.0).tolist() == [2.0, -5.0]
    assert settle_unfinished(scores, finished, "mask", 5.0).tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="unknown rule 'drop'.*keep, subtract, replace, mask"):
        settle_unfinished(scores, finished, "drop", 5.0)


def test_whitening_is_of_the_raw_score_before_kl():
    """Trap 1: whiten(score), then minus beta * KL; KL moves neither mean nor scale of the score."""
    scores, lengths = torch.tensor([1.0, 3.0]), torch.tensor([1, 2])
    kl = torch.tensor([[0.5, 7.0], [0.25, -0.125]])
    rewards = token_rewards(scores, kl, lengths, beta=0.1)
    expected = [[-1.0 - 0.05, 0.0], [-0.025, 1.0 + 0.0125]]
    assert torch.allclose(rewards, torch.tensor(expected), atol=1e-5)
    louder = token_rewards(scores, 100 * kl, lengths, beta=0.1)
    assert torch.allclose(louder[0, 0] + 5.0, rewards[0, 0] + 0.05, atol=1e-4)


def test_uncounted_answers_take_no_part_in_the_whitening():
    scores, lengths = torch.tensor([1.0, 3.0, 1e4]), torch.tensor([1, 1, 1])
    counted = torch.tensor([True, True, False])
    rewards = token_rewards(scores, torch.zeros(3, 1), lengths, beta=0.1, counted=counted)
    assert rewards[:, 0].tolist() == pytest.approx([-1.0, 1.0, 0.0], abs=1e-5)


def answers(count=3):
    return [Answer([], f"{n}", [1, 5], [n + 3, 2], True, n == 0) for n in range(count)]


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "given",
    [
        [1, 2, 3],
        [1.0, 2.0, 3.0],
        torch.tensor([1.0, 2.0, 3.0]).double(),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        (True, 2, 3),
        np.array([1.0, 2.0, 3.0]),
        [np.float32(1), torch.tensor(2.0), 3],
        Scores([1.0, 2.0, 3.0]),
    ],
    ids=repr,
)
def test_a_reward_is_any_function_that_gives_a_number_for_each_answer(given):
    scores = score_answers(lambda batch: given, answers(), CPU)
    assert scores.raw.dtype == torch.float32 and scores.raw.tolist() == [1.0, 2.0, 3.0]
    assert not scores.parts and not scores.branches


def test_a_reward_may_be_a_generator():
    def reward(batch):
        yield from (float(answer.text) for answer in batch)

    assert score_answers(reward, answers(), CPU).raw.tolist() == [0.0, 1.0, 2.0]


def test_what_a_reward_wants_logged_goes_with_its_scores():
    own = Scores(torch.ones(3), {"length": torch.tensor([1.0, 2.0, 3.0])})
    assert score_answers(lambda batch: own, answers(), CPU).parts["length"].sum() == 6


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "the reward gave 2 scores for 3 answers; it must return one for"),
        (
            torch.ones(2),
            ValueError,
            "scores of shape \\(2,\\) for 3 answers; it must return",
        ),
        (None, ValueError, "the reward gave 'None'; it must return one score for each answer"),
        (3.0, ValueError, "the reward gave '3.0'; it must return one score for each answer"),
        ("123", ValueError, "the reward gave '123'; it must return one score for each answer"),
        ({1: 2}, ValueError, "it must return one score for each answer"),
        ([1.0, None, 2.0], ValueError, "the reward gave .*None.*; it must return one number for"),
        (["1", "2", "3"], ValueError, "it must return one number for each answer"),
        ([1.0, 2j, 3.0], ValueError, "it must return one number for each answer"),
        (itertools.count(), ValueError, "gave more than 3 scores for 3 answers"),
        (Scores([1.0, 2.0]), ValueError, "the reward gave 2 scores for 3 answers"),
        (Scores(torch.ones(3), [1.0]), ValueError, "parts and branches must be dictionaries"),
        (Scores(torch.ones(3), {"a": [1.0]}), ValueError, "the reward's part 'a' gave 1 score for"),
        (Scores(torch.ones(3), {"a": torch.ones(2)}), ValueError, "part 'a' gave .* \\(2,\\)"),
        (Scores(torch.ones(3), {"a": [1, math.nan, 2]}), RuntimeError, "part 'a' gave no finite"),
        (
            Scores(torch.ones(3), {}, {"b": torch.ones(4)}),
            ValueError,
            "'b' gave .* \\(4,\\)",
        ),
        ([[1.0], [2.0], [3.0]], ValueError, "shape \\(3, 1\\) for 3 answers"),
        ([1.0, math.nan, 3.0], RuntimeError, "the reward gave no finite score for 1 of 3 answers"),
        ([1.0, math.inf, -math.inf], RuntimeError, "no finite score for 2 of 3 answers"),
    ],
)
def test_a_reward_that_gives_something_else_is_named(given, error, message):
    with pytest.raises(error, match=message) as raised:
        score_answers(lambda batch: given, answers(), CPU)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


@pytest.mark.parametrize("broken", ["helpfulness", "safety"])
def test_a_reward_model_with_nan_is_named(reward_model, broken):
    bad = Transformer(CONFIG, head="score")
    bad.init_weights(1)
    with torch.no_grad():
        bad.score.weight[0, 0] = math.nan
    models = {"helpfulness": reward_model, "safety": reward_model} | {broken: bad}
    with pytest.raises(RuntimeError, match=f"the {broken} reward model gave no finite score for 3"):
        RewardModels(**models)(answers())


def test_two_reward_models_switch_or_add_and_one_alone_scores_everything(reward_model):
    other = Transformer(CONFIG, head="score")
    other.init_weights(8)
    sequences = [a.prompt_ids + a.ids for a in answers()]
    helpful, safe = score(reward_model, sequences), score(other, sequences)
    switched = RewardModels(reward_model, other, threshold=0.999999)(answers())
    assert torch.equal(switched.raw, safe)  # everything is below it
    assert switched.branches["is_safety"].tolist() == [True, False, False]
    assert torch.equal(
        RewardModels(reward_model, other, combine="sum")(answers()).raw, helpful + safe
    )
    assert torch.equal(RewardModels(reward_model, None)(answers()).raw, helpful)
    assert torch.equal(RewardModels(None, other)(answers()).raw, safe)
    with pytest.raises(ValueError, match="no reward model; name one"):
        RewardModels(None, None)


def test_unwhitened_scores_are_taken_as_they_are():
    rewards = token_rewards(
        torch.tensor([2.0, -3.0]), torch.ones(2, 2), torch.tensor([1, 2]), beta=0.1, whitened=False
    )
    assert torch.allclose(rewards, torch.tensor([[1.9, 0.0], [-0.1, -3.1]]))


def test_a_reward_may_change_what_it_is_given():
    """Prompts are shared by all their answers and by all epochs."""
    given = [Answer([{"role": "user", "content": "red"}], "cup", [1, 5], [7, 2])]

    def spoils(batch):
        for answer in batch:
            answer.messages.append({"role": "assistant", "content": answer.text})
            answer.messages[0]["content"] = "other"
            answer.ids.clear()
            answer.prompt_ids.append(9)
        return [0.0]

    score_answers(spoils, given, CPU)
    assert given == [Answer([{"role": "user", "content": "red"}], "cup", [1, 5], [7, 2])]
