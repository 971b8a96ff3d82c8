"""`puna <verb> [recipe.toml] [--flag value]`: finds the verb, parses its configuration, runs it.

A verb's module is imported only when it is called, so that `puna --help` answers at once.
"""

import importlib
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import puna
from puna.core import starting
from puna.core.terminal import outlasting, say


class Verb(NamedTuple):
    module: str
    config: str  # the dataclass in that module
    summary: str
    function: str = "run"
    named: tuple[str, ...] = ()  # options that may be given without their names, in this order


VERBS = {
    "demo": Verb("puna.demo.pipeline", "DemoConfig", "all of Llama 2, small, on this machine"),
    "demo real": Verb(
        "puna.demo.real",
        "RealConfig",
        "a real small model through SFT, reward models and PPO, on your comparisons",
    ),
    "reproduce": Verb(
        "puna.demo.reproduce.run", "ReproduceConfig", "the experiments behind the four questions"
    ),
    "tokenizer train": Verb(
        "puna.cli.tokenizer", "TrainTokenizer", "train a SentencePiece tokenizer"
    ),
    "tokenizer encode": Verb("puna.cli.tokenizer", "Encode", "show the ids of a text"),
    "tokenizer inspect": Verb("puna.cli.tokenizer", "Inspect", "describe a tokenizer"),
    "pretrain": Verb("puna.trainers.pretrain", "PretrainConfig", "next-token training on text"),
    "sft": Verb("puna.trainers.sft", "SFTConfig", "supervised fine-tuning on dialogues"),
    "reward": Verb("puna.trainers.reward", "RewardConfig", "train a reward model on comparisons"),
    "sample": Verb("puna.trainers.sample", "SampleConfig", "K answers a prompt, the best kept"),
    "rejection": Verb(
        "puna.trainers.rejection", "RejectionConfig", "sample K answers, train on the best"
    ),
    "ppo": Verb("puna.trainers.ppo", "PPOConfig", "reinforcement learning by PPO"),
    "gatt": Verb("puna.trainers.gatt", "GAttConfig", "Ghost Attention: keep instructions"),
    "distill": Verb(
        "puna.trainers.distill", "DistillConfig", "safety context distillation: under a pre-prompt"
    ),
    "rlhf": Verb("puna.trainers.rlhf", "RLHFConfig", "the loop V1..Vn over the stages"),
    "annotate": Verb(
        "puna.annotate.run", "AnnotateConfig", "the page where people compare two answers"
    ),
    "annotate export": Verb(
        "puna.annotate.exchange", "ExportConfig", "comparisons as rows to learn from", "export"
    ),
    "annotate import": Verb(
        "puna.annotate.exchange", "ImportConfig", "comparisons from elsewhere", "bring"
    ),
    "evaluate": Verb(
        "puna.trainers.evaluate", "EvaluateConfig", "accuracy and calibration of a reward model"
    ),
    "evaluate chat": Verb(
        "puna.trainers.evaluation.chat",
        "EvaluateChatConfig",
        "win rate, violations, refusals, instructions kept, diversity of chat models",
    ),
    "data": Verb(
        "puna.cli.data", "DataConfig", "what would be read of a file, and how",
        named=("file",),
    ),
    "plan": Verb("puna.trainers.capacity.plan", "PlanConfig", "what a recipe needs on given GPUs"),
    "score": Verb("puna.trainers.score", "ScoreConfig", "the reward of texts"),
    "generate": Verb("puna.cli.generate", "GenerateConfig", "continue a prompt"),
    "chat": Verb("puna.cli.chat", "ChatConfig", "talk to a model"),
    "convert": Verb(
        "puna.cli.convert", "ConvertConfig", "between checkpoint formats",
        named=("source", "target"),
    ),
    "bench": Verb("puna.cli.bench", "SuiteConfig", "the benchmark suite"),
    "bench train": Verb("puna.cli.bench", "TrainBenchConfig", "of training only", "train"),
    "bench kernels": Verb(
        "puna.cli.bench", "KernelBenchConfig", "of kernels/, verified and timed", "kernels"
    ),
    "bench generate": Verb("puna.cli.bench", "ModelBenchConfig", "of generation only", "generate"),
    "bench decode": Verb("puna.cli.bench", "DecodeBenchConfig", "of decoding on CPUs", "decode"),
    "bench weights": Verb(
        "puna.cli.bench", "WeightsBenchConfig", "of bf16 and int8 weights", "weights"
    ),
    "bench rollout": Verb("puna.cli.bench", "ModelBenchConfig", "of rollouts only", "rollout"),
    "bench rlhf": Verb("puna.cli.bench", "ModelBenchConfig", "of one iteration of PPO", "rlhf"),
    "bench fsdp": Verb("puna.cli.bench", "ModelBenchConfig", "of several ranks", "fsdp"),
    "bench busy": Verb("puna.cli.bench", "ModelBenchConfig", "beside busy neighbours", "busy"),
    "bench growth": Verb("puna.cli.bench", "DryBenchConfig", "of how cost grows", "growth"),
    "bench report": Verb(
        "puna.cli.bench", "ReportConfig", "a page of results", "report", named=("folder",)
    ),
    "bench compare": Verb(
        "puna.cli.bench", "CompareConfig", "what changed between two runs", "compare",
        named=("before", "after"),
    ),
}  # fmt: skip

SHARED = {  # among the ranks that torchrun starts; what others do, each of these would do
    "pretrain", "sft", "reward", "sample", "rejection", "ppo", "gatt", "distill", "rlhf",
    "evaluate", "evaluate chat", "score", "generate",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. A user's mistake is one sentence on stderr."""
    with outlasting():
        return obeyed(list(sys.argv[1:] if argv is None else argv))


def obeyed(arguments: list[str]) -> int:
    """The exit status of a command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage())
        return 0
    if arguments[0] == "--version":
        say(f"puna {puna.__version__}")
        return 0
    if arguments[0] == "help":
        return obeyed([*arguments[1:], "--help"])
    name = arguments.pop(0)
    if arguments and f"{name} {arguments[0]}" in VERBS:
        name = f"{name} {arguments.pop(0)}"
    if name not in VERBS:
        near = [verb for verb in VERBS if verb.split()[0] == name] or list(VERBS)
        if len(near) < len(VERBS) and arguments and arguments[0].isalpha():
            name = f"{name} {arguments[0]}"
        say(f"puna: no verb '{name}'; there is {', '.join(near)}", error=True)
        return 2
    parts = [verb.partition(" ")[2] for verb in VERBS if verb.startswith(f"{name} ")]
    if parts and arguments and arguments[0].isalpha() and not Path(arguments[0]).exists():
        say(f"puna {name}: no part '{arguments[0]}'; there is {', '.join(parts)}", error=True)
        return 2
    return run_verb(name, arguments)


def run_verb(name: str, arguments: Sequence[str]) -> int:
    verb = VERBS[name]
    if name not in SHARED and os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ.get("RANK", "0") == "0":
            words = "is work for one process; start it without torchrun, or unset WORLD_SIZE"
            say(f"puna {name}: this {words}", error=True)
        return 1
    starting.begins()
    module = importlib.import_module(verb.module)
    from puna.trainers.train.command import command

    starting.is_done()
    config, work = getattr(module, verb.config), getattr(module, verb.function)
    from puna.trainers.train.arguments import several_valued

    given = with_names(verb, arguments, several_valued(config))
    return command(f"puna {name}", config, work, given)


def with_names(verb: Verb, arguments: Sequence[str], several: Collection[str] = ()) -> list[str]:
    """`puna convert SOURCE TARGET` as if the options had been named; other options, which take one
    value each, may stand before, between and behind. What follows one that takes `several` is
    its own."""
    flags = {argument.split("=")[0] for argument in arguments}
    names = [f"--{name}" for name in verb.named if f"--{name}" not in flags]
    found: list[str] = []
    for number, argument in enumerate(arguments):
        if argument.split("=")[0].removeprefix("--").replace("-", "_") in several:
            return found + list(arguments[number:])
        before = arguments[number - 1] if number else ""
        is_value = before.startswith("--") and "=" not in before
        if names and not (
            (argument.startswith("-") and argument != "-") or is_value or argument.endswith(".toml")
        ):
            found.append(names.pop(0))
        found.append(argument)
    return found


def usage() -> str:
    width = max(map(len, VERBS))
    rows = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: puna <verb> [recipe.toml] [--flag value]",
            "",
            *rows,
            "",
            "puna <verb> --help shows a verb's options with their defaults.",
            "puna --version shows the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
