"""Run: python -m pytest tests/test_rollout.py -q"""

from contextlib import contextmanager

import pytest
import torch

from puna.core import parallel
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.rl.rollout import (
    answer_logprobs,
    answer_mask,
    answer_states,
    answer_values,
    collect,
    pad_answers,
)

CONFIG = ModelConfig(16, 2, 2, 1, 24, vocab_size=13, context=40)
EOS = 2
PROMPTS = [[1, 5, 6], [1, 7], [1, 5, 6, 7, 8, 9, 10], [1, 11, 12, 3], [1, 4]]


def model(head="lm", seed=0):
    made = Transformer(CONFIG, head=head)
    made.init_weights(seed)
    if head == "lm":
        with torch.no_grad():
            made.lm_head.weight.mul_(15)  # far from uniform: mistakes show
    return made


def sample(policy, prompts=PROMPTS, **options):
    settings = {
        "prompt_ids": range(len(prompts)),
        "sample_ids": [0] * len(prompts),
        "max_new_tokens": 9,
        "eos_id": EOS,
        "temperature": 0.8,
        "seed": 5,
        "round_index": 2,
    }
    return collect(policy, prompts, **(settings | options))


def reference_logprobs(policy, prompt, answer, temperature):
    """One sequence at a time, no packing: fp64 log-softmax of the tempered logits."""
    hidden = policy(torch.tensor([prompt + answer]))[0]
    logits = (hidden @ policy.lm_head.weight.T).double() / temperature
    table = logits.log_softmax(-1)
    return [table[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)], table


def test_ids_and_logprobs_are_kept_as_they_were_drawn():
    policy = model()
    rollout = sample(policy)
    assert rollout.prompts == PROMPTS
    assert rollout.lengths.tolist() == [len(a) for a in rollout.answers]
    assert rollout.finished.tolist() == [a[-1] == EOS for a in rollout.answers]
    assert (rollout.logprobs[~rollout.mask] == 0).all() and (rollout.logprobs <= 0).all()
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(zip(PROMPTS, rollout.answers, strict=True)):
            expected, _ = reference_logprobs(policy, prompt, answer, 0.8)
            got = rollout.logprobs[row, : len(answer)].tolist()
            assert got == pytest.approx(expected, abs=1e-4)


def test_behaviour_and_new_logprobs_share_the_temperature():
    """Trap 4: recomputed at the sampling temperature they are the drawn ones, else they are not."""
    policy = model()
    rollout = sample(policy)
    same, entropy = answer_logprobs(policy, rollout, temperature=0.8, max_tokens=20)
    assert torch.allclose(same, rollout.logprobs, atol=1e-4)
    other, _ = answer_logprobs(policy, rollout, temperature=1.0, max_tokens=20)
    assert (other - rollout.logprobs).abs().max() > 0.01
    assert (entropy[rollout.mask] >= 0).all()
    assert (entropy <= torch.log(torch.tensor(13.0)) + 1e-5).all()
    assert (entropy[~rollout.mask] == 0).all()


def test_rollouts_cut_nothing_off_the_distribution():
    """Trap 4: over many draws even the least likely tokens appear: no top-k, no top-p."""
    policy = model()
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.4)
    count = 600
    rollout = sample(
        policy, [[1, 5]] * count, prompt_ids=range(count), sample_ids=[0] * count,
        max_new_tokens=1, temperature=1.0,
    )  # fmt: skip
    drawn = torch.bincount(torch.tensor([a[0] for a in rollout.answers]), minlength=13) / count
    with torch.no_grad():
        _, table = reference_logprobs(policy, [1, 5], [0], 1.0)
    expected = table[1].exp().float()
    assert (drawn - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    assert (drawn[expected > 0.02] > 0).all()


def test_micro_batch_size_and_packing_change_nothing(monkeypatch):
    """Trap 11: packed without padding, each answer sees its own prompt and positions only."""
    policy, critic = model(), model("score", 1)
    rollout = sample(policy)
    whole = answer_logprobs(policy, rollout, temperature=0.8, max_tokens=1000)[0]
    values = answer_values(critic, rollout, max_tokens=1000)
    for max_tokens in (1, 12, 30):
        part = answer_logprobs(policy, rollout, temperature=0.8, max_tokens=max_tokens)[0]
        assert torch.allclose(part, whole, atol=1e-5)
        assert torch.allclose(
            answer_values(critic, rollout, max_tokens=max_tokens), values, atol=1e-5
        )
    monkeypatch.setattr(parallel, "all_max", lambda n: n + 3)
    padded = answer_logprobs(policy, rollout, temperature=0.8, max_tokens=12)[0]
    assert torch.allclose(padded, whole, atol=1e-5)


def test_values_are_of_the_state_before_each_answer_token():
    critic = model("score", 1)
    rollout = sample(model())
    values = answer_values(critic, rollout, max_tokens=50)
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(zip(PROMPTS, rollout.answers, strict=True)):
            hidden = critic(torch.tensor([prompt + answer]))[0]
            expected = (hidden @ critic.score.weight[0])[len(prompt) - 1 : -1]
            assert torch.allclose(values[row, : len(answer)], expected, atol=1e-5)
    assert (values[~rollout.mask] == 0).all()


def test_gradients_flow_through_the_packed_pass():
    policy = model()
    rollout = sample(policy)
    for _, hidden, _ in answer_states(policy, rollout, max_tokens=20):
        hidden.sum().backward()
    assert policy.model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_prompt_sampled_k_times_gets_k_answers_and_order_does_not_matter():
    policy = model()
    prompts = [[1, 7]] * 3 + [[1, 5]] * 3
    ids = {"prompt_ids": [0] * 3 + [1] * 3, "sample_ids": [0, 1, 2] * 2}
    first = sample(policy, prompts, temperature=2.0, **ids)
    assert len({tuple(a) for a in first.answers[:3]}) > 1
    order = [4, 0, 5, 2, 1, 3]
    shuffled = {name: [numbers[i] for i in order] for name, numbers in ids.items()}
    second = sample(policy, [prompts[i] for i in order], temperature=2.0, batch_size=2, **shuffled)
    assert second.answers == [first.answers[i] for i in order]
    later = sample(policy, prompts, temperature=2.0, round_index=3, **ids)
    assert later.answers != first.answers


def test_select_keeps_rows_together():
    rollout = sample(model())
    part = rollout.select([3, 1])
    assert part.sequences == [rollout.sequences[3], rollout.sequences[1]]
    assert torch.equal(part.logprobs, rollout.logprobs[[3, 1]])
    assert part.mask.shape[1] == rollout.logprobs.shape[1]


def test_weights_are_gathered_once_for_a_whole_rollout(monkeypatch):
    """Paper section 3.2.3: generation runs on the gathered model, whatever the batches."""
    entered = []

    @contextmanager
    def gathered(policy):
        entered.append(policy)
        yield whole

    policy, whole = model(seed=8), model()
    expected = sample(whole, batch_size=1)
    monkeypatch.setattr(parallel, "gathered", gathered)
    assert sample(policy, batch_size=1).answers == expected.answers
    assert entered == [policy]


def test_a_rank_without_prompts_has_an_empty_rollout(monkeypatch):
    rollout = sample(model(), [])
    assert rollout.sequences == [] and rollout.logprobs.shape == (0, 0)
    monkeypatch.setattr(parallel, "all_max", lambda n: n + 1)
    values = answer_values(model("score"), rollout, max_tokens=9)
    assert values.shape == (0, 0)


def test_greedy_and_empty_rollouts_are_refused():
    with pytest.raises(ValueError, match="temperature is 0; rollouts are sampled"):
        sample(model(), temperature=0)
    with pytest.raises(ValueError, match="empty prompt"):
        sample(model(), [[]])


def test_pad_answers_lays_flat_tokens_in_rows():
    lengths = torch.tensor([2, 0, 1])
    padded = pad_answers(torch.tensor([1.0, 2.0, 3.0]), lengths, 3)
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert answer_mask(lengths, 3).sum().item() == 3
