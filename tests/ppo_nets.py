"""Tiny networks, prompts and steps for the tests of PPO."""

import threading

import torch
from torch import nn

from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.trainers.rl.rollout import collect
from puna.trainers.rl.update import (
    Models,
    Settings,
    make_experience,
    score_answers,
)

CONFIG = ModelConfig(16, 2, 2, 1, 24, vocab_size=13, context=40)
EOS = 2
PROMPTS = [[1, 5, 6], [1, 7, EOS, 1, 8], [1, 5, 6, 7, 8, 9, 10], [1, 11, 12, 3]]
SETTINGS = Settings(
    beta=0.1,
    gamma=1.0,
    lam=0.95,
    clip=0.2,
    value_clip=0.2,
    temperature=0.8,
    unfinished="keep",
    unfinished_penalty=1.0,
    minibatches=1,
    ratio_tolerance=1e-3,
    max_tokens=1000,
)


def transformer(head="lm", seed=0):
    made = Transformer(CONFIG, head=head)
    made.init_weights(seed)
    if head == "lm":
        with torch.no_grad():
            made.lm_head.weight.mul_(15)
    return made


def models():
    return Models(
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


def prepare(nets, settings=SETTINGS, prompts=PROMPTS, rollout=None):
    rollout = rollout or sample(nets.policy, prompts)
    tagged = torch.zeros(len(rollout.answers), dtype=torch.bool)
    scores = score_answers(nets, rollout, tagged, settings)
    return scores, make_experience(nets, rollout, scores, settings)


def stepper(model, rate=1e-3):
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), eps=1e-5)

    def step():
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return step


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def on_ranks(count, function):
    """Run function(rank, all_sum, all_max) on threads that exchange tensors as ranks would."""
    barrier, shared, results = threading.Barrier(count), [None] * count, [None] * count

    def exchange(rank, value):
        shared[rank] = value
        barrier.wait()
        everything = list(shared)
        barrier.wait()
        return everything

    def work(rank):
        results[rank] = function(
            rank,
            lambda x: torch.stack(exchange(rank, x)).sum(0),
            lambda n: max(exchange(rank, n)),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
