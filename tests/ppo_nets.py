"""Tiny networks, prompts and steps for the tests of PPO."""

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from puna.core import parallel
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.rl import update as ppo
from puna.trainers.rl.config import PPOConfig
from puna.trainers.rl.rewards import Answer, RewardModels, score_answers
from puna.trainers.rl.rollout import collect
from puna.trainers.train import loop
from puna.trainers.train.run import Trained

CONFIG = ModelConfig(16, 2, 2, 1, 24, vocab_size=13, context=40)
EOS = 2
PROMPTS = [[1, 5, 6], [1, 7, EOS, 1, 8], [1, 5, 6, 7, 8, 9, 10], [1, 11, 12, 3]]
SETTINGS = PPOConfig(
    out=Path("unused"),
    policy=Path("unused"),
    prompts=[],
    beta=0.1,
    temperature=0.8,
    unfinished="keep",
    batch=1,
    minibatch=1,
    micro_batch_tokens=1000,
    lr=1e-3,
)


class Nets(NamedTuple):
    """The five networks of PPO."""

    policy: Transformer
    critic: Transformer
    reference: Transformer
    helpfulness: Transformer
    safety: Transformer


def settings(base=SETTINGS, *, minibatches=1, **options):
    """`base` with other options, and so many mini-batches an iteration."""
    return replace(base, batch=minibatches, minibatch=1, **options)


def transformer(head="lm", seed=0):
    made = Transformer(CONFIG, head=head)
    made.init_weights(seed)
    if head == "lm":
        with torch.no_grad():
            made.lm_head.weight.mul_(15)
    return made


def models():
    return Nets(
        policy=transformer(),
        critic=transformer("score", 1),
        reference=transformer(seed=2),
        helpfulness=transformer("score", 3),
        safety=transformer("score", 4),
    )


def sample(policy, prompts, round_index=0, max_new_tokens=8, temperature=0.8):
    return collect(
        policy,
        prompts,
        prompt_ids=range(len(prompts)),
        sample_ids=[0] * len(prompts),
        max_new_tokens=max_new_tokens,
        eos_id=EOS,
        temperature=temperature,
        seed=0,
        round_index=round_index,
    )


def prepare(nets, config=SETTINGS, prompts=PROMPTS, rollout=None, is_safety=None):
    """(scores, experience) of a rollout, the policy's answers to `prompts` where none is given."""
    rollout = rollout or sample(nets.policy, prompts)
    is_safety = is_safety or [False] * len(rollout.answers)
    rows = zip(rollout.prompts, rollout.answers, rollout.finished.tolist(), is_safety, strict=True)
    answers = [Answer([], "", *row) for row in rows]
    reward = RewardModels(nets.helpfulness, nets.safety, max_tokens=config.micro_batch_tokens)
    scores = score_answers(reward, answers, torch.device("cpu"))
    experience = ppo.make_experience(nets.reference, nets.critic, rollout, scores.raw, config)
    return scores, experience


class Trainer:
    """Both trained networks of `nets` with their optimizers, as PPO's own."""

    def __init__(self, nets, rate=1e-3, critic_rate=1e-3):
        self.nets = nets
        self.rates = ppo.Rates(rate, critic_rate)
        self.policy, self.critic = (
            Trained(model, loop.make_optimizer(model, SETTINGS))
            for model in (nets.policy, nets.critic)
        )

    def update(self, experience, config=SETTINGS, *, warm=False):
        rates = self.rates._replace(policy=None) if warm else self.rates
        return ppo.update(self.policy, self.critic, experience, config, rates)


def collected_gradients(nets, experience, config):
    """(policy's, critic's, metrics): gradients of all mini-batches, summed and not stepped on.

    Models are copied so that threads can run.
    """
    nets = copy.deepcopy(nets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step_optimizer", lambda *_: 0.0)
        metrics = Trainer(nets).update(experience, config)
    return gradients(nets.policy), gradients(nets.critic), metrics


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def on_ranks(count, function):
    """Run function(rank) on threads that exchange numbers as ranks would; returns the results."""
    barrier, shared, results = threading.Barrier(count), [None] * count, [None] * count
    mine = threading.local()

    def exchange(value):
        shared[mine.rank] = value
        barrier.wait()
        everything = list(shared)
        barrier.wait()
        return everything

    def work(rank):
        mine.rank = rank
        results[rank] = function(rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "all_sum", lambda x: torch.stack(exchange(x)).sum(0))
        patch.setattr(parallel, "all_max", lambda n: max(exchange(n)))
        patch.setattr(loop, "step_optimizer", lambda *_: 0.0)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results
