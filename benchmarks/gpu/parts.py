"""The parts of `make gpu` in their order: what is right comes before what is fast, what a tenth of
an hour can hold before what takes hours."""

import sys
from importlib.util import find_spec
from typing import NamedTuple

from puna.benchmarks.gpu.bars import LOSSES, MEMORY

WORKERS = 8  # pytest's processes: they compile on cores of their own and share the GPU

# The tests that need a GPU, by the part that runs them (tests/test_gpu_run.py: none is missing).
TESTS = {
    "norms": ("rms_norm_triton", "rope_triton", "swiglu_triton", "backend", "surroundings"),
    "attention": ("attention_triton", "attention_operator", "decode_attention_triton"),
    "losses": ("linear_cross_entropy_triton", "linear_logprobs_triton"),
    "sampling": ("sample_triton", "gae_triton", "same_numbers", "bench_kernels"),
    "generation": ("model", "gpu_generation", "graphs"),
    "stages": ("gpu_stages", "triton_stages"),
}
# What compute-sanitizer looks at: one test or two an operation, all of small shapes.
SANITIZED = "error_against_pytorch or no_worse_than_pytorch or strided or several_chunks"
OPERATIONS = ("norms", "attention", "losses", "sampling")


class Part(NamedTuple):
    name: str  # also of the file that holds what it prints
    command: list[str]
    seconds: int  # it may take
    tool: str = ""  # a program without which it is left out
    environment: tuple[tuple[str, str], ...] = ()
    of_missed: bool = False  # takes the operations that missed a bar, with commas between them


def parts(dry: bool = False, layers: int = 0) -> list[Part]:
    """All of them. `layers`: how many blocks of 7B are measured, 0: as many as fit. `dry`: the same
    on a CPU, where tests are collected only and benches run at tiny sizes."""
    at_work = ["-n", str(WORKERS), "--dist", "loadfile"] if find_spec("xdist") else []

    def tests(*names: str) -> list[str]:
        files = [f"tests/test_{file}.py" for name in names for file in TESTS[name]]
        # It takes the place of pyproject's "not slow", so that it must say that, too.
        marked = ["-m", "gpu and not slow", *(["--collect-only"] if dry else [])]
        return python("pytest", "-q", *marked, *files)

    def bench(what: str, *flags: str, rounds: int = 0) -> list[str]:
        model = [] if what == "kernels" else ["--shape", "7b"]
        model += ["--layers", str(layers)] if layers and model else []
        if dry:
            model, rounds = [], 1
        told = ["--rounds", str(rounds)] if rounds else []
        told += ["--dry-run"] if dry else ["--device", "cuda", "--save"]
        return python("puna.cli.main", "bench", what, *flags, *model, *told)

    def kernels(*operations: str, compiled: bool = False) -> list[str]:
        plain = [] if compiled and not dry else ["--no-compiled"]
        return bench("kernels", "--operations", *operations, *plain)

    def sanitizer(tool: str) -> list[str]:
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
        return [*command, "--error-exitcode", "9", *tests(*OPERATIONS), "-k", SANITIZED]

    first = python("puna.benchmarks.gpu.first_calls", *(["--dry-run"] if dry else []))
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "-k", "regex:_kernel", "-c", "60"]
    # Each allocation by itself: in a block of PyTorch's cache what lies past an end is there.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    interpreted = (("TRITON_INTERPRET", "1"),) if dry else ()
    whole = ["--dry-run", "--rounds", "1"] if dry else ["--device", "cuda", "--save"]
    cut = ["--shape", "7b", "--layers", str(layers)] if layers and not dry else []
    return [
        *(Part(name, [*tests(name), *at_work], 400) for name in OPERATIONS),
        *(Part(name, tests(name), 200) for name in ("generation", "stages")),
        Part("first-calls", first, 200, environment=interpreted),
        Part("bench-norms", kernels(*MEMORY, compiled=True), 240),
        Part("bench-attention", kernels("attention", "decode_attention"), 150),
        Part("bench-losses", kernels(*LOSSES), 150),
        Part("bench-train", bench("train", "--no-peers", rounds=3), 300),
        Part("bench-recompute", bench("train", "--recompute", rounds=3), 300),
        Part("bench-generate", bench("generate", "--no-peers", rounds=2), 400),
        Part("bench-rlhf", bench("rlhf", rounds=1), 400),
        Part("bench-rollout", bench("rollout", "--no-peers", rounds=1), 600),
        Part("memcheck", sanitizer("memcheck"), 1800, "compute-sanitizer", uncached),
        Part("racecheck", sanitizer("racecheck"), 1800, "compute-sanitizer"),
        Part("bench-sampling", kernels("sample", "gae", compiled=True), 150),
        Part("bench-all", python("puna.cli.main", "bench", *whole, *cut), 4 * 3600),
        Part("bench-growth", python("puna.cli.main", "bench", "growth", *whole), 3600),
        Part("profile", [*ncu, *first, "--only"], 1800, "ncu", of_missed=True),
    ]


def python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]
