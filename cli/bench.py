"""`puna bench`: Puna's speed beside its peers' on this machine."""

from dataclasses import dataclass

import torch

from puna.benchmarks.suite import run_suite


@dataclass(kw_only=True)
class BenchConfig:
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document."""

    rounds: int = 5
    """times that each provider is timed, in turn; the median is shown"""
    device: str = "cpu"
    """cpu or cuda"""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's own choice (OMP_NUM_THREADS or the cores)"""
    save: bool = False
    """also write benchmarks/results/<machine>/<what>.json"""


def run(config: BenchConfig) -> None:
    """All rows. Raises ValueError for settings that cannot be measured."""
    measure(config, "all")


def train(config: BenchConfig) -> None:
    """The rows of training."""
    measure(config, "train")


def generate(config: BenchConfig) -> None:
    """The rows of generation."""
    measure(config, "generate")


def measure(config: BenchConfig, what: str) -> None:
    if config.rounds < 1:
        raise ValueError(f"rounds is {config.rounds}; measure at least one")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds none here; use --device cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    verb = "bench" if what == "all" else f"bench {what}"
    run_suite(
        what,
        rounds=config.rounds,
        device=torch.device(config.device),
        command=f"puna {verb} --rounds {config.rounds} --device {config.device}",
        save=config.save,
    )
