"""`puna bench`: Puna's speed beside its peers' on this machine."""

from dataclasses import dataclass
from typing import Literal

import torch

from puna.benchmarks.suite import run_suite


@dataclass
class BenchConfig:
    """Measure training and generation, and print a table and one line of JSON."""

    what: Literal["train", "generate", "all"] = "all"
    """Which rows to measure."""
    rounds: int = 5
    """How many times each provider is timed, in turn; the median is shown."""
    device: str = "cpu"
    """Where to run: cpu or cuda."""
    threads: int = 0
    """CPU threads; 0 takes what PyTorch takes (OMP_NUM_THREADS or the cores)."""
    save: bool = False
    """Also write benchmarks/results/<machine>/<what>.json."""


def run(config: BenchConfig) -> None:
    """Raises ValueError for settings that cannot be measured."""
    if config.rounds < 1:
        raise ValueError(f"rounds is {config.rounds}; measure at least one")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds none here; use --device cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    run_suite(
        config.what,
        rounds=config.rounds,
        device=torch.device(config.device),
        command=f"puna bench --what {config.what} --rounds {config.rounds}"
        f" --device {config.device}",
        save=config.save,
    )
