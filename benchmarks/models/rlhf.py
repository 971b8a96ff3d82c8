"""One iteration of PPO, by the trainer's own functions: where its time goes.

Sampling (`collect`), scoring by two reward models (`score_answers`), reference (log-probs of the
reference model, the critic's values, advantages: `make_experience`) and update (one pass of
gradient steps over policy and critic: `update`), on random weights, in which hardly an answer ends
early: all are as long as they may be. A part's rate is the answers' tokens over its seconds, its
`share` that of the iteration's; the limit is what the parts' matrix products (sampling: reading)
allow at the measured rates. `error` is how far, in the mean, a log-prob as it was drawn is from
what the trainer finds for the same token: PPO's first ratio is e to that. Beyond what the trainer
itself allows nothing is timed.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from puna.benchmarks import budget
from puna.benchmarks.machine import matmul_rate, read_rate
from puna.benchmarks.models.generate import limit
from puna.benchmarks.models.shapes import (
    DTYPES,
    Ceilings,
    Shape,
    finishing_parameters,
    multiplied_parameters,
    source_of,
)
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import finish, peak_mb, summarise
from puna.core.config import ModelConfig, parameter_count
from puna.core.errors import UserError
from puna.core.generation.kv_cache import room, rows_within
from puna.core.model import Transformer
from puna.trainers.ppo import learning_rates, trained
from puna.trainers.rl.config import PPOConfig
from puna.trainers.rl.rewards import Answer, Reward, RewardModels, score_answers
from puna.trainers.rl.rollout import Rollout, answer_logprobs, collect
from puna.trainers.rl.update import RATIO_TOLERANCE, make_experience, update
from puna.trainers.train import loop
from puna.trainers.train.run import Trained

PARTS = ("sampling", "scoring", "reference", "update")
EOS = 2


class Sizes(NamedTuple):
    """Of an iteration."""

    batch: int  # answers
    minibatch: int  # of them in a gradient step
    prompt: int  # tokens
    new: int  # tokens of an answer


CPU, GPU, DRY = Sizes(16, 8, 16, 48), Sizes(512, 64, 256, 256), Sizes(4, 2, 4, 6)
# A parameter: policy and critic with gradients and AdamW's state; reference, two reward models and
# the gathered copy that samples, in bf16.
BYTES = 2 * 16 + 4 * 2
# Of these, what an iteration's sampling finds in memory and the opened networks have not yet:
# AdamW's state, and the copy that samples. (Gradients have gone by then.)
STILL = 2 * 8 + 2


class Networks(NamedTuple):
    config: PPOConfig
    policy: Trained
    critic: Trained
    reference: Transformer
    reward: Reward
    prompts: list[list[int]]


def bench_rlhf(
    shape: Shape, device: torch.device, dtype: str, rounds: int, *, gpu: bool
) -> list[Row]:
    """A row a part, and one of the whole iteration. UserError where sampling and training disagree
    about the policy."""
    sizes = DRY if shape.tiny else GPU if gpu else CPU
    sizes = fitting(sizes, shape.config.context)
    networks = open_networks(shape, device, dtype, sizes)
    error = difference(networks)
    peak = peak_mb(lambda: list(iteration(networks, 0)), device)  # and warm afterwards
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    for number in range(1, rounds + 1):
        for name, elapsed in timed(networks, number, device).items():
            seconds[name].append(elapsed)
        if budget.is_spent():
            break
    whole = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    tokens = sizes.batch * sizes.new
    matmul = matmul_rate(device, DTYPES[dtype], dry=shape.tiny)
    at_once = side_by_side(networks.config, shape.config, sizes, DTYPES[dtype])
    limits = least_seconds(shape.config, sizes, at_once, device, dtype, matmul)
    limits["iteration"] = sum(limits.values())
    found = []
    for name, took in {"iteration": whole, **seconds}.items():
        work = Work("rlhf", str(shape), sizes.batch, tokens, tokens / limits[name], dtype, name)
        found.append(row(work, "puna", summarise(took), error, peak))
        if name != "iteration":
            found[-1]["share"] = sum(took) / sum(whole)
    return found


def fitting(sizes: Sizes, context: int) -> Sizes:
    """Prompts and answers no longer than half of the context each."""
    half = context // 2
    return sizes._replace(prompt=min(sizes.prompt, half), new=min(sizes.new, half))


def open_networks(shape: Shape, device: torch.device, dtype: str, sizes: Sizes) -> Networks:
    """Policy, critic, reference and two reward models, loaded as `puna ppo` loads them; the critic
    begins as the first reward model. There are no files: 7B's took a minute to write."""
    config = PPOConfig(
        policy=Path("policy"),
        helpfulness=Path("helpfulness"),
        safety=Path("safety"),
        prompts=[],
        out=Path("run"),
        device=str(device),
        dtype="bf16" if dtype == "bf16" else "fp32",
        batch=sizes.batch,
        minibatch=sizes.minibatch,
        max_new_tokens=sizes.new,
    )
    policy = source_of(shape, device)
    helpfulness, safety = (source_of(shape, device, "score", seed) for seed in (1, 2))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(
        3, shape.config.vocab_size, (sizes.batch, sizes.prompt), generator=generator
    )
    networks = Networks(
        config,
        trained(policy, config),
        trained(helpfulness, config),
        loop.load(policy, config, frozen=True),
        RewardModels(
            loop.load(helpfulness, config, frozen=True),
            loop.load(safety, config, frozen=True),
            combine=config.combine,
            threshold=config.safety_threshold,
            max_tokens=config.micro_batch_tokens,
        ),
        drawn.tolist(),
    )
    if device.type != "cuda":
        return networks
    cache = sampling_room(shape.config, device, DTYPES[dtype], sizes.prompt)
    return networks._replace(config=replace(config, cache_gb=cache / 1e9))


def sampling_room(config: ModelConfig, device: torch.device, kind: torch.dtype, prompt: int) -> int:
    """Bytes for keys and values on a GPU that holds the networks, and will hold more."""
    return max(1, room(config, device, kind, prompt) - STILL * parameter_count(config))


def side_by_side(config: PPOConfig, shape: ModelConfig, sizes: Sizes, kind: torch.dtype) -> int:
    """How many answers are continued at once."""
    cache = config.limits()["cache_bytes"]
    fit = rows_within(cache, shape, kind, sizes.prompt + sizes.new)
    return min(sizes.batch, config.generation_batch, fit)


def sampled(networks: Networks, number: int) -> Rollout:
    """As `puna ppo` draws them."""
    config, count = networks.config, len(networks.prompts)
    return collect(
        networks.policy.model,
        networks.prompts,
        prompt_ids=list(range(count)),
        sample_ids=[0] * count,
        max_new_tokens=config.max_new_tokens,
        eos_id=EOS,
        temperature=config.temperature,
        seed=config.seed,
        round_index=number,
        engine=None,
        **config.limits(),
    )


def iteration(networks: Networks, number: int) -> Iterator[str]:
    """One iteration; yields each part's name when it is done."""
    config = networks.config
    rollout = sampled(networks, number)
    yield "sampling"
    answers = [
        Answer([], "", prompt, ids, finished)
        for prompt, ids, finished in zip(
            rollout.prompts, rollout.answers, rollout.finished.tolist(), strict=True
        )
    ]
    scores = score_answers(networks.reward, answers, rollout.lengths.device)
    yield "scoring"
    experience = make_experience(
        networks.reference, networks.critic.model, rollout, scores.raw, config
    )
    yield "reference"
    update(networks.policy, networks.critic, experience, config, learning_rates(config, number))
    yield "update"


def timed(networks: Networks, number: int, device: torch.device) -> dict[str, float]:
    """Seconds of each part."""
    found = {}
    finish(device)
    start = time.perf_counter()
    for name in iteration(networks, number):
        finish(device)
        now = time.perf_counter()
        found[name], start = now - start, now
    return found


def difference(networks: Networks) -> float:
    """Mean |log-prob as drawn - as the trainer finds it|; UserError beyond what that allows."""
    config, rollout = networks.config, sampled(networks, 0)
    again, _ = answer_logprobs(
        networks.policy.model,
        rollout,
        temperature=config.temperature,
        max_tokens=config.micro_batch_tokens,
    )
    found = float((again - rollout.logprobs)[rollout.mask].abs().mean())
    if not found <= RATIO_TOLERANCE[config.dtype]:
        raise UserError(
            f"nothing was timed: sampling and training are {found:.1e} apart about a log-prob; run "
            "`make test`"
        )
    return found


def least_seconds(
    config: ModelConfig,
    sizes: Sizes,
    at_once: int,
    device: torch.device,
    dtype: str,
    matmul: float,
) -> dict[str, float]:
    """What each part's matrix products need at the measured rate, and sampling's reading, which is
    of all weights for `at_once` answers."""
    kind = DTYPES[dtype]
    parameters = multiplied_parameters(config)
    ceilings = Ceilings(matmul, read_rate(device, kind.itemsize * parameters))
    length, answers = sizes.prompt + sizes.new, sizes.batch * sizes.new
    blocks = parameters - config.vocab_size * config.dim
    scores_and_values = 4 * config.n_layers * config.dim * length / 2  # causal: half of the pairs
    body = sizes.batch * length * (2 * blocks + scores_and_values)  # FLOPs of a forward pass
    end = 2 * finishing_parameters(config)  # of a token that is read: one of a row, or the answer's
    to_last = body - sizes.batch * (length - 1) * end
    to_answer = body - sizes.batch * sizes.prompt * end
    head = 2 * answers * config.vocab_size * config.dim
    flops = {
        "scoring": 2 * to_last,
        "reference": 2 * to_answer + head,
        "update": 3 * (2 * to_answer + head),  # backward twice the forward
    }
    positions = sizes.prompt + sizes.new / 2
    rate = limit(config, ceilings, at_once, positions, kind.itemsize, kind.itemsize)
    found = {name: amount / ceilings.matmul for name, amount in flops.items()}
    return {"sampling": answers / rate, **found}
