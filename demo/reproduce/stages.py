"""How an arm makes its model: the trainers that a user would call, with one thing changed.

Each function takes the base, the run folder, the seed, the models that the arm builds on and the
options that make the arm what it is, and returns the model's folder. What is done stays, and what
was interrupted goes on.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.core.checkpoint.folder import load_model
from puna.demo.reproduce.base import GHOST, Base, compare_answers
from puna.demo.village import oracle
from puna.demo.village.tasks import read_question
from puna.trainers import gatt, ppo, rejection, rlhf
from puna.trainers.reward import run as run_reward
from puna.trainers.rl.config import RLHFConfig
from puna.trainers.rl.rewards import Answer, Reward, RewardModels
from puna.trainers.rl.rounds import own_answers

Models = Mapping[str, Path]
"""What an arm builds on, by role: "start" is the model that samples first; the others are kinds of
reward models"""
Stage = Callable[[Base, Path, int, Models, Mapping[str, Any]], Path]

LEAST_ITERATIONS = 2


def judges_in(models: Models) -> dict[str, Path]:
    return {kind: path for kind, path in models.items() if kind != "start"}


def sample_best(
    base: Base, out: Path, seed: int, models: Models, options: Mapping[str, Any]
) -> Path:
    """Rejection sampling as in the demo's V1: the SFT model learns the best of K answers.

    `prompts` names other prompts than the first ones; with `lot` the answer is drawn instead.
    """
    given: dict[str, Any] = {"temperature": 1.0, "temperatures": [], **options}
    lot = given.pop("lot", False)
    prompts = [base.file(given.pop("prompts", "first"))]
    judges = {} if lot else judges_in(models)
    config = rlhf.rejection_config(base.loop, 1, prompts, models["start"], None, judges)
    if models["start"] != base.sft:  # a second version: the first one's best are looked at again
        given |= {"round": 2, "pools": [models["start"].parent / "pool.jsonl"]}
    config = replace(config, out=out, seed=seed, **given)
    return rejection.run(config, by_lot(seed) if lot else None)


def improve(base: Base, out: Path, seed: int, models: Models, options: Mapping[str, Any]) -> Path:
    """PPO with as many answers as rejection sampling draws, to the same prompts; `share` of them.

    Without reward models the oracle rewards. Options are PPOConfig's.
    """
    given = {"temperature": 1.0, **options}
    share = given.pop("share", 1.0)
    judges = judges_in(models)
    config = rlhf.ppo_config(base.loop, 1, models["start"], judges)
    iterations = max(LEAST_ITERATIONS, round(config.iterations * share))
    given["iterations"] = iterations
    given["critic_warmup"] = min(config.critic_warmup, iterations // 2)
    config = replace(config, out=out, seed=seed, prompts=[base.file("first")], **given)
    return ppo.run(config, None if judges else by_quality)


def keep_instructions(
    base: Base, out: Path, seed: int, models: Models, options: Mapping[str, Any]
) -> Path:
    """Ghost Attention, with ordinary chat mixed in: the answers that rejection sampling selected.

    Options are GAttConfig's; with `filtered` False every finished answer may be learned from.
    """
    given = dict(options)
    judge = oracle.judge if given.pop("filtered", True) else None
    own = out.with_name(f"{out.name}-mix.jsonl")
    own_answers(base.loop, models["start"].parent / "selected.jsonl", own)
    config = replace(
        rlhf.gatt_config(base.loop, 1, models["start"]),
        out=out,
        seed=seed,
        dialogues=[base.file("ghosts")],
        mix=[base.file("ghost-personas"), own],
        **{**GHOST, **given},
    )
    return gatt.run(config, judge)


def judge(base: Base, out: Path, seed: int, models: Models, options: Mapping[str, Any]) -> Path:
    """A reward model on V1's comparisons, all of them; `kinds` says whose. Options are
    RewardConfig's."""
    given = dict(options)
    kinds: Sequence[str] = given.pop("kinds")
    config = rlhf.reward_config(base.loop, 1, kinds[0], models["start"], None)
    data = [base.comparisons(kind) for kind in kinds]
    return run_reward(replace(config, out=out, seed=seed, data=data, eval_share=0.0, **given))


def judge_again(
    base: Base, out: Path, seed: int, models: Models, options: Mapping[str, Any]
) -> Path:
    """A reward model of the second version, as the loop makes it: from the newest model, which is
    the one that is to be judged, on comparisons of its answers and on those before."""
    kind: str = options["kind"]
    compare_answers(base, 2, models["start"])
    config = rlhf.reward_config(base.loop, 2, kind, models["start"], None)
    return run_reward(replace(config, out=out, seed=seed))


def loop_unseen(
    base: Base, out: Path, seed: int, models: Models, options: Mapping[str, Any]
) -> Path:
    """Three versions of rejection sampling, each from the SFT model on the best of what `pool`
    says, under judges that cannot tell a good repetition from a bad one."""
    table = {key: value for key, value in base.loop.rejection.items() if key != "mix"}
    table |= {"temperature": 1.0, "temperatures": []}
    config = RLHFConfig(
        out=out,
        model=models["start"],
        prompts=[base.file("skill")],
        versions=3,
        ppo_versions=0,
        max_new_tokens=base.loop.max_new_tokens,
        rejection=table,
        seed=seed,
        device="cpu",
        **options,
    )
    return rlhf.run(config, reward=blind(judges_in(models), seed))


def by_quality(answers: Sequence[Answer]) -> list[float]:
    """The oracle's own measure as the reward, by which answers win: nothing to be wrong about."""
    return [oracle.assess(answer.messages, answer.text).quality for answer in answers]


def by_lot(seed: int) -> Reward:
    """A reward that knows nothing: the best of K is then any one of K."""

    def lots(answers: Sequence[Answer]) -> list[float]:
        rng = random.Random(f"{seed} {[answer.messages for answer in answers]}")
        return [rng.random() for _ in answers]

    return lots


def blind(judges: Models, seed: int) -> Reward:
    """Eq. 4 over the reward models, but lots where a repetition was asked for."""
    models = RewardModels(load_model(judges["helpfulness"]), load_model(judges["safety"]))
    lots = by_lot(seed)

    def score(answers: Sequence[Answer]) -> list[float]:
        drawn, scored = lots(answers), models(answers).raw.tolist()
        return [
            lot if is_repeat(answer.messages[-1]["content"]) else own
            for answer, lot, own in zip(answers, drawn, scored, strict=True)
        ]

    return score


def is_repeat(question: str) -> bool:
    """Whether a question asks for words to be said again."""
    return read_question(question).kind == "repeat"
