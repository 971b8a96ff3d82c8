"""What each stage holds in each of its phases, from its own configuration."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from puna.core.config import ModelConfig
from puna.trainers.capacity import memory
from puna.trainers.capacity.memory import Bytes, Setting, together
from puna.trainers.train import loop

PROMPT = 512  # tokens that a prompt is taken to have: nobody knows before the data is there

Phases = dict[str, Bytes]
"""phase -> kind -> bytes of one rank"""


def setting_of(config: Any, shape: ModelConfig, ranks: int) -> Setting:
    return Setting(shape, ranks, config.dtype, config.activation_checkpointing)


def of_trained(config: Any, shape: ModelConfig, ranks: int) -> Setting:
    """Of a trained network: each of its copies is sharded over its own ranks."""
    return setting_of(config, shape, max(1, ranks // config.replicate))


def row_tokens(config: Any, shape: ModelConfig) -> int:
    return getattr(config, "row_tokens", 0) or shape.context


def training(config: Any, shape: ModelConfig, ranks: int) -> Phases:
    """`pretrain` and `sft`, and the fine-tuning of what was sampled."""
    setting = of_trained(config, shape, ranks)
    own = memory.trained(setting)
    tokens = own_rows(config, ranks) * row_tokens(config, shape)
    return {
        "train": together(own, memory.step(setting, tokens)),
        "save": together(own, whole_tensor(setting)),
    }


def own_rows(config: Any, ranks: int) -> int:
    """Rows of one forward pass on one rank."""
    return min(config.micro_batch, max(1, config.batch // ranks))


def reward(config: Any, shape: ModelConfig, ranks: int) -> Phases:
    """A reward model: both dialogues of each pair may fill the context."""
    setting = of_trained(config, shape, ranks)
    own = memory.trained(setting, "score")
    tokens = 2 * own_rows(config, ranks) * shape.context
    return {
        "train": together(own, memory.step(setting, tokens, "score")),
        "save": together(own, whole_tensor(setting)),
    }


def sampling(config: Any, shape: ModelConfig, ranks: int) -> Bytes:
    return memory.sampling(
        setting_of(config, shape, ranks),
        config.sampling_tp,
        config.generation_batch,
        min(shape.context, PROMPT + config.max_new_tokens),
        config.cache_gb * 1e9,
    )


def imitation(judges: int) -> Callable[[Any, ModelConfig, int], Phases]:
    """Sampling beside frozen networks, `judges` reward models with the policy, then fine-tuning."""

    def phases(config: Any, shape: ModelConfig, ranks: int) -> Phases:
        setting = setting_of(config, shape, ranks)
        frozen = [memory.frozen(setting), *[memory.frozen(setting, "score")] * judges]
        found = {"sample": together(*frozen, sampling(config, shape, ranks))}
        if judges:
            tokens = config.micro_batch_tokens
            found["score"] = together(*frozen, memory.looking(setting, tokens, "score"))
        return found | training(config, shape, ranks)

    return phases


def ppo(config: Any, shape: ModelConfig, ranks: int) -> Phases:
    """Policy and critic are trained; reference and two reward models are frozen."""
    setting, trained = setting_of(config, shape, ranks), of_trained(config, shape, ranks)
    own = [
        memory.trained(trained),
        memory.trained(trained, "score"),
        memory.frozen(setting),
        *[memory.frozen(setting, "score")] * 2,
    ]
    tokens = config.micro_batch_tokens
    return {
        "sample": together(*own, sampling(config, shape, ranks)),
        "score": together(*own, memory.looking(setting, tokens)),
        "train critic": together(*own, memory.step(trained, tokens, "score")),
        "train policy": together(*own, memory.step(trained, tokens)),
        "save": together(*own, whole_tensor(setting)),
    }


def whole_tensor(setting: Setting) -> Bytes:
    """Saving gathers one tensor after the other."""
    shape = setting.shape
    return {"one tensor": memory.FP32 * shape.dim * max(shape.vocab_size, shape.ffn_dim)}


STAGES: dict[str, Callable[[Any, ModelConfig, int], Phases]] = {
    "pretrain": training,
    "sft": training,
    "reward": reward,
    "rejection": imitation(2),
    "gatt": imitation(0),
    "distill": imitation(1),
    "ppo": ppo,
}


def shared(stage: str, config: Any) -> dict[str, int]:
    """What the ranks must divide, by option."""
    names = {"ppo": ("batch", "minibatch")}.get(stage, ("batch",))
    return {name: getattr(config, name) for name in names}


def host(stage: str, shape: ModelConfig, ranks: int) -> float:
    """Bytes of main memory that a rank takes while a checkpoint is written: a copy of its part, of
    all networks, while training goes on; of one rank, which waits, a network's moments."""
    if ranks == 1:
        return float(memory.MOMENTS * memory.parameters(shape))
    return checkpoint(stage, shape) / ranks


def checkpoint(stage: str, shape: ModelConfig) -> float:
    """Bytes on disk: parameters and moments of every trained network, in fp32."""
    networks = 2 if stage == "ppo" else 1
    return float(networks * (memory.FP32 + memory.MOMENTS) * memory.parameters(shape))


def smaller(config: loop.TrainConfig) -> list[tuple[str, Any]]:
    """(what changes, the configuration with it), the least change first."""
    found: list[tuple[str, Any]] = []

    def offer(**values: Any) -> None:
        said = ", ".join(f"{name} = {say(value)}" for name, value in values.items())
        found.append((said, replace(config, **values)))

    if not config.activation_checkpointing:
        offer(activation_checkpointing=True)
    for name, least in (("micro_batch", 1), ("micro_batch_tokens", 1024), ("cache_gb", 1)):
        value = getattr(config, name, least)
        while value > least:
            value = value / 2 if isinstance(value, float) else value // 2
            offer(**{name: max(least, value)})
    if hasattr(config, "sampling_tp"):
        for tp in (2, 4, 8):
            if tp > config.sampling_tp:
                offer(sampling_tp=tp)
        offer(sampling_tp=8, cache_gb=4.0, activation_checkpointing=True)
    return found


def say(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
