"""The loop of sections 3.2.1 and 3.2.3: RLHF-V1 .. Vn.

Each version: fresh comparisons between the two newest models at varied temperatures; the old
reward models are asked about them first (are they still right on the new distribution?); then
both reward models are trained on everything so far and rejection sampling fine-tunes. Ghost
Attention goes on from there in one version, PPO in the last ones.

    round-1/helpfulness-pairs.jsonl   what is to be compared (-drawn-1, -drawn-2: while it is drawn)
    round-1/helpfulness.jsonl         what the annotator said (the same for safety)
    round-1/helpfulness/, safety/     reward models
    round-1/rejection/, gatt/, ppo/   the version's model, step by step
    round-1/student/                  the student's, where there is one
    rounds.jsonl                      one row a version: models, accuracies
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from puna.core import parallel, ranks
from puna.core.checkpoint.folder import open_model, open_source, tokenizer_path
from puna.core.device import device_of_name
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import gatt, ppo, rejection
from puna.trainers.data.ghost import read_ghost_dialogues
from puna.trainers.data.packing import encode_pairs
from puna.trainers.data.prompts import common_tokenizer
from puna.trainers.data.readers import read_dialogues, read_preferences, read_prompts
from puna.trainers.reward import RewardConfig, accuracies, margins_of
from puna.trainers.reward import run as run_reward
from puna.trainers.rl import rounds
from puna.trainers.rl.comparisons import Annotator
from puna.trainers.rl.config import SET_BY_THE_LOOP, PPOConfig, RLHFConfig, SamplingConfig
from puna.trainers.rl.rewards import Reward
from puna.trainers.rl.rounds import KINDS
from puna.trainers.rl.rounds import Waiting as Waiting
from puna.trainers.train import loop
from puna.trainers.train.claim import CONFIG, changes, is_finished, owned
from puna.trainers.train.command import command
from puna.trainers.train.config import check_table, from_values
from puna.trainers.train.layout import of_stage
from puna.trainers.train.notice import notice
from puna.trainers.train.precision import compute_dtype
from puna.trainers.train.recipes import read_toml


class Version(NamedTuple):
    """What a round left behind."""

    number: int
    model: Path
    judges: dict[str, Path]  # reward models by kind; empty where a reward was handed over
    selected: Path  # the best answer to each prompt of all rounds so far
    pools: tuple[Path, ...]  # the best few answers of each round so far
    start: Path  # what later versions are fine-tuned from


# What each stage's table may not say, because the loop says it, and what to say instead.
STAGES: dict[str, tuple[type, dict[str, str]]] = {
    "reward": (RewardConfig, SET_BY_THE_LOOP["reward"]),
    "helpfulness": (RewardConfig, SET_BY_THE_LOOP["reward"]),
    "safety": (RewardConfig, SET_BY_THE_LOOP["reward"]),
    "rejection": (rejection.RejectionConfig, SET_BY_THE_LOOP["rejection"]),
    "gatt": (gatt.GAttConfig, SET_BY_THE_LOOP["gatt"]),
    "ppo": (PPOConfig, SET_BY_THE_LOOP["ppo"]),
}


def run(
    config: RLHFConfig,
    annotators: Mapping[str, Annotator] | None = None,
    reward: Reward | None = None,
    judge: gatt.Judge | None = None,
) -> Path:
    """Run, or continue, the loop; returns the last version's model folder.

    `annotators` has one for "helpfulness" and one for "safety". Without them people compare (see
    `annotations`), or `Waiting` is raised until answers lie beside the pairs. With a `reward`
    of one's own nothing is compared and no reward model is trained: it scores every answer.
    `judge` says which answers Ghost Attention may learn from.
    """
    ranks.init()
    check(config, reward)
    check_handed(config, annotators, reward, judge)
    rounds.check_people(config, annotators, reward)
    check_files(config)
    tables = {name: cls for name, (cls, _) in STAGES.items()}
    with owned(config, tables=tables, given={"reward": reward, "judge": judge}):
        models = [config.model, config.model]
        last: Version | None = None
        for number in range(1, config.versions + 1):
            last = play_round(config, number, models, last, Handed(annotators, reward, judge))
            models.append(last.model)
    assert last is not None
    notice(f"{config.out} is finished; V{last.number} is {last.model}")
    return last.model


ASKED = 1_000  # comparisons of a round, to tell an accuracy by (paper: 1,000 of each batch)


class Handed(NamedTuple):
    """What is given from Python."""

    annotators: Mapping[str, Annotator] | None
    reward: Reward | None
    judge: gatt.Judge | None


READING = ("columns", "roles", "on_error")  # of all stages whose tables do not say otherwise
Stage = TypeVar("Stage", bound=loop.TrainConfig)


def once(stage: Stage, work: Callable[[Stage], Path]) -> Path:
    """A stage's model: what is finished stays as it is, whatever has been amended since."""
    model = stage.out / "model"
    there = parallel.on_main(lambda: is_finished(stage.out) and (model / "config.json").exists())
    if not there:
        return work(stage)
    if parallel.is_main() and changes(read_toml(stage.out / CONFIG), stage, {})[1]:
        notice(f"{stage.out} is done and stays as it is")
    return model


def check(config: RLHFConfig, reward: Reward | None = None) -> None:
    """ValueError for options that cannot be, before anything is trained."""
    for table, (cls, taken) in STAGES.items():
        check_table(cls, getattr(config, table), table, taken, {})
    # Whole configurations, too: what does not fit together must not wait for the annotators.
    judges = {} if reward is not None else {kind: config.model for kind in KINDS}
    rejection_config(config, 1, config.prompts, config.model, None, judges)
    if bool(config.gatt_version) != bool(config.gatt_dialogues):
        raise ValueError(
            "Ghost Attention needs both gatt_version and gatt_dialogues; give both or neither"
        )
    if config.gatt_version:
        gatt_config(config, config.gatt_version, config.model)
    if config.ppo_versions:
        ppo.check(ppo_config(config, 1, config.model, judges))
    for kind in judges:
        reward_config(config, 1, kind, config.model, None)
    for kind in KINDS:
        if reward is None and not getattr(config, f"{kind}_prompts"):
            raise ValueError(
                f"{kind}_prompts is empty; name files of prompts to compare answers to"
            )


def check_handed(
    config: RLHFConfig,
    annotators: Mapping[str, Annotator] | None,
    reward: Reward | None,
    judge: gatt.Judge | None,
) -> None:
    """ValueError for functions that would not be asked, or are missing."""
    if judge is not None and not config.gatt_version:
        raise ValueError("the judge is of Ghost Attention; set gatt_version or leave it out")
    if annotators is not None and reward is not None:
        raise ValueError("with a reward of your own nothing is compared: leave the annotators out")
    if annotators is not None and (missing := [k for k in KINDS if k not in annotators]):
        raise ValueError(f"annotators has none for {missing[0]}; give one for each of {KINDS}")


def check_files(config: RLHFConfig) -> None:
    """ValueError for a file that is named and cannot be used: some are needed days later."""
    common_tokenizer(config.model, *[config.student] if config.student else [])
    for model in (config.model, config.student):
        if model is not None and open_source(model).head != "lm":
            raise ValueError(f"{model} is a reward model; the loop starts from language models")
    prompts = ("prompts", "rejection_prompts", "ppo_prompts", "eval_prompts")
    for name in (*prompts, "helpfulness_prompts", "safety_prompts"):
        for path in getattr(config, name):
            read_prompts(path, config)
    rejected = rejection_config(config, 1, config.prompts, config.model, None, {})
    sampled: list[SamplingConfig] = [
        rejected,
        *([ppo_config(config, 1, config.model, {})] if config.ppo_versions else []),
    ]
    rounds.check_prompts(config, sampled)
    talking: list[rejection.RejectionConfig | gatt.GAttConfig] = [rejected]
    if config.gatt_dialogues:
        table = gatt_config(config, config.gatt_version, config.model)
        read_ghost_dialogues(config.gatt_dialogues, table.instructions, table.seed, table)
        talking.append(table)
    for each in talking:
        for path in given(config, each.mix):
            read_dialogues(path, each)
    for kind in KINDS:
        stage = reward_config(config, 1, kind, config.model, None)
        for path in given(config, [*getattr(config, f"{kind}_data"), *stage.mix, *stage.eval_data]):
            read_preferences(path, stage)


def given(config: RLHFConfig, paths: Sequence[Path]) -> list[Path]:
    """Those that the loop does not write itself, later."""
    return [path for path in paths if not path.is_relative_to(config.out)]


def play_round(
    config: RLHFConfig,
    number: int,
    models: list[Path],
    last: Version | None,
    handed: Handed,
) -> Version:
    """One version: compare, train the reward models, sample and fine-tune, and what else is due."""
    folder = config.out / f"round-{number}"
    judges: dict[str, Path] = {}
    before: dict[str, dict[str, float]] = {}
    reward = handed.reward
    if reward is None:
        rounds.compare(config, number, folder, models, handed.annotators)
        before = accuracy_of(config, last, folder)
        judges = {
            kind: once(reward_config(config, number, kind, models[-1], last), run_reward)
            for kind in KINDS
        }
        rounds.keep_comparisons(folder)
    prompts = rounds.round_prompts(config, number, folder)
    sampled = rejection_config(config, number, prompts, models[-1], last, judges)
    steps = {"rejection": once(sampled, lambda stage: rejection.run(stage, reward))}
    selected, pool = (folder / "rejection" / f"{name}.jsonl" for name in ("selected", "pool"))
    if config.student is not None:
        teach(config, folder, config.student, selected)
    start = start_of(config, last)
    if number == config.gatt_version:
        rounds.own_answers(config, selected, folder / "gatt-mix.jsonl")
        ghost = gatt_config(config, number, steps["rejection"])
        start = steps["gatt"] = once(ghost, lambda stage: gatt.run(stage, handed.judge))
    improved = ppo_config(config, number, [*steps.values()][-1], judges)
    due = number > config.versions - config.ppo_versions
    if due or parallel.on_main(lambda: is_finished(improved.out)):  # before more were asked for
        steps["ppo"] = once(improved, lambda stage: ppo.run(stage, reward))
    pools = (*(last.pools if last else ()), pool)
    version = Version(number, [*steps.values()][-1], judges, selected, pools, start)
    after = accuracy_of(config, version, folder)
    if parallel.is_main():
        wins = rounds.newest_wins(folder, number) if judges else {}
        rounds.record(config.out / "rounds.jsonl", number, steps, before, after, wins)
    return version


def stage_options(
    config: RLHFConfig, table: Mapping[str, Any], judges: Mapping[str, Path]
) -> dict[str, Any]:
    """A sampling stage's options: the loop's, its table's over them, and the reward models."""
    names = "seed amend device timeout max_new_tokens cache_gb sampling_tp engine"
    return {
        **{name: getattr(config, name) for name in (*names.split(), *READING)},
        **table,
        **{kind: str(path) for kind, path in judges.items()},
        "parallel": of_stage(config.parallel, table),
    }


def rejection_config(
    config: RLHFConfig,
    number: int,
    prompts: Sequence[Path],
    policy: Path,
    last: Version | None,
    judges: Mapping[str, Path],
) -> rejection.RejectionConfig:
    """The round's rejection sampling from the newest model."""
    options = {
        **stage_options(config, config.rejection, judges),
        "prompts": [str(path) for path in [*prompts, *config.rejection_prompts]],
        "out": str(config.out / f"round-{number}" / "rejection"),
        "policy": str(policy),
        "student": str(start_of(config, last)),
        "round": number,
        "pools": [str(pool) for pool in pools_of(config, last)],
    }
    return from_values(rejection.RejectionConfig, options)


def start_of(config: RLHFConfig, last: Version | None) -> Path:
    """What a version is fine-tuned from: the SFT model, or the one with Ghost Attention (ours; the
    paper: "always starting from the base model on each new RLHF version")."""
    return last.start if last is not None else config.model


def pools_of(config: RLHFConfig, last: Version | None) -> tuple[Path, ...]:
    """The earlier samples that a round chooses from besides its own."""
    return last.pools if last is not None and config.pool == "all" else ()


def teach(config: RLHFConfig, folder: Path, student: Path, selected: Path) -> Path:
    """The student, fine-tuned on the answers that the round selected."""
    options = {
        **stage_options(config, config.rejection, {}),
        "out": str(folder / "student"),
        "policy": str(student),
        "selected": str(selected),
    }
    return once(from_values(rejection.RejectionConfig, options), rejection.run)


def gatt_config(config: RLHFConfig, number: int, model: Path) -> gatt.GAttConfig:
    """Ghost Attention on top of the round's rejection sampling."""
    folder = config.out / f"round-{number}"
    options = {
        **stage_options(config, config.gatt, {}),
        "mix": [*map(str, config.gatt.get("mix", [])), str(folder / "gatt-mix.jsonl")],
        "dialogues": [str(path) for path in config.gatt_dialogues],
        "out": str(folder / "gatt"),
        "model": str(model),
    }
    return from_values(gatt.GAttConfig, options)


def ppo_config(
    config: RLHFConfig, number: int, policy: Path, judges: Mapping[str, Path]
) -> PPOConfig:
    """PPO on top of what the round has made before."""
    options = {
        **stage_options(config, config.ppo, judges),
        "prompts": [str(path) for path in [*config.prompts, *config.ppo_prompts]],
        "eval_prompts": [str(path) for path in config.eval_prompts],
        "out": str(config.out / f"round-{number}" / "ppo"),
        "policy": str(policy),
    }
    return from_values(PPOConfig, options)


def reward_config(
    config: RLHFConfig, number: int, kind: str, chat: Path, last: Version | None
) -> RewardConfig:
    """The round's reward model of this kind."""
    start, first = chat, 1
    if config.go_on and last is not None:
        start, first = last.judges[kind], number
    data, others = (
        rounds.comparisons(config, k, first, number) for k in (kind, rounds.other_than(kind))
    )
    options = {
        **{name: getattr(config, name) for name in ("seed", "amend", "device", *READING)},
        **config.reward,
        **getattr(config, kind),
        "parallel": of_stage(config.parallel, config.reward, getattr(config, kind)),
        "out": str(config.out / f"round-{number}" / kind),
        "model": str(start),
        "data": data,
    }
    if options.get("mix_share") is not None and not options.get("mix"):
        options["mix"] = others
    return from_values(RewardConfig, options)


def accuracy_of(
    config: RLHFConfig, version: Version | None, folder: Path
) -> dict[str, dict[str, float]]:
    """Accuracy of a version's reward models on a round's comparisons, the first ASKED of each kind,
    all and by rating."""
    found: dict[str, dict[str, float]] = {}
    for kind, path in (version.judges if version else {}).items():
        model = parallel.load(
            open_model(path),
            device_of_name(config.device),
            frozen=True,
            compute_dtype=compute_dtype(config),
        )
        rows, _ = read_preferences(folder / f"{kind}.jsonl")
        tokenizer = Tokenizer(tokenizer_path(path))
        pairs, _ = encode_pairs(tokenizer, rows[:ASKED], model.config.context)
        device = model.device
        found[kind] = accuracies(*margins_of(model, pairs, 64, device, str(path)))
    return found


def main() -> int:
    return command("python -m puna.trainers.rlhf", RLHFConfig, run)


if __name__ == "__main__":
    sys.exit(main())
