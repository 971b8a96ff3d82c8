"""`puna plan`: what a recipe needs on given GPUs, before anybody pays for them.

It says memory a rank by phase and kind, checkpoints and how long they take to write, and time;
where it does not fit, the smallest change that does. All of it is arithmetic (`memory`).
"""

import importlib
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from tyro import MISSING

from puna.core.checkpoint.folder import open_source
from puna.core.config import SIZES, ModelConfig, size
from puna.core.errors import UserError
from puna.core.terminal import say, say_table
from puna.trainers.capacity import duration, memory, phases
from puna.trainers.capacity.devices import A_NODE, DEVICES, Device, usable
from puna.trainers.train.command import command
from puna.trainers.train.config import find_recipe, from_values, load_recipe
from puna.trainers.train.layout import Parallel
from puna.trainers.train.ranges import Above, AtMost, Count, Options

CONFIGS = {
    "pretrain": "PretrainConfig",
    "sft": "SFTConfig",
    "reward": "RewardConfig",
    "rejection": "RejectionConfig",
    "gatt": "GAttConfig",
    "distill": "DistillConfig",
    "ppo": "PPOConfig",
}
MOST_GPUS = 1 << 14
AS_THE_RECIPE = Parallel()  # itself, not one like it


class DoesNotFit(UserError):
    """The run needs more than there is."""


@dataclass(kw_only=True)
class PlanConfig(Options):
    """What a recipe needs on given GPUs: memory, disk, time; or that it does not fit."""

    recipe: str
    """a stage's recipe, as 70b/ppo.toml"""
    model: str = ""
    """a size (7b, 13b, 34b, 70b, ...) or a model's folder; left out: that of the recipe"""
    gpu: Literal["a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx-4090"] = "a100-80"
    """what is in the machines"""
    gpus: Count = 8
    """how many, all machines together"""
    mfu: Annotated[float, Above(0), AtMost(1)] = 0.4
    """share of the GPUs' products that training is assumed to reach (nothing was measured)"""
    disk: Annotated[float, Above(0)] = 2.0
    """GB (10^9 bytes) a second that checkpoints are written with"""
    parallel: Parallel = field(default_factory=lambda: AS_THE_RECIPE)
    """how the model is shared out; left out: as the recipe says"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel is AS_THE_RECIPE and self.recipe is not MISSING:
            with suppress(ValueError):  # `run` says what is wrong with the recipe
                self.parallel = stage_of(self.recipe)[1].parallel


class Need(NamedTuple):
    """What a run takes of each rank."""

    phases: phases.Phases
    refusal: str | None  # why it cannot run, whatever the memory

    @property
    def most(self) -> tuple[str, float]:
        """The largest phase and its bytes."""
        totals = {name: memory.total(kinds) for name, kinds in self.phases.items()}
        name = max(totals, key=lambda each: totals[each])
        return name, totals[name]


def run(config: PlanConfig) -> bool:
    """Print the plan; returns whether it fits. Raises DoesNotFit where not."""
    stage, settings = stage_of(config.recipe)
    settings = replace(settings, parallel=config.parallel)
    shape = shape_of(config, settings)
    device = DEVICES[config.gpu]
    need = need_of(stage, settings, shape, config.gpus)
    title = f"{config.recipe} on {config.gpus:,} x {config.gpu}"
    show(title, need, device)
    show_disk(config, stage, shape, settings.parallel.offload)
    show_time(config, stage, settings, shape, device)
    if (why := refusal(need, device)) is None:
        name, most = need.most
        say(f"\n{title} fits: at most {gb(most)} of {gb(usable(device))} GB ({name}).")
        return True
    change = smallest_change(stage, settings, shape, config.gpus, device)
    raise DoesNotFit(f"{title} does not run: {why}; {change}")


def stage_of(recipe: str) -> tuple[str, Any]:
    """The recipe's stage, by its name, and its settings."""
    path = find_recipe(recipe)
    stage = path.stem.split("_")[0]
    if stage not in CONFIGS:
        raise ValueError(
            f"{recipe} is no stage's recipe: its name begins with none of {', '.join(CONFIGS)}; "
            "name one, such as 7b/sft.toml: a loop is planned stage by stage"
        )
    cls = getattr(importlib.import_module(f"puna.trainers.{stage}"), CONFIGS[stage])
    return stage, from_values(cls, load_recipe(cls, path))


def shape_of(config: PlanConfig, settings: Any) -> ModelConfig:
    """The model's shape: as asked for, else of the recipe itself or of its folder's name."""
    name = config.model or getattr(settings, "size", "")
    folder = Path(config.recipe).parent.name
    if not config.model and folder in SIZES:
        name = folder
    if name in SIZES:
        return size(name)
    if not name:
        raise ValueError(
            f"{config.recipe} does not say of which model; give --model 7b, or a model's folder"
        )
    if not Path(name).exists():
        raise ValueError(
            f"{name} is neither a size ({', '.join(SIZES)}) nor a model's folder; name one of these"
        )
    return open_source(Path(name)).config


def need_of(stage: str, settings: Any, shape: ModelConfig, ranks: int) -> Need:
    return Need(phases.STAGES[stage](settings, shape, ranks), cannot(stage, settings, shape, ranks))


def cannot(stage: str, settings: Any, shape: ModelConfig, ranks: int) -> str | None:
    """Why so many ranks cannot share the work."""
    layout = settings.parallel
    if ranks % (layout.replicate * layout.tp):
        said = f"replicate = {layout.replicate}" + f" times tp = {layout.tp}" * (layout.tp > 1)
        return f"{said} divides not all of {ranks:,} ranks"
    if (why := cannot_cut("tp", layout.tp, shape, ranks)) is not None:
        return why
    groups = ranks // layout.tp
    for name, value in phases.shared(stage, settings).items():
        if value % groups:
            who = f"{groups:,} groups of {layout.tp} ranks" if layout.tp > 1 else f"{ranks:,} ranks"
            return f"{name} = {value} cannot be shared equally by {who}"
    return cannot_cut("sampling_tp", getattr(settings, "sampling_tp", 1), shape, ranks)


def cannot_cut(name: str, tp: int, shape: ModelConfig, ranks: int) -> str | None:
    """Why so many ranks cannot share one model."""
    if tp > 1 and (ranks % tp or shape.n_kv_heads % tp or shape.ffn_dim % tp):
        return (
            f"{name} = {tp} divides not all of {ranks:,} ranks, {shape.n_kv_heads} key/value "
            f"heads and {shape.ffn_dim} hidden units"
        )
    if tp > A_NODE:
        return f"{name} = {tp} is more than the {A_NODE} GPUs of a machine"
    return None


def refusal(need: Need, device: Device) -> str | None:
    """Why it cannot run, or does not fit."""
    if need.refusal is not None:
        return need.refusal
    name, most = need.most
    room = usable(device)
    if most <= room:
        return None
    return f"it needs {gb(most)} GB of a rank ({name}), and there are {gb(room)}"


def smallest_change(
    stage: str, settings: Any, shape: ModelConfig, gpus: int, device: Device
) -> str:
    """The first change that fits: of the recipe, then more GPUs, then fewer, then more of both."""
    for changed, other in phases.smaller(settings):
        if refusal(need_of(stage, other, shape, gpus), device) is None:
            return f"{changed} fits"
    counts = powers(MOST_GPUS)
    for count in [each for each in counts if each > gpus]:
        if refusal(need_of(stage, settings, shape, count), device) is None:
            return f"{count:,} GPUs fit"
    for count in [each for each in reversed(counts) if each < gpus]:
        if refusal(need_of(stage, settings, shape, count), device) is None:
            return f"{count:,} GPUs fit"
        for changed, other in phases.smaller(settings):
            if refusal(need_of(stage, other, shape, count), device) is None:
                return f"{count:,} GPUs with {changed} fit"
    for count in counts:
        for changed, other in reversed(phases.smaller(settings)):
            if refusal(need_of(stage, other, shape, count), device) is None:
                return f"{count:,} GPUs with {changed} fit"
    return "no number of these GPUs does it: the model's largest part must fit one of them"


def fewest(recipe: str, gpu: str = "a100-80") -> int | None:
    """GPUs, a power of two, on which the recipe of a size runs as it is."""
    stage, settings = stage_of(recipe)
    shape = shape_of(PlanConfig(recipe=recipe), settings)
    for count in powers(MOST_GPUS):
        if refusal(need_of(stage, settings, shape, count), DEVICES[gpu]) is None:
            return count
    return None


def powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def show(title: str, need: Need, device: Device) -> None:
    """A column for each phase, a row for each kind."""
    kinds = [kind for phase in need.phases.values() for kind in phase]
    rows = [
        (kind, *(gb(phase[kind]) if phase.get(kind) else "" for phase in need.phases.values()))
        for kind in dict.fromkeys(kinds)
        if any(phase.get(kind) for phase in need.phases.values())
    ]
    rows.append(("together", *(gb(memory.total(phase)) for phase in need.phases.values())))
    rows.append(("there is", *[gb(usable(device))] * len(need.phases)))
    say_table(rows, ("GB a rank", *need.phases), title)


def show_disk(config: PlanConfig, stage: str, shape: ModelConfig, offload: bool) -> None:
    size = phases.checkpoint(stage, shape)
    took = duration_said(size / (config.disk * 1e9))
    held = gb(phases.host(stage, shape, config.gpus, offload))
    say(
        f"\ncheckpoint: {gb(size)} GB, {took} at {config.disk:g} GB/s; each rank holds {held} GB "
        "of its machine's memory while it is written"
    )


def show_time(
    config: PlanConfig, stage: str, settings: Any, shape: ModelConfig, device: Device
) -> None:
    found = duration.operations(stage, settings, shape)
    if found is None:
        say("time: depends on how much data there is")
        return
    took = duration.seconds(found, device, config.gpus, config.mfu)
    parts = f"{duration_said(took)} at an MFU of {config.mfu:.0%}"
    if stage == "ppo":
        drawing = duration.sampling_seconds(settings, shape, device, config.gpus)
        took += drawing
        parts += f" and {duration_said(drawing)} of sampling"
    hours = took / 3600 * config.gpus
    say(f"time: {parts}: {hours:,.0f} GPU-hours (assumed, not measured)")


def duration_said(seconds: float) -> str:
    for limit, unit, word in ((86400, 86400, "days"), (3600, 3600, "hours"), (60, 60, "minutes")):
        if seconds >= 2 * limit:
            return f"{seconds / unit:,.1f} {word}"
    return f"{seconds:.0f} seconds"


def gb(value: float) -> str:
    return f"{value / 1e9:,.1f}"


def main() -> int:
    return command("python -m puna.trainers.capacity.plan", PlanConfig, run)


if __name__ == "__main__":
    sys.exit(main())
