"""Whether a run fits the GPUs that it was started on, asked before anything is loaded."""

from pathlib import Path
from typing import Any

import torch

from puna.core import parallel
from puna.core.checkpoint.folder import open_source
from puna.core.config import ModelConfig
from puna.trainers.capacity.devices import Device
from puna.trainers.capacity.plan import DoesNotFit, need_of, refusal, smallest_change
from puna.trainers.train import loop
from puna.trainers.train.advice import advice


def check(stage: str, config: Any, model: Path | ModelConfig) -> None:
    """ValueError where a `model`, its folder or its shape, cannot be shared out as configured.

    DoesNotFit where, by the arithmetic of `puna plan`, this rank's GPU is too small for a stage
    with it; that is not asked of a CPU, nor where the configuration's `plan` is off.
    """
    shape = open_source(model).config if isinstance(model, Path) else model
    parallel.check(shape, config.parallel.replicate, config.parallel.tp)
    if not config.plan or loop.device_of(config).type != "cuda":
        return
    device = Device(float(torch.cuda.get_device_properties().total_memory), 0.0, 0.0)
    ranks = parallel.world_size()
    why = refusal(need_of(stage, config, shape, ranks), device)
    if why is not None:
        change = smallest_change(stage, config, shape, ranks, device)
        anyway = advice("plan", " (--no-plan tries it anyway)", "")
        raise DoesNotFit(f"this does not fit: {why}; {change}{anyway}")
