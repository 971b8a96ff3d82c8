"""Run: python -m pytest tests/test_ppo_traps.py -q

The other seven of the fifteen things that go wrong in PPO, and a run that learns.
"""

import copy

import pytest
import torch
from ppo_nets import (
    CONFIG,
    PROMPTS,
    Nets,
    Trainer,
    collected_gradients,
    models,
    on_ranks,
    prepare,
    sample,
    settings,
    transformer,
)
from torch import nn

from puna.core.model import Transformer
from puna.trainers.rl import update as ppo_step
from puna.trainers.rl.losses import k1, k3
from puna.trainers.rl.rollout import answer_logprobs
from puna.trainers.rl.update import rollout_metrics
from puna.trainers.train import loop


def test_trap_09_nothing_past_an_answers_end_reaches_the_losses(monkeypatch):
    nets = models()
    clean_scores, clean = prepare(nets)

    def poisoned(function):
        def wrapper(model, rollout, **options):
            out = function(model, rollout, **options)
            first = out[0] if isinstance(out, tuple) else out
            first[~rollout.mask] = float("nan")
            return out

        return wrapper

    for name in ("answer_logprobs", "answer_values"):
        monkeypatch.setattr(ppo_step, name, poisoned(getattr(ppo_step, name)))
    scores, experience = prepare(nets)
    assert torch.equal(experience.advantages, clean.advantages)
    assert torch.equal(experience.returns, clean.returns)
    metrics = Trainer(nets).update(experience)
    assert all(torch.isfinite(torch.tensor(list(metrics.values()))))


def test_trap_10_k1_is_in_the_reward_and_k3_is_logged_beside_it():
    nets = models()
    scores, experience = prepare(nets, settings(lam=1.0), prompts=PROMPTS * 4)
    rollout = experience.rollout
    single = k1(rollout.logprobs, experience.ref_logprobs)[rollout.mask]
    assert (single < 0).any() and (single > 0).any()
    zero_beta = prepare(nets, settings(lam=1.0, beta=0.0), rollout=rollout)[1]
    difference = zero_beta.returns[:, 0] - experience.returns[:, 0]
    kl = k1(rollout.logprobs, experience.ref_logprobs).sum(1)
    assert torch.allclose(difference, 0.1 * kl, atol=1e-4)
    metrics = rollout_metrics(experience, scores, nets.policy)
    expected = k3(rollout.logprobs, experience.ref_logprobs)[rollout.mask].mean().item()
    assert metrics["kl_token_k3"] == pytest.approx(expected, abs=1e-5) and expected >= 0
    assert metrics["kl"] == pytest.approx(kl.mean().item(), abs=1e-4)


def test_trap_11_an_answers_numbers_do_not_depend_on_its_neighbours():
    nets = models()
    rollout = sample(nets.policy, PROMPTS)
    _, together = prepare(nets, rollout=rollout)
    for row in range(len(PROMPTS)):
        _, alone = prepare(nets, rollout=rollout.select([row]))
        length = len(rollout.answers[row])
        for name in ("ref_logprobs", "values"):
            both = (getattr(together, name)[row], getattr(alone, name)[0])
            assert torch.allclose(both[0][:length], both[1][:length], atol=1e-5)


def test_trap_12_the_critic_learns_and_no_reward_model_moves():
    nets = models()
    before = copy.deepcopy(nets)
    _, experience = prepare(nets)
    Trainer(nets).update(experience, warm=True)
    state = nets.critic.state_dict()
    assert any(not torch.equal(state[k], v) for k, v in before.critic.state_dict().items())
    for name in ("policy", "helpfulness", "safety", "reference"):  # warm-up: not the policy either
        state = getattr(nets, name).state_dict()
        assert all(torch.equal(state[k], v) for k, v in getattr(before, name).state_dict().items())


def test_trap_12_warming_up_the_critic_lowers_its_loss():
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 4)
    config, trainer = settings(value_clip=None), Trainer(nets, critic_rate=1e-2)
    losses = [trainer.update(experience, config, warm=True)["value_loss"] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def test_trap_13_every_step_goes_through_the_clipping_step(monkeypatch):
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 2)
    calls = []

    def step(network, rate, clip):
        calls.append(("critic" if network.model is nets.critic else "policy", rate, clip))
        return 0.0

    monkeypatch.setattr(loop, "step_optimizer", step)
    trainer = Trainer(nets, 0.02, 0.03)
    trainer.update(experience, settings(minibatches=4, ratio_tolerance=9.0, clip=0.7))
    assert calls == [("critic", 0.03, 0.7), ("policy", 0.02, 0.7)] * 4


@pytest.mark.parametrize("max_tokens", [1, 30])
def test_trap_14_the_micro_batch_size_changes_nothing(max_tokens):
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 2)
    config = settings(minibatches=2)
    whole = collected_gradients(nets, experience, config)
    small = settings(minibatches=2, micro_batch_tokens=max_tokens)
    parts = collected_gradients(nets, experience, small)
    for a, b in zip(whole[:2], parts[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert whole[2] == pytest.approx(parts[2], abs=1e-5)


@pytest.mark.parametrize("max_tokens", [1000, 25])
def test_trap_14_the_number_of_ranks_changes_nothing(max_tokens):
    """Ranks with different token counts; their gradients add up to those of one process."""
    nets = models()
    _, whole = prepare(nets, prompts=PROMPTS * 2)
    config = settings(minibatches=2, micro_batch_tokens=max_tokens)
    expected = collected_gradients(nets, whole, config)

    def part(rank):
        rows = [m * 4 + i for m in range(2) for i in (range(1) if rank == 0 else range(1, 4))]
        return collected_gradients(nets, whole.select(rows), config)

    ranks = on_ranks(2, part)
    for i in range(2):
        assert torch.allclose(ranks[0][i] + ranks[1][i], expected[i], atol=1e-5)
    assert ranks[0][2] == ranks[1][2]
    assert ranks[0][2] == pytest.approx(expected[2], abs=1e-5)


def test_trap_15_fp32_no_dropout_frozen_reference_and_the_very_ids_drawn(monkeypatch):
    nets = models()
    assert not any(isinstance(m, nn.Dropout) for m in nets.policy.modules())
    seen = []
    forward = Transformer.forward

    def watched(self, tokens, *args, **options):
        seen.append(tokens.flatten().tolist())
        return forward(self, tokens, *args, **options)

    rollout = sample(nets.policy, PROMPTS)
    monkeypatch.setattr(Transformer, "forward", watched)
    _, experience = prepare(nets, rollout=rollout)
    Trainer(nets).update(experience)
    flat = [token for sequence in rollout.sequences for token in sequence]
    assert seen == [flat] * 6  # two reward models, reference, values, and one training pass each
    for name in ("reference", "helpfulness", "safety"):
        assert all(p.grad is None for p in getattr(nets, name).parameters())
    half = copy.deepcopy(nets.policy).bfloat16()
    low, entropy = answer_logprobs(half, rollout, temperature=0.8, max_tokens=99)
    assert low.dtype == entropy.dtype == torch.float32


def counting_reward_model(token):
    """A reward model by hand: its score grows with the share of `token` in the dialogue.

    Embeddings are unit vectors, attention is uniform (q = k = 0) and copies the channel of
    `token` into channel 15, which the head reads.
    """
    model = Transformer(CONFIG, head="score")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.model.embed_tokens.weight[torch.arange(13), torch.arange(13)] = 1.0
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, token] = 1.0
        attention.o_proj.weight[15, 0] = 1.0
        for block in model.model.layers:
            block.input_layernorm.weight.fill_(1.0)
            block.post_attention_layernorm.weight.fill_(1.0)
        model.score.weight[0, 15] = 1.0
    return model


def test_ppo_learns_to_say_what_is_rewarded():
    policy = transformer()
    safe = transformer("score", 4)
    nn.init.zeros_(safe.score.weight)  # sigma(0) = 0.5: never below the threshold
    nets = Nets(
        policy, transformer("score", 1), copy.deepcopy(policy), counting_reward_model(7), safe
    )
    config = settings(beta=0.01, minibatches=2, temperature=1.0)
    trainer = Trainer(nets, 1e-2, 1e-2)
    history = []
    for iteration in range(20):
        rollout = sample(policy, PROMPTS * 16, iteration, max_new_tokens=6, temperature=1.0)
        scores, experience = prepare(nets, config, rollout=rollout)
        metrics = rollout_metrics(experience, scores, nets.policy)
        history.append((metrics["reward_helpfulness"], metrics["kl"]))
        trainer.update(experience, config)
    assert history[-1][0] > history[0][0] + 1.0
    assert abs(history[0][1]) < 1e-3 < history[-1][1]
    answers = [token for answer in rollout.answers for token in answer]
    assert answers.count(7) > 0.6 * len(answers)


def test_metrics_count_the_branches_of_the_switch():
    nets = models()
    rollout = sample(nets.policy, PROMPTS)
    scores, experience = prepare(nets, rollout=rollout, is_safety=[True, False, False, True])
    metrics = rollout_metrics(experience, scores, nets.policy)
    assert metrics["branch_is_safety"] == 2
    names = ("is_safety", "unsafe", "helpfulness")
    assert sum(metrics[f"branch_{name}"] for name in names) == 4


def test_approx_kl_is_that_of_the_new_policy_from_the_one_that_sampled():
    """Against the exact KL(old || new) over the whole vocabulary, in fp64."""
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 64)
    old, trainer = copy.deepcopy(nets.policy), Trainer(nets, 3e-3)
    assert trainer.update(experience)["approx_kl"] < 1e-6  # one mini-batch: measured before it
    again = settings(ratio_tolerance=9.0)
    new = copy.deepcopy(nets.policy)
    estimate = trainer.update(experience, again)["approx_kl"]
    assert estimate > 1e-5
    assert estimate == pytest.approx(exact_kl(old, new, experience.rollout), rel=0.3)


@torch.no_grad()
def exact_kl(old, new, rollout):
    total, count = 0.0, 0
    for prompt, answer in zip(rollout.prompts, rollout.answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        p, q = (
            torch.log_softmax(m.logits(m(tokens))[0, len(prompt) - 1 : -1].double() / 0.8, -1)
            for m in (old, new)
        )
        total += (p.exp() * (p - q)).sum().item()
        count += len(answer)
    return total / count
