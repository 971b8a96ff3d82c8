"""Run: python -m pytest tests/test_ppo_step.py -q

The first eight of the fifteen things that go wrong in PPO, each by its number.
"""

import pytest
import torch
from ppo_nets import (
    EOS,
    PROMPTS,
    Trainer,
    collected_gradients,
    models,
    on_ranks,
    prepare,
    sample,
    settings,
    transformer,
)

from puna.core.ops import gae
from puna.core.packed import score
from puna.trainers.rl.rewards import token_rewards
from puna.trainers.rl.rollout import Rollout, answer_logprobs
from puna.trainers.rl.update import check_first_ratio


def test_trap_01_the_raw_score_is_whitened_over_the_batch_before_kl():
    nets = models()
    scores, experience = prepare(nets, settings(gamma=1.0, lam=1.0))
    rollout = experience.rollout
    total = experience.returns[:, 0]  # gamma = lambda = 1: the sum of an answer's rewards
    kl = (rollout.logprobs - experience.ref_logprobs).sum(1)
    whitened = total + 0.1 * kl
    raw = scores.raw
    assert torch.allclose(whitened, (raw - raw.mean()) / raw.std(correction=0), atol=1e-4)


def test_trap_02_advantage_whitening_is_masked_and_global_over_ranks():
    nets = models()
    prompts = PROMPTS * 2
    _, whole = prepare(nets, prompts=prompts)
    kept = whole.advantages[whole.counted]
    assert abs(kept.mean().item()) < 1e-5
    assert kept.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    assert (whole.advantages[~whole.counted] == 0).all()

    def part(rank):
        return prepare(nets, rollout=whole.rollout.select(range(rank, 8, 2)))[1]

    parts = on_ranks(2, part)
    for rank, experience in enumerate(parts):
        assert torch.allclose(experience.advantages, whole.advantages[rank::2], atol=1e-4)


def test_trap_02_a_single_token_does_not_divide_by_nothing():
    nets = models()
    rollout = sample(nets.policy, PROMPTS[:1], max_new_tokens=1)
    _, experience = prepare(nets, rollout=rollout)
    assert experience.counted.sum() == 1
    assert torch.isfinite(experience.advantages).all()
    metrics = Trainer(nets).update(experience)
    assert all(torch.isfinite(torch.tensor(list(metrics.values()))))


def test_trap_03_the_first_mini_batch_has_ratio_one():
    nets = models()
    _, experience = prepare(nets)
    metrics = Trainer(nets).update(experience)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["clip_fraction"] == 0.0
    with pytest.raises(AssertionError, match="sampling and training disagree"):  # one step later
        Trainer(nets).update(experience)
    check_first_ratio(torch.tensor([-1.0]), torch.tensor([-1.0004]), 1e-3)


def test_trap_03_only_the_first_mini_batch_is_held_to_ratio_one():
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 2)
    metrics = Trainer(nets, 0.02).update(experience, settings(minibatches=4))
    assert metrics["ratio"] != pytest.approx(1.0, abs=1e-3)


def test_trap_04_all_logprobs_are_of_the_sampling_temperature():
    nets = models()._replace(reference=transformer())  # the policy itself: KL must be 0
    scores, experience = prepare(nets)
    assert torch.allclose(experience.rollout.logprobs, experience.ref_logprobs, atol=1e-4)
    with pytest.raises(AssertionError, match="sampling and training disagree"):
        Trainer(nets).update(experience, settings(temperature=1.0))


def test_trap_05_padding_is_not_eos_and_eos_is_not_the_end():
    """A prompt of several turns holds EOS, an answer may hold id 0: only lengths count."""
    nets = models()
    answers = [[0, 0, 4], [3, EOS], [0], [9, 9, 9, 9]]
    lengths = torch.tensor([len(a) for a in answers])
    blank = Rollout(PROMPTS, answers, lengths, torch.zeros(4, 4), lengths == 2)
    drawn, _ = answer_logprobs(nets.policy, blank, temperature=0.8, max_tokens=99)
    rollout = blank._replace(logprobs=drawn)
    scores, experience = prepare(nets, rollout=rollout)
    assert experience.counted.sum(1).tolist() == [3, 2, 1, 4]
    for row, sequence in enumerate(rollout.sequences):
        assert score(nets.helpfulness, [sequence]).item() == pytest.approx(
            scores.parts["helpfulness"][row].item(), abs=1e-5
        )


def test_trap_06_the_reward_is_read_at_the_last_real_token():
    nets = models()
    scores, experience = prepare(nets)
    for row, sequence in enumerate(experience.rollout.sequences):
        hidden = nets.helpfulness(torch.tensor([sequence]))[0, len(sequence) - 1]
        expected = (hidden @ nets.helpfulness.score.weight[0]).item()
        assert scores.parts["helpfulness"][row].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rule", ["keep", "subtract", "replace", "mask"])
def test_trap_07_unfinished_answers_follow_the_rule_chosen(rule):
    nets = models()
    config = settings(unfinished=rule, unfinished_penalty=3.0, beta=0.0, lam=1.0)
    rollout = sample(nets.policy, PROMPTS * 3)
    finished = rollout.finished
    assert 0 < finished.sum() < len(finished)
    scores, experience = prepare(nets, config, rollout=rollout)
    raw = scores.raw
    settled = {
        "keep": raw,
        "subtract": torch.where(finished, raw, raw - 3),
        "replace": torch.where(finished, raw, torch.tensor(-3.0)),
        "mask": raw,
    }[rule]
    assert torch.equal(experience.scores, settled)
    counted = finished if rule == "mask" else torch.ones_like(finished)
    mean, std = settled[counted].mean(), settled[counted].std(correction=0)
    expected = (settled - mean) / std
    assert torch.allclose(experience.returns[counted, 0], expected[counted], atol=1e-4)
    assert bool(experience.counted[~finished].any()) is (rule != "mask")


def test_trap_07_masked_answers_have_no_gradient():
    nets = models()
    config = settings(unfinished="mask")
    rollout = sample(nets.policy, PROMPTS * 3)
    rows = [i for i, done in enumerate(rollout.finished.tolist()) if done]
    whole, finished = (
        collected_gradients(nets, prepare(nets, config, rollout=kept)[1], config)
        for kept in (rollout, rollout.select(rows))
    )
    for name in (0, 1):  # policy, critic
        assert torch.allclose(whole[name], finished[name], atol=1e-5)


def test_trap_08_with_gamma_and_lambda_one_the_returns_telescope():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 5])
    kl, values = torch.randn(3, 5), torch.randn(3, 5)
    rewards = token_rewards(torch.tensor([2.0, 0.0, -2.0]), kl, lengths, beta=0.1)
    advantages, returns = gae(rewards, values, lengths, gamma=1.0, lam=1.0)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            terminal = [2.0, 0.0, -2.0][row] / (8 / 3) ** 0.5
            expected = terminal - 0.1 * kl[row, t:length].sum().item()
            assert returns[row, t].item() == pytest.approx(expected, abs=1e-4)
            assert advantages[row, t].item() == pytest.approx(
                expected - values[row, t].item(), abs=1e-4
            )
