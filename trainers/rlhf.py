"""The loop of sections 3.2.1 and 3.2.3: RLHF-V1 .. Vn.

Each version: fresh comparisons between the two newest models at varied temperatures; the old
reward models are asked about them first (are they still right on the new distribution?); then
both reward models are trained on everything so far, rejection sampling fine-tunes, and in the
last versions PPO goes on from there.

    round-1/helpfulness-pairs.jsonl   what is to be compared
    round-1/helpfulness.jsonl         what the annotator said (the same for safety)
    round-1/helpfulness/, safety/     reward models
    round-1/rejection/, ppo/          the version's model
    rounds.jsonl                      one row a version: models, accuracies
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from puna.core import parallel
from puna.core.checkpoint.folder import open_model, open_source, tokenizer_path
from puna.core.tokenizer import Tokenizer
from puna.trainers import ppo, rejection, reward
from puna.trainers.data.packing import encode_pairs
from puna.trainers.data.prompts import draw, load_prompts
from puna.trainers.data.readers import read_preferences, read_prompts
from puna.trainers.rl.comparisons import (
    Annotator,
    Variant,
    annotate,
    sample_pairs,
    write_rows,
)
from puna.trainers.train import loop, next_token
from puna.trainers.train.command import command
from puna.trainers.train.config import check_keys, from_values
from puna.trainers.train.ranges import Batch, Count, CountOrNone, Options, Seed, Temperature
from puna.trainers.train.run import claim

KINDS = ("helpfulness", "safety")


@dataclass(kw_only=True)
class RLHFConfig(Options):
    """The loop V1..Vn: comparisons, reward models, rejection sampling, PPO in the last ones."""

    out: Path
    """folder of the loop; an interrupted loop in it is continued"""
    model: Path
    """the SFT model that V1 starts from"""
    prompts: list[Path]
    """prompts for rejection sampling and PPO; `safety` tags the risky ones"""
    helpfulness_prompts: list[Path]
    """prompts whose answers are compared for helpfulness"""
    safety_prompts: list[Path]
    """prompts whose answers are compared for safety"""
    helpfulness_data: list[Path] = field(default_factory=list)
    """further comparisons, used in every round"""
    safety_data: list[Path] = field(default_factory=list)
    """further comparisons, used in every round"""
    eval_prompts: list[Path] = field(default_factory=list)
    """held-out prompts that PPO stops early by (`patience` in [ppo])"""
    round_prompts: CountOrNone = 0
    """prompts that one round's rejection sampling takes, each round the next of a shuffled order
    (the best answers to earlier ones stay in the pool); 0: all of them every time"""
    versions: Count = 5
    """V1 .. Vn (paper: 5)"""
    ppo_versions: CountOrNone = 1
    """so many of the last versions end with PPO (paper: V5; V4 is unclear)"""
    helpfulness_pairs: Count = 2000
    """comparisons a round"""
    safety_pairs: Count = 1000
    """comparisons a round"""
    temperatures: list[Temperature] = field(default_factory=lambda: [0.8, 1.0, 1.2])
    """the answers to compare are drawn at one of these"""
    max_new_tokens: Count = 512
    """longest answer, tokens"""
    go_on: bool = False
    """train the reward models on from the last round's with fresh data only (the paper starts
    anew from the chat model on all data)"""
    seed: Seed = 0
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"
    """of the matrix products in what this loop samples and scores itself; each stage has its own"""
    generation_batch: Batch = 256
    """answers sampled side by side"""
    reward: dict[str, Any] = field(default_factory=dict)
    """table: options of `puna reward` for both reward models"""
    helpfulness: dict[str, Any] = field(default_factory=dict)
    """table: further options for the helpfulness model"""
    safety: dict[str, Any] = field(default_factory=dict)
    """table: further options for the safety model"""
    rejection: dict[str, Any] = field(default_factory=dict)
    """table: options of `puna rejection`"""
    ppo: dict[str, Any] = field(default_factory=dict)
    """table: options of `puna ppo`"""

    def check(self) -> None:
        if self.ppo_versions and self.ppo.get("patience") and not self.eval_prompts:
            raise ValueError(
                "patience in [ppo] needs eval_prompts to look at; name some or set it to 0"
            )


class Waiting(RuntimeError):
    """Comparisons wait for an annotator; the message says where."""


class Version(NamedTuple):
    """What a round left behind."""

    number: int
    model: Path
    helpfulness: Path
    safety: Path
    pool: Path  # the best answer to each prompt of all rounds so far


def run(config: RLHFConfig, annotators: Mapping[str, Annotator] | None = None) -> Path:
    """Run, or continue, the loop; returns the last version's model folder.

    `annotators` has one for "helpfulness" and one for "safety". Without them the pairs are
    written out and `Waiting` is raised until a file of answers lies beside them.
    """
    check(config)
    if parallel.is_main():
        claim(config.out, config)
    parallel.barrier()
    models = [config.model, config.model]
    last: Version | None = None
    for number in range(1, config.versions + 1):
        last = play_round(config, number, models, last, annotators)
        models.append(last.model)
    assert last is not None
    return last.model


def check(config: RLHFConfig) -> None:
    """ValueError for options that cannot be, before anything is trained."""
    if config.versions < 1 or not 0 <= config.ppo_versions <= config.versions:
        raise ValueError(
            f"versions is {config.versions} and ppo_versions {config.ppo_versions}; there must be "
            "at least one version, and not more with PPO than there are"
        )
    stages: dict[str, type] = {
        "reward": reward.RewardConfig,
        "helpfulness": reward.RewardConfig,
        "safety": reward.RewardConfig,
        "rejection": rejection.RejectionConfig,
        "ppo": ppo.PPOConfig,
    }
    for table, cls in stages.items():
        check_keys(cls, getattr(config, table), f"[{table}]")
        from_values(cls, getattr(config, table), f"{table}.")
    if not config.temperatures:
        raise ValueError("temperatures is empty; name at least one to draw answers at")


def play_round(
    config: RLHFConfig,
    number: int,
    models: list[Path],
    last: Version | None,
    annotators: Mapping[str, Annotator] | None,
) -> Version:
    """One version: compare, train the reward models, sample and fine-tune, PPO if it is due."""
    folder = config.out / f"round-{number}"
    compare(config, number, folder, models, annotators)
    before = accuracy_of(config, last, folder)
    judges = {k: train_reward(config, number, k, folder, models[-1], last) for k in KINDS}
    common = {"seed": config.seed, "device": config.device}
    sampled = from_values(
        rejection.RejectionConfig,
        {
            **common,
            "max_new_tokens": config.max_new_tokens,
            **config.rejection,
            "prompts": [str(path) for path in round_prompts(config, number, folder)],
            "out": str(folder / "rejection"),
            "policy": str(models[-1]),
            "student": str(config.model),
            "round": number,
            "pools": [] if last is None else [str(last.pool)],
            **{kind: str(path) for kind, path in judges.items()},
        },
    )
    model = rejection.run(sampled)
    pool = folder / "rejection" / "selected.jsonl"
    if number > config.versions - config.ppo_versions:
        options = {
            **common,
            "max_new_tokens": config.max_new_tokens,
            **config.ppo,
            "prompts": [str(path) for path in config.prompts],
            "out": str(folder / "ppo"),
            "policy": str(model),
            **{kind: str(path) for kind, path in judges.items()},
        }
        model = ppo.run(from_values(ppo.PPOConfig, options))
    version = Version(number, model, judges["helpfulness"], judges["safety"], pool)
    after = accuracy_of(config, version, folder)
    if parallel.is_main():
        record(config.out / "rounds.jsonl", version, before, after)
    return version


def round_prompts(config: RLHFConfig, number: int, folder: Path) -> list[Path]:
    """The files to sample from in round `number`: all prompts, or its own stretch of them."""
    if config.round_prompts == 0:
        return list(config.prompts)
    path = folder / "prompts.jsonl"
    if parallel.is_main() and not path.exists():
        rows = [row for file in config.prompts for row in read_prompts(file)[0]]
        places = [(number - 1) * config.round_prompts + i for i in range(config.round_prompts)]
        chosen = [rows[draw(place, len(rows), config.seed)[0]] for place in places]
        write_rows(path, [{"messages": p.messages, "safety": p.is_safety} for p in chosen])
    parallel.barrier()
    return [path]


def compare(
    config: RLHFConfig,
    number: int,
    folder: Path,
    models: list[Path],
    annotators: Mapping[str, Annotator] | None,
) -> None:
    """Sample this round's pairs and have them annotated; raises Waiting where nobody has yet."""
    for kind in KINDS:
        pairs, answered = folder / f"{kind}-pairs.jsonl", folder / f"{kind}.jsonl"
        if not parallel.broadcast(answered.exists()):
            sample_kind(config, number, kind, pairs, models)
            if annotators and parallel.is_main():
                annotate(pairs, answered, annotators[kind], number)
    parallel.barrier()
    missing = [kind for kind in KINDS if not (folder / f"{kind}.jsonl").exists()]
    if missing:
        files = " and ".join(f"{kind}-pairs.jsonl" for kind in missing)
        answers = " and ".join(f"{kind}.jsonl" for kind in missing)
        raise Waiting(
            f"{files} in {folder} wait for an annotator: write the preferences to {answers} there "
            "(messages, chosen, rejected, rating, safety), then run the same command"
        )


def sample_kind(
    config: RLHFConfig, number: int, kind: str, pairs: Path, models: list[Path]
) -> None:
    """Answers of the two newest models to this kind's prompts, in pairs."""
    tokenizer = Tokenizer(tokenizer_path(config.model))
    longest = open_source(models[-1]).config.context - config.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in the model's "
            "context; lower it"
        )
    prompts, skipped = load_prompts(getattr(config, f"{kind}_prompts"), tokenizer, longest)
    next_token.say(skipped)
    temperatures = tuple(config.temperatures)
    sample_pairs(
        pairs,
        (Variant(models[-1], temperatures), Variant(models[-2], temperatures)),
        tokenizer,
        prompts,
        getattr(config, f"{kind}_pairs"),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        round_index=2 * number + KINDS.index(kind),
        device=loop.device_of_name(config.device),
        batch_size=config.generation_batch,
        compute_dtype=loop.DTYPES[config.dtype],
    )


def train_reward(
    config: RLHFConfig, number: int, kind: str, folder: Path, chat: Path, last: Version | None
) -> Path:
    """The round's reward model of this kind."""
    rounds = [config.out / f"round-{n}" / f"{kind}.jsonl" for n in range(1, number + 1)]
    start = chat
    if config.go_on and last is not None:
        start, rounds = getattr(last, kind), rounds[-1:]
    data = [*getattr(config, f"{kind}_data"), *rounds]
    options = {
        "seed": config.seed,
        "device": config.device,
        **config.reward,
        **getattr(config, kind),
        "out": str(folder / kind),
        "model": str(start),
        "data": [str(path) for path in data],
    }
    return reward.run(from_values(reward.RewardConfig, options))


def accuracy_of(
    config: RLHFConfig, version: Version | None, folder: Path
) -> dict[str, dict[str, float]]:
    """Accuracy of a version's reward models on a round's comparisons, by kind and rating."""
    found: dict[str, dict[str, float]] = {}
    if version is None:
        return found
    for kind in KINDS:
        path = getattr(version, kind)
        model = parallel.load(
            open_model(path),
            loop.device_of_name(config.device),
            compute_dtype=loop.DTYPES[config.dtype],
        )
        rows, _ = read_preferences(folder / f"{kind}.jsonl")
        tokenizer = Tokenizer(tokenizer_path(path))
        pairs, _ = encode_pairs(tokenizer, rows, model.config.context)
        device = model.head_weight.device
        found[kind] = reward.accuracies(*reward.margins_of(model, pairs, 64, device))
    return found


def record(
    path: Path,
    version: Version,
    before: dict[str, dict[str, float]],
    after: dict[str, dict[str, float]],
) -> None:
    """Append the version's row, once."""
    rows = [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["version"] < version.number]
    row = {
        "version": version.number,
        "model": str(version.model),
        "accuracy_before_training": before,
        "accuracy_on_trained": after,
    }
    write_rows(path, [*rows, row])


def main() -> None:
    sys.exit(command("python -m puna.trainers.rlhf", RLHFConfig, run))


if __name__ == "__main__":
    main()
