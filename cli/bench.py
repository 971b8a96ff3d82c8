"""`puna bench`: Puna's speed beside its peers' on this machine."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from puna.benchmarks.compare import compare as compare_results
from puna.benchmarks.models.decode_peers import check_llama2c
from puna.benchmarks.models.llama_bench import named_programs
from puna.benchmarks.models.weights import bench_weights
from puna.benchmarks.suite import Setting, run_suite
from puna.core.device import device_of_name
from puna.trainers.train.ranges import AtLeast, AtMost, CountOrZero, Options

ROUNDS = 5


@dataclass(kw_only=True)
class BenchConfig(Options):
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document."""

    rounds: CountOrZero = 0
    """times that each provider is timed, in turn; the median is shown; 0: 5, kernels 30"""
    device: str = "auto"
    """cpu, cuda or cuda:1; auto: a GPU where there is one"""
    threads: Annotated[int, AtLeast(0), AtMost(1024)] = 0
    """CPU threads; 0 takes PyTorch's own choice (OMP_NUM_THREADS or the cores)"""
    save: bool = False
    """also write benchmarks/results/<machine>/<what>.json"""


@dataclass(kw_only=True)
class DryBenchConfig(BenchConfig):
    """How Puna's cost grows with batch, context, vocabulary, width, depth and K, with a fitted
    exponent each and where memory ends; prints a table, and as the last line one JSON document."""

    dry_run: bool = False
    """a GPU's rows, on this CPU and at tiny sizes: to see that all of it runs"""

    def check(self) -> None:
        if self.dry_run and (self.save or self.device not in ("cpu", "auto")):
            raise ValueError("a dry run measures nothing: leave out --save, and use --device cpu")


@dataclass(kw_only=True)
class ModelBenchConfig(DryBenchConfig):
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document."""

    shape: list[str] = field(default_factory=list)
    """sizes of Llama: demo, 15m, 110m, 1b, 7b, 13b, 34b, 70b, or folders of models; none given:
    demo and 15m, on a GPU 7b"""
    layers: Annotated[int, AtLeast(0), AtMost(1024)] = 0
    """blocks that are kept of each; 0: all, on a GPU as many as fit its memory"""
    peers: bool = True
    """measure the peers, too; without them a larger model fits"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the weights that generate and of the products that train; auto: fp32, on a GPU bf16"""

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
    llama_bench: list[str] = field(default_factory=list)
    """builds of llama.cpp or ik_llama.cpp to decode beside: paths of their `llama-bench`, or
    NAME=PATH (takes the package gguf)"""


@dataclass(kw_only=True)
class SuiteConfig(DecodeBenchConfig):
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document.
    llama.cpp takes part where the packages llama-cpp-python and gguf are installed."""

    quick: bool = False
    """a row of everything within three minutes on any machine: fewer rounds, the demo's shape, and
    what takes longer is left out and named"""


@dataclass(kw_only=True)
class KernelBenchConfig(DryBenchConfig):
    """Verify each operation of kernels/ against fp64, then time it beside PyTorch, torch.compile,
    liger-kernel and SDPA; what is wrong is not timed, and the exit status says so. Prints a
    table, and as the last line of stdout one JSON document."""

    operations: list[str] = field(default_factory=list)
    """only these, rms_norm or attention for example; none given: all"""
    compiled: bool = True
    """torch.compile's rows, too; on a GPU each takes up to a minute to compile"""


@dataclass(kw_only=True)
class TrainBenchConfig(ModelBenchConfig):
    """Measure Puna beside its peers; prints a table, and as the last line one JSON document."""

    recompute: bool = False
    """on a GPU: Puna with full recomputation alone, so that a model twice as deep fits"""


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


@dataclass(kw_only=True)
class ReportConfig(Options):
    """Write one self-contained page of results: drawings, and tables in which lost rows stand like
    the others."""

    folder: Path | None = None
    """folder of results that `--save` wrote, of one machine or several; left out: the ones in this
    repository"""
    out: Path | None = None
    """the page; left out: report.html in the folder, or benchmarks/report.html"""


def report(config: ReportConfig) -> None:
    """The page of results."""
    from puna.benchmarks.report import report as write_report  # with matplotlib, which is slow

    write_report(config.folder, config.out)


def compare(config: CompareConfig) -> None:
    """What changed between two files of results."""
    compare_results(config.before, config.after)


def run(config: SuiteConfig) -> None:
    """Everything. Raises ValueError for settings that cannot be measured."""
    measure(config, "all")


def train(config: TrainBenchConfig) -> None:
    """The rows of training."""
    if config.recompute and not (config.dry_run or device_of_name(config.device).type == "cuda"):
        raise ValueError("recomputation is measured on a GPU; leave out --recompute")
    measure(config, "train")


def generate(config: ModelBenchConfig) -> None:
    """The rows of generation."""
    measure(config, "generate")


def decode(config: DecodeBenchConfig) -> None:
    """The rows of decoding, and of long prompts, on the CPU, beside llama2.c and llama.cpp."""
    if config.device not in ("cpu", "auto") or config.dry_run or config.dtype == "bf16":
        raise ValueError(
            "decoding is compared on the CPU, in its own formats; use --device cpu, without "
            "--dry-run and --dtype"
        )
    measure(replace(config, device="cpu"), "decode")


def weights(config: WeightsBenchConfig) -> None:
    """The rows of rounded weights: what they cost a trained model and what they win."""
    if config.device not in ("cpu", "auto"):
        raise ValueError("rounded weights are read on the CPU; use --device cpu")
    prepare(replace(config, device="cpu"))
    bench_weights(
        config.model,
        config.text,
        config.tokenizer,
        rounds=config.rounds or ROUNDS,
        command=f"puna bench weights --model {config.model.name} --text {config.text.name} "
        f"--rounds {config.rounds or ROUNDS}",
        save=config.save,
    )


def rollout(config: ModelBenchConfig) -> None:
    """The rows of sampling 512 answers of different lengths; takes minutes."""
    measure(config, "rollout")


def rlhf(config: ModelBenchConfig) -> None:
    """The rows of one PPO iteration: sampling, scoring, reference, update."""
    measure(config, "rlhf")


def fsdp(config: ModelBenchConfig) -> None:
    """The rows of training and generation by ranks; under torchrun of its ranks."""
    measure(config, "fsdp")


def busy(config: ModelBenchConfig) -> None:
    """The rows of decoding and training beside busy neighbours, on the CPU."""
    if config.device not in ("cpu", "auto") or config.dry_run or config.dtype == "bf16":
        raise ValueError(
            "neighbours are busy on the CPU; use --device cpu, without --dry-run and --dtype"
        )
    measure(replace(config, device="cpu"), "busy")


def growth(config: DryBenchConfig) -> None:
    """The rows over batch, context, vocabulary, width, depth and K, with fitted exponents."""
    measure(config, "growth")


def kernels(config: KernelBenchConfig) -> None:
    """The rows of kernels/. Raises RuntimeError where a provider is wrong."""
    measure(config, "kernels")


def measure(config: DryBenchConfig, what: str) -> None:
    device = prepare(replace(config, device="cpu") if config.dry_run else config)
    setting = setting_of(config, device)
    run_suite(what, setting, command=command_of(config, what, device), save=config.save)


def setting_of(config: DryBenchConfig, device: torch.device) -> Setting:
    """What the suite is told of a configuration."""
    setting = Setting(device, config.rounds, dry=config.dry_run)
    if isinstance(config, KernelBenchConfig):
        return setting._replace(operations=config.operations, compiled=config.compiled)
    if not isinstance(config, ModelBenchConfig):
        return setting
    dtype = "" if config.dtype == "auto" else config.dtype
    setting = setting._replace(
        shapes=config.shape, layers=config.layers, peers=config.peers, dtype=dtype
    )
    if isinstance(config, TrainBenchConfig) and config.recompute:
        return setting._replace(peers=False, recompute=True)
    if isinstance(config, DecodeBenchConfig) and (config.llama2c or config.llama_bench):
        if device.type != "cpu" or config.dry_run:
            raise ValueError(
                "llama2.c and llama-bench decode on the CPU; use --device cpu or leave them out"
            )
        if not config.peers:
            raise ValueError(
                "llama2.c and llama-bench are peers: leave out --llama2c and --llama-bench, or "
                "--no-peers"
            )
        if config.llama2c is not None:
            check_llama2c(config.llama2c)
        programs = named_programs(config.llama_bench)
        setting = setting._replace(llama2c=config.llama2c, llama_bench=programs)
    return setting._replace(quick=isinstance(config, SuiteConfig) and config.quick)


def command_of(config: DryBenchConfig, what: str, device: torch.device) -> str:
    """The command that measures the same again, with the names of files and not their folders."""
    words = ["puna bench" if what == "all" else f"puna bench {what}"]
    if config.rounds:
        words.append(f"--rounds {config.rounds}")
    words += [f"--threads {config.threads}"] if config.threads else []
    words.append("--dry-run" if config.dry_run else f"--device {device}")
    if isinstance(config, KernelBenchConfig) and config.operations:
        words.append(f"--operations {' '.join(config.operations)}")
    if isinstance(config, KernelBenchConfig) and not config.compiled:
        words.append("--no-compiled")
    if isinstance(config, TrainBenchConfig) and config.recompute:
        words.append("--recompute")
    if isinstance(config, ModelBenchConfig):
        if config.shape:
            words.append(f"--shape {' '.join(Path(each).name for each in config.shape)}")
        words += [f"--layers {config.layers}"] if config.layers else []
        words += [] if config.peers else ["--no-peers"]
        words += [] if config.dtype == "auto" else [f"--dtype {config.dtype}"]
    if isinstance(config, DecodeBenchConfig) and config.llama2c is not None:
        words.append(f"--llama2c {config.llama2c.name}")
    if isinstance(config, DecodeBenchConfig) and config.llama_bench:
        words.append(f"--llama-bench {' '.join(named_programs(config.llama_bench))}")
    if isinstance(config, SuiteConfig) and config.quick:
        words.append("--quick")
    return " ".join(words)


def prepare(config: BenchConfig) -> torch.device:
    """The device, with the threads set. ValueError where it is not there."""
    device = device_of_name(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    return device
