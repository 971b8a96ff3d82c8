"""The whole of Llama 2, small: pretraining, SFT, RLHF V1..V5 with Ghost Attention, measured.

Each stage is the trainer that a user would call, with the settings of `recipes/demo/`. A stage
that is done is passed over and one that was interrupted goes on, so the same command continues.

    data/ tokenizer/ pretrain/ sft/ rlhf/   what each stage left
    student/          with `student`: a smaller model, taught by the last version's answers
    evaluation.json   everything measured;  summary.json, report.html   made from it
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from puna.core.checkpoint.atomic import write_text
from puna.core.documents import json_rows
from puna.core.terminal import say
from puna.core.text.tokenizer import train_tokenizer
from puna.demo import evaluation
from puna.demo.evaluation import newest
from puna.demo.kept import seconds
from puna.demo.products import Products, products
from puna.demo.report.build import write_report, write_summary
from puna.demo.village import oracle, world
from puna.trainers import pretrain, rlhf, sft
from puna.trainers.rl.comparisons import write_rows
from puna.trainers.rl.config import RLHFConfig
from puna.trainers.train.claim import owned
from puna.trainers.train.config import find_recipe, from_values, load_recipe
from puna.trainers.train.kinds import FREE
from puna.trainers.train.ranges import Above, AtMost, Options, Seed

Config = TypeVar("Config")
VOCABULARY = 1280  # every word of the world is one piece: 20 exchanges fit the context
DOCUMENTS = 26_000  # of pretraining: about three million tokens
SMALLER = "micro"  # size of the student: a third of the demo's parameters


@dataclass(kw_only=True)
class DemoConfig(Options):
    """Run all of Llama 2 on a small made-up world, on this machine's CPU."""

    out: Path = Path("runs/demo")
    """folder of the run; an interrupted run in it is continued"""
    seed: Seed = 0
    """of the world and of every stage"""
    scale: Annotated[float, Above(0), AtMost(1000)] = 1.0
    """amount of data and steps; 0.03 takes about a minute and shows only that all runs"""
    dtype: Products = "auto"
    """of the matrix products of all stages; auto: bf16 where the processor multiplies it"""
    student: Annotated[bool, FREE] = False
    """also make a smaller model and fine-tune it on the answers that the last version selected, as
    the paper's smaller models learned from its largest"""


def run(config: DemoConfig) -> Path:
    """Run, or continue, the demo; returns the report's path."""
    began = time.monotonic()
    demo = Demo(config)
    with owned(demo.config):
        demo.stage("data", demo.write_world)
        demo.stage("tokenizer", demo.train_tokenizer)
        demo.stage("pretrain", demo.pretrain)
        demo.stage("sft", demo.sft)
        demo.stage("rlhf", demo.rlhf)
        if config.student:
            demo.stage("student", demo.student)
        demo.stage(
            "evaluation",
            lambda: evaluation.write_evaluation(demo.out, demo.versions(), demo.config),
        )
        write_summary(demo.out)
        report = write_report(demo.out)
    say(
        f"\nDone in {demo.seconds():.0f} s ({time.monotonic() - began:.0f} s in this call)."
        f"\nReport: {report}"
        f"\nTalk to the model: puna chat --model {demo.versions()[newest(demo.versions())]}"
        f"\nCompare the last two versions yourself: {demo.annotating()}"
    )
    return report


def training_sets(
    seed: int, n: Callable[[int, int], int] = max
) -> dict[str, Callable[[], list[Any]]]:
    """All data that any stage is trained on, by file name; `n` scales a full size, given the least.

    What the stages make besides are models' answers to these prompts.
    """
    return {
        "pretrain": lambda: list(world.pretraining(seed, n(DOCUMENTS, 600))),
        "sft": lambda: list(world.demonstrations(seed, n(5_000, 200))),
        "personas": lambda: world.persona_demonstrations(seed, n(1_600, 24)),
        "gatt-personas": lambda: world.persona_demonstrations(
            seed, n(1_600, 24), world.GHOST_KINDS
        ),
        "prompts": lambda: world.prompts(seed, n(5_400, 96), "rlhf"),
        "helpfulness": lambda: world.prompts(seed, n(4_500, 64), "helpfulness"),
        "safety": lambda: world.prompts(seed, n(1_500, 64), "safety"),
        "gatt": lambda: [ghost_row(d) for d in world.persona_dialogues(seed, n(1_000, 12))],
    }


class Demo:
    """The stages of one demo run, in its folder."""

    def __init__(self, config: DemoConfig):
        # What is noted is the format itself: that holds on any machine.
        self.config = replace(config, dtype=products(config.dtype))
        self.out = config.out
        self.data = config.out / "data"

    def stage(self, name: str, work: Callable[[], Any]) -> None:
        """Do one stage and note how long it took, all calls together."""
        began = time.monotonic()
        try:
            work()
        finally:
            spent = seconds(self.out)
            spent[name] = spent.get(name, 0.0) + time.monotonic() - began
            write_text(self.out / "seconds.json", json.dumps(spent, indent=2))

    def seconds(self) -> float:
        return sum(seconds(self.out).values())

    def scaled(self, count: int, least: int = 1) -> int:
        return max(least, round(count * self.config.scale))

    def settings(self, cls: type[Config], recipe: str, **values: Any) -> Config:
        """The demo's recipe for a stage with this run's paths and seed."""
        path = find_recipe(f"demo/{recipe}.toml")
        given = {
            "seed": self.config.seed,
            "device": "cpu",
            "dtype": self.config.dtype,
            **load_recipe(cls, path),
            **values,
        }
        return from_values(cls, given)

    def write_world(self) -> None:
        """Everything that is drawn from the world before a model exists."""
        for name, make in training_sets(self.config.seed, self.scaled).items():
            if not (self.data / f"{name}.jsonl").exists():
                write_rows(self.data / f"{name}.jsonl", make())

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer" / "tokenizer.model"

    def train_tokenizer(self) -> None:
        if not self.tokenizer.exists():
            texts = world.tokenizer_texts(self.config.seed, 4_000)
            train_tokenizer(texts, self.tokenizer, vocab_size=VOCABULARY)

    def pretrain(self, steps: int | None = None) -> None:
        """Of the recipe's steps, or of so many, at this run's scale."""
        self._pretrain(self.out, steps)

    def _pretrain(self, folder: Path, steps: int | None = None, **values: Any) -> None:
        recipe = load_recipe(pretrain.PretrainConfig, find_recipe("demo/pretrain.toml"))
        pretrain.run(
            self.settings(
                pretrain.PretrainConfig,
                "pretrain",
                out=str(folder / "pretrain"),
                data=[str(self.data / "pretrain.jsonl")],
                tokenizer=str(self.tokenizer),
                steps=self.scaled(steps or recipe["steps"], 20),
                **values,
            )
        )

    def sft(self) -> None:
        self._sft(self.out)

    def _sft(self, folder: Path) -> None:
        sft.run(
            self.settings(
                sft.SFTConfig,
                "sft",
                out=str(folder / "sft"),
                model=str(folder / "pretrain" / "model"),
                data=[str(self.data / "sft.jsonl")],
            )
        )

    def student(self) -> None:
        """A smaller model, then the same one fine-tuned on the best answers of all versions (paper
        section 3.2.3: only the 70B samples)."""
        folder, loop = self.out / "student", self.rlhf_config()
        self._pretrain(folder, size=SMALLER)
        self._sft(folder)
        selected = loop.out / f"round-{loop.versions}" / "rejection" / "selected.jsonl"
        rlhf.teach(loop, folder, folder / "sft" / "model", selected)

    def rlhf(self) -> None:
        """V1..Vn, compared by the oracle."""
        rlhf.run(self.rlhf_config(), annotators(self.config.seed), judge=oracle.judge)

    def rlhf_config(self) -> RLHFConfig:
        """The demo's loop in this run's folder."""
        recipe = load_recipe(RLHFConfig, find_recipe("demo/rlhf.toml"))
        ppo = {**recipe["ppo"], "iterations": self.scaled(recipe["ppo"]["iterations"], 4)}
        ppo["critic_warmup"] = min(ppo["critic_warmup"], ppo["iterations"] // 2)
        given = {"dtype": self.config.dtype}
        return self.settings(
            RLHFConfig,
            "rlhf",
            out=str(self.out / "rlhf"),
            model=str(self.out / "sft" / "model"),
            prompts=[str(self.data / "prompts.jsonl")],
            helpfulness_prompts=[str(self.data / "helpfulness.jsonl")],
            safety_prompts=[str(self.data / "safety.jsonl")],
            helpfulness_pairs=self.scaled(recipe["helpfulness_pairs"], 128),
            safety_pairs=self.scaled(recipe["safety_pairs"], 128),
            reward={**given, **recipe["reward"]},
            rejection={**given, **recipe["rejection"], "mix": [str(self.data / "personas.jsonl")]},
            round_prompts=self.scaled(recipe["round_prompts"], 32),
            gatt_dialogues=[str(self.data / "gatt.jsonl")],
            gatt={**given, **recipe["gatt"], "mix": [str(self.data / "gatt-personas.jsonl")]},
            ppo={**given, **ppo},
        )

    def versions(self) -> dict[str, Path]:
        """Model folders by the names of the summary, in the order in which they were made: of a
        version with PPO the model before it, too, of one with Ghost Attention the model after."""
        found = {"sft": self.out / "sft" / "model"}
        for _, row in json_rows(self.out / "rlhf" / "rounds.jsonl"):
            name, steps = f"rlhf-v{row['version']}", row["steps"]
            found[f"{name}-rejection" if "ppo" in steps else name] = Path(steps["rejection"])
            if "gatt" in steps:
                found["gatt"] = Path(steps["gatt"])
            if "ppo" in steps:
                found[name] = Path(steps["ppo"])
        student = self.out / "student"
        if (student / "student" / "model").exists():
            found["student-sft"] = student / "sft" / "model"
            found["student"] = student / "student" / "model"
        return found

    def annotating(self) -> str:
        """The command by which people compare the loop's last two versions."""
        versions = self.versions()
        names = [n for n in versions if n.startswith("rlhf-") and not n.endswith("-rejection")]
        models = " ".join(str(versions[name]) for name in names[:-3:-1])
        prompts, out = self.data / "prompts.jsonl", self.out / "comparisons.db"
        return f"puna annotate --models {models} --prompts {prompts} --out {out}"


def annotators(seed: int) -> Mapping[str, Any]:
    """The oracle as the annotator of both kinds of comparisons."""
    return {
        "helpfulness": oracle.annotator(seed),
        "safety": oracle.annotator(seed, safety=True),
    }


def ghost_row(dialogue: world.PersonaDialogue) -> dict[str, Any]:
    """A persona dialogue in the file format of `puna gatt`."""
    return {
        "instruction": dialogue.instruction,
        "short": dialogue.short,
        "turns": dialogue.questions,
    }
