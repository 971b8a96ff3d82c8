"""`puna bench`: Puna's speed beside its peers' on this machine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from puna.benchmarks.compare import compare as compare_results
from puna.benchmarks.kernels.run import run_kernels
from puna.benchmarks.models.decode_peers import check_llama2c
from puna.benchmarks.models.weights import bench_weights
from puna.benchmarks.suite import Setting, run_suite
from puna.trainers.train.ranges import AtLeast, AtMost, Count, Options


@dataclass(kw_only=True)
class BenchConfig(Options):
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document."""

    rounds: Count = 5
    """times that each provider is timed, in turn; the median is shown"""
    device: str = "cpu"
    """cpu or cuda"""
    threads: Annotated[int, AtLeast(0), AtMost(1024)] = 0
    """CPU threads; 0 takes PyTorch's own choice (OMP_NUM_THREADS or the cores)"""
    save: bool = False
    """also write benchmarks/results/<machine>/<what>.json"""


@dataclass(kw_only=True)
class DryBenchConfig(BenchConfig):
    """What can also be walked through without measuring."""

    dry_run: bool = False
    """a GPU's rows, on this CPU and at tiny sizes: to see that all of it runs"""

    def check(self) -> None:
        if self.dry_run and (self.save or self.device != "cpu"):
            raise ValueError("a dry run measures nothing: leave out --save, and use --device cpu")


@dataclass(kw_only=True)
class ModelBenchConfig(DryBenchConfig):
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document."""

    shape: list[str] = field(default_factory=list)
    """sizes of Llama: demo, 15m, 110m, 1b, 7b, 13b, 34b, 70b; none given: demo and 15m, on a GPU
    7b"""
    layers: Annotated[int, AtLeast(0), AtMost(1024)] = 0
    """blocks that are kept of each; 0: all, on a GPU as many as fit its memory"""
    peers: bool = True
    """measure the peers, too; without them a larger model fits"""

    def check(self) -> None:
        super().check()
        if self.dry_run and self.layers:
            raise ValueError("a dry run's models are tiny as they are: leave out --layers")


@dataclass(kw_only=True)
class DecodeBenchConfig(ModelBenchConfig):
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document.
    llama.cpp takes part where the packages llama-cpp-python and gguf are installed."""

    llama2c: Path | None = None
    """llama2.c's compiled `run`, to decode beside it"""


@dataclass(kw_only=True)
class KernelBenchConfig(DryBenchConfig):
    """Verify each operation of kernels/ against fp64, then time it beside PyTorch, torch.compile,
    liger-kernel and SDPA; what is wrong is not timed, and the exit status says so. Prints a
    table, and as the last line of stdout one JSON document."""

    rounds: int = 30
    """times that each provider is timed, in turn; the median is shown"""
    operations: list[str] = field(default_factory=list)
    """only these, rms_norm or attention for example; none given: all"""


@dataclass(kw_only=True)
class WeightsBenchConfig(BenchConfig):
    """What bf16 and int8 weights cost a model and what they win: loss on a text and tokens a
    second, as a table, and as the last line one JSON document."""

    model: Path
    """a model folder (ours or Hugging Face's) or a llama2.c .bin"""
    text: Path
    """a text file of the kind that the model knows"""
    tokenizer: Path | None = None
    """tokenizer.model, where the model's folder has none"""


@dataclass(kw_only=True)
class CompareConfig(Options):
    """Say what became faster or slower between two runs, beyond their noise; the exit status is not
    zero where a row of Puna became slower, or wrong."""

    before: Path
    """results that `--save` wrote"""
    after: Path
    """the same of a later run on the same machine"""


def compare(config: CompareConfig) -> None:
    """What changed between two files of results."""
    compare_results(config.before, config.after)


def run(config: DecodeBenchConfig) -> None:
    """Training, generation and decoding. Raises ValueError for settings that cannot be measured."""
    measure(config, "all")


def train(config: ModelBenchConfig) -> None:
    """The rows of training."""
    measure(config, "train")


def generate(config: ModelBenchConfig) -> None:
    """The rows of generation."""
    measure(config, "generate")


def decode(config: DecodeBenchConfig) -> None:
    """The rows of decoding one row on the CPU, beside llama2.c and llama.cpp."""
    if config.device.startswith("cuda") or config.dry_run:
        raise ValueError("decoding is compared on the CPU; use --device cpu, without --dry-run")
    measure(config, "decode")


def weights(config: WeightsBenchConfig) -> None:
    """The rows of rounded weights: what they cost a trained model and what they win."""
    if config.device != "cpu":
        raise ValueError("rounded weights are read on the CPU; use --device cpu")
    prepare(config)
    bench_weights(
        config.model,
        config.text,
        config.tokenizer,
        rounds=config.rounds,
        command=f"puna bench weights --model {config.model.name} --text {config.text.name} "
        f"--rounds {config.rounds}",
        save=config.save,
    )


def rollout(config: ModelBenchConfig) -> None:
    """The rows of sampling 512 answers of different lengths; takes minutes."""
    measure(config, "rollout")


def kernels(config: KernelBenchConfig) -> None:
    """The rows of kernels/. Raises RuntimeError where a provider is wrong."""
    device = prepare(config)
    command = f"puna bench kernels --rounds {config.rounds} --device {config.device}"
    if config.operations:
        command += f" --operations {' '.join(config.operations)}"
    run_kernels(
        rounds=config.rounds,
        device=device,
        command=command,
        only=config.operations,
        save=config.save,
        dry=config.dry_run,
    )


def measure(config: ModelBenchConfig, what: str) -> None:
    device = prepare(config)
    verb = "bench" if what == "all" else f"bench {what}"
    command = f"puna {verb} --rounds {config.rounds} --device {config.device}"
    if config.shape:
        command += f" --shape {' '.join(config.shape)}"
    if config.layers:
        command += f" --layers {config.layers}"
    if not config.peers:
        command += " --no-peers"
    llama2c = config.llama2c if isinstance(config, DecodeBenchConfig) else None
    if llama2c is not None:
        if device.type != "cpu" or config.dry_run:
            raise ValueError("llama2.c decodes on the CPU; use --device cpu or leave out --llama2c")
        if not config.peers:
            raise ValueError("llama2.c is a peer: leave out --llama2c or --no-peers")
        check_llama2c(llama2c)
        command += f" --llama2c {llama2c.name}"
    setting = Setting(
        device, config.rounds, config.shape, config.layers, config.peers, config.dry_run
    )
    run_suite(what, setting, command=command, save=config.save, llama2c=llama2c)


def prepare(config: BenchConfig) -> torch.device:
    """The device, with the threads set. ValueError for settings that cannot be measured."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds none here; use --device cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    return torch.device(config.device)
