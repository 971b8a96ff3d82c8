"""What each stage holds in each of its phases, from its own configuration."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from puna.core.config import ModelConfig
from puna.trainers.capacity import memory
from puna.trainers.capacity.memory import Bytes, Setting, together
from puna.trainers.train import loop

PROMPT = 512  # tokens that a prompt is taken to have: nobody knows before the data is there

Phases = dict[str, Bytes]
"""phase -> kind -> bytes of one rank"""


def setting_of(config: Any, shape: ModelConfig, ranks: int, tp: int = 1) -> Setting:
    """Of a network to look with, over all ranks."""
    return Setting(shape, ranks, config.dtype, tp=tp)


def of_trained(config: Any, shape: ModelConfig, ranks: int) -> Setting:
    """Of a trained network: each of its copies is sharded over its own ranks."""
    layout = config.parallel
    own = max(1, ranks // layout.replicate)
    return Setting(shape, own, config.dtype, layout.checkpointing, layout.tp, layout.offload)


def trained(config: Any, shape: ModelConfig, ranks: int, tokens: int, head: str = "lm") -> Phases:
    """The phases of a network that learns from `tokens` tokens at a time."""
    setting = of_trained(config, shape, ranks)
    own = memory.trained(setting, head)
    found = {"train": together(own, memory.step(setting, tokens, head))}
    if setting.offload:
        found["step"] = together(own, memory.stepping(setting, head))
    at_hand = {"moments": memory.stepping(setting, head)["moments"]}
    return found | {"save": together(own, at_hand, whole_tensor(setting))}


def row_tokens(config: Any, shape: ModelConfig) -> int:
    return getattr(config, "row_tokens", 0) or shape.context


def training(config: Any, shape: ModelConfig, ranks: int) -> Phases:
    """`pretrain` and `sft`, and the fine-tuning of what was sampled."""
    return trained(config, shape, ranks, own_rows(config, ranks) * row_tokens(config, shape))


def own_rows(config: Any, ranks: int) -> int:
    """Rows of one forward pass on one rank."""
    return min(config.micro_batch, max(1, config.batch // max(1, ranks // config.parallel.tp)))


def reward(config: Any, shape: ModelConfig, ranks: int) -> Phases:
    """A reward model: both dialogues of each pair may fill the context."""
    return trained(config, shape, ranks, 2 * own_rows(config, ranks) * shape.context, "score")


def sampling(own: Sequence[Bytes], config: Any, shape: ModelConfig, ranks: int) -> Phases:
    """The phases of sampling beside all that is kept, `own`."""
    setting, tp = setting_of(config, shape, ranks), config.sampling_tp
    longest = min(shape.context, PROMPT + config.max_new_tokens)
    cache = config.cache_gb * 1e9
    drawing = memory.sampling(setting, tp, config.generation_batch, longest, cache)
    found = {"sample": together(*own, drawing)}
    if setting.is_sharded:
        found = {"gather": together(*own, memory.gathering(setting, tp))} | found
    return found


def imitation(judges: int) -> Callable[[Any, ModelConfig, int], Phases]:
    """Sampling beside frozen networks, `judges` reward models with the policy, then fine-tuning."""

    def phases(config: Any, shape: ModelConfig, ranks: int) -> Phases:
        setting = setting_of(config, shape, ranks)
        frozen = [memory.frozen(setting), *[memory.frozen(setting, "score")] * judges]
        found = sampling(frozen, config, shape, ranks)
        if judges:
            tokens = config.micro_batch_tokens
            found["score"] = together(*frozen, memory.looking(setting, tokens, "score"))
        return found | training(config, shape, ranks)

    return phases


def ppo(config: Any, shape: ModelConfig, ranks: int) -> Phases:
    """Policy and critic are trained; reference and two reward models are frozen."""
    setting, trained = (
        setting_of(config, shape, ranks, config.parallel.tp),
        of_trained(config, shape, ranks),
    )
    own = [
        memory.trained(trained),
        memory.trained(trained, "score"),
        memory.frozen(setting),
        *[memory.frozen(setting, "score")] * 2,
    ]
    tokens = config.micro_batch_tokens
    moments = {"moments": memory.stepping(trained)["moments"]}  # of one network at a time
    found = sampling(own, config, shape, ranks) | {
        "score": together(*own, memory.looking(setting, tokens)),
        "critic": together(*own, memory.step(trained, tokens, "score")),
        "policy": together(*own, memory.step(trained, tokens)),
        "save": together(*own, moments, whole_tensor(setting)),
    }
    if trained.offload:
        found["step"] = together(*own, memory.stepping(trained))
    return found


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


def host(stage: str, shape: ModelConfig, ranks: int, offload: bool = False) -> float:
    """Bytes of main memory that a rank takes while a checkpoint is written: a copy of its part, of
    all networks, while training goes on; of one rank, which waits, a network's moments. Beside
    that, the moments that are kept there (`offload`)."""
    moments = float(memory.MOMENTS * memory.parameters(shape))
    copies = moments if ranks == 1 else checkpoint(stage, shape) / ranks
    return copies + offload * networks(stage) * moments / ranks


def networks(stage: str) -> int:
    """How many are trained."""
    return 2 if stage == "ppo" else 1


def checkpoint(stage: str, shape: ModelConfig) -> float:
    """Bytes on disk: parameters and moments of every trained network, in fp32."""
    return float(networks(stage) * (memory.FP32 + memory.MOMENTS) * memory.parameters(shape))


def smaller(config: loop.TrainConfig) -> list[tuple[str, Any]]:
    """(what changes, the configuration with it), the least change first."""
    found: list[tuple[str, Any]] = []

    def offer(**values: Any) -> None:
        said = ", ".join(f"{name} = {say(value)}" for name, value in values.items())
        found.append((said, replace(config, **values)))

    def lay_out(**values: Any) -> None:
        said = ", ".join(f"{name} = {say(value)}" for name, value in values.items())
        layout = replace(config.parallel, **values)
        found.append((f"[parallel] {said}", replace(config, parallel=layout)))

    if config.parallel.checkpointing == "none":
        lay_out(checkpointing="selective")
    if config.parallel.checkpointing != "full":
        lay_out(checkpointing="full")
    for name, least in (("micro_batch", 1), ("micro_batch_tokens", 1024), ("cache_gb", 1)):
        value = getattr(config, name, least)
        while value > least:
            value = value / 2 if isinstance(value, float) else value // 2
            offer(**{name: max(least, value)})
    if hasattr(config, "sampling_tp"):
        for tp in (2, 4, 8):
            if tp > config.sampling_tp:
                offer(sampling_tp=tp)
    own = config.parallel.tp
    for tp in (*(tp for tp in (2, 4, 8) if tp > own), *(tp for tp in (8, 4, 2, 1) if tp < own)):
        lay_out(tp=tp)
    if config.parallel.replicate > 1:
        lay_out(replicate=1)
    if not config.parallel.offload:
        lay_out(offload=True)
    lay_out(checkpointing="full", offload=True)
    if hasattr(config, "sampling_tp"):
        said, changed = found[-1]
        found.append(
            (
                f"sampling_tp = 8, cache_gb = 4, {said}",
                replace(changed, sampling_tp=8, cache_gb=4.0),
            )
        )
    return found


def say(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
