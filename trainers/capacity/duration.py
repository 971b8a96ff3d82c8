"""How long a run takes, from a share of the device's products that is assumed, not measured."""

from typing import Any

from puna.core.config import ModelConfig
from puna.trainers.capacity.devices import Device
from puna.trainers.capacity.memory import parameters
from puna.trainers.capacity.phases import PROMPT, row_tokens


def work(shape: ModelConfig, tokens: float, length: int) -> float:
    """Operations of training on so many tokens in rows of `length`: 6 N and 12 L C T a token (the
    second is attention's; PaLM, appendix B), recomputation not counted."""
    return tokens * (6 * parameters(shape) + 12 * shape.n_layers * shape.q_dim * length)


def operations(stage: str, config: Any, shape: ModelConfig, rows: int = 0) -> float | None:
    """Of the whole run; None where that depends on how much data there is."""
    if stage == "ppo":
        length = PROMPT + config.max_new_tokens
        tokens = config.iterations * config.batch * length
        looks = 4  # reference, both reward models, the policy's own log-probs: a third of training
        return work(shape, tokens, length) * (2 + looks / 3)
    if stage == "pretrain" and config.steps:
        length = row_tokens(config, shape)
        return work(shape, config.steps * config.batch * length, length)
    return None


def seconds(operations: float, device: Device, gpus: int, mfu: float) -> float:
    return operations / (device.flops * gpus * mfu)


def sampling_seconds(config: Any, shape: ModelConfig, device: Device, gpus: int) -> float:
    """Of all iterations of PPO: each step reads the weights once for all answers side by side, at
    half of the memory's rate."""
    width = 2 if config.dtype == "bf16" else 4
    a_group = config.batch * config.sampling_tp / gpus
    together = max(1.0, min(config.generation_batch, a_group))
    rounds = max(1.0, a_group / together)
    a_step = width * parameters(shape) / config.sampling_tp / (device.bandwidth / 2)
    return config.iterations * rounds * config.max_new_tokens * a_step
