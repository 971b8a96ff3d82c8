"""Run: python -m pytest tests/test_ppo_traps.py -q

The other seven of the fifteen things that go wrong in PPO, and a run that learns.
"""

import copy

import pytest
import torch
from ppo_nets import (
    CONFIG,
    PROMPTS,
    SETTINGS,
    gradients,
    models,
    on_ranks,
    prepare,
    sample,
    stepper,
    transformer,
)
from torch import nn

from puna.core.model import Transformer
from puna.trainers.rl import update as ppo_step
from puna.trainers.rl.losses import k1, k3
from puna.trainers.rl.packed import one_rank
from puna.trainers.rl.rollout import answer_logprobs
from puna.trainers.rl.update import (
    Models,
    make_experience,
    rollout_metrics,
    score_answers,
    update,
)


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
    metrics = update(nets, experience, SETTINGS, stepper(nets.critic), stepper(nets.policy))
    assert all(torch.isfinite(torch.tensor(list(metrics.values()))))


def test_trap_10_k1_is_in_the_reward_and_k3_is_logged_beside_it():
    nets = models()
    scores, experience = prepare(nets, SETTINGS._replace(lam=1.0), prompts=PROMPTS * 4)
    rollout = experience.rollout
    single = k1(rollout.logprobs, experience.ref_logprobs)[rollout.mask]
    assert (single < 0).any() and (single > 0).any()
    zero_beta = prepare(nets, SETTINGS._replace(lam=1.0, beta=0.0), rollout=rollout)[1]
    difference = zero_beta.returns[:, 0] - experience.returns[:, 0]
    kl = k1(rollout.logprobs, experience.ref_logprobs).sum(1)
    assert torch.allclose(difference, 0.1 * kl, atol=1e-4)
    metrics = rollout_metrics(experience, scores, SETTINGS.all_sum)
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
    update(nets, experience, SETTINGS, stepper(nets.critic), None)
    state = nets.critic.state_dict()
    assert any(not torch.equal(state[k], v) for k, v in before.critic.state_dict().items())
    for name in ("policy", "helpfulness", "safety", "reference"):  # warm-up: not the policy either
        state = getattr(nets, name).state_dict()
        assert all(torch.equal(state[k], v) for k, v in getattr(before, name).state_dict().items())


def test_trap_12_warming_up_the_critic_lowers_its_loss():
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 4)
    settings = SETTINGS._replace(value_clip=None)
    step = stepper(nets.critic, 1e-2)
    losses = [update(nets, experience, settings, step, None)["value_loss"] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


def test_trap_13_every_step_goes_through_the_clipping_step():
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 2)
    calls = []
    settings = SETTINGS._replace(minibatches=4, ratio_tolerance=9.0)
    update(
        nets, experience, settings,
        lambda: calls.append("critic") or 0.0, lambda: calls.append("policy") or 0.0,
    )  # fmt: skip
    assert calls == ["critic", "policy"] * 4


def collected_gradients(nets, experience, settings):
    """Gradients of the first mini-batches, summed; models are copied so that threads can run."""
    nets = copy.deepcopy(nets)
    metrics = update(nets, experience, settings, lambda: 0.0, lambda: 0.0)
    return gradients(nets.policy), gradients(nets.critic), metrics


@pytest.mark.parametrize("max_tokens", [1, 30])
def test_trap_14_the_micro_batch_size_changes_nothing(max_tokens):
    nets = models()
    _, experience = prepare(nets, prompts=PROMPTS * 2)
    settings = SETTINGS._replace(minibatches=2)
    whole = collected_gradients(nets, experience, settings)
    parts = collected_gradients(nets, experience, settings._replace(max_tokens=max_tokens))
    for a, b in zip(whole[:2], parts[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert whole[2] == pytest.approx(parts[2], abs=1e-5)


@pytest.mark.parametrize("max_tokens", [1000, 25])
def test_trap_14_the_number_of_ranks_changes_nothing(max_tokens):
    """Ranks with different token counts; their gradients add up to those of one process."""
    nets = models()
    _, whole = prepare(nets, prompts=PROMPTS * 2)
    settings = SETTINGS._replace(minibatches=2, max_tokens=max_tokens)
    expected = collected_gradients(nets, whole, settings)

    def part(rank, all_sum, all_max):
        rows = [m * 4 + i for m in range(2) for i in (range(1) if rank == 0 else range(1, 4))]
        mine = settings._replace(all_sum=all_sum, all_max=all_max)
        return collected_gradients(nets, whole.select(rows), mine)

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
    update(nets, experience, SETTINGS, stepper(nets.critic), stepper(nets.policy))
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
    nets = Models(
        policy, transformer("score", 1), copy.deepcopy(policy), counting_reward_model(7), safe
    )
    settings = SETTINGS._replace(beta=0.01, minibatches=2, temperature=1.0)
    steps = stepper(nets.critic, 1e-2), stepper(policy, 1e-2)
    history = []
    for iteration in range(20):
        rollout = sample(policy, PROMPTS * 16, iteration, max_new_tokens=6, temperature=1.0)
        scores, experience = prepare(nets, settings, rollout=rollout)
        metrics = rollout_metrics(experience, scores, one_sum)
        history.append((metrics["reward_helpfulness"], metrics["kl"]))
        update(nets, experience, settings, *steps)
    assert history[-1][0] > history[0][0] + 1.0
    assert abs(history[0][1]) < 1e-3 < history[-1][1]
    answers = [token for answer in rollout.answers for token in answer]
    assert answers.count(7) > 0.6 * len(answers)


def one_sum(x):
    return x


def test_metrics_count_the_branches_of_the_switch():
    nets = models()
    rollout = sample(nets.policy, PROMPTS)
    tagged = torch.tensor([True, False, False, True])
    scores = score_answers(nets, rollout, tagged, SETTINGS)
    experience = make_experience(nets, rollout, scores, SETTINGS)
    metrics = rollout_metrics(experience, scores, one_sum)
    assert metrics["branch_is_safety"] == 2
    names = ("is_safety", "unsafe", "helpfulness")
    assert sum(metrics[f"branch_{name}"] for name in names) == 4
    assert one_rank(3) == 3
