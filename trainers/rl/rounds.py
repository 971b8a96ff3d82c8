"""A round of the loop V1..Vn, as far as it is files: its prompts, its comparisons, its record."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from puna.core import parallel
from puna.core.checkpoint.folder import open_source, tokenizer_path
from puna.core.device import device_of_name
from puna.core.documents import field, json_rows
from puna.core.errors import UserError
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.annotations.items import KINDS
from puna.trainers.data.prompts import draw, load_prompts
from puna.trainers.data.readers import read_preferences, read_prompts
from puna.trainers.data.split import opening
from puna.trainers.rl.accuracy import clustered
from puna.trainers.rl.best_of import read_samples
from puna.trainers.rl.comparisons import Annotator, Variant, annotate, sample_pairs, write_rows
from puna.trainers.rl.config import RLHFConfig, SamplingConfig, engine_of, prompt_room
from puna.trainers.rl.people import check_people as check_people
from puna.trainers.rl.people import collect
from puna.trainers.train import written
from puna.trainers.train.advice import ANEW, advice
from puna.trainers.train.next_token import say
from puna.trainers.train.precision import compute_dtype


class Waiting(UserError):
    """Comparisons wait for an annotator; the message says where."""


def round_prompts(config: RLHFConfig, number: int, folder: Path) -> list[Path]:
    """The files to sample from in round `number`: all prompts, or its own stretch of them."""
    if config.round_prompts == 0:
        return list(config.prompts)
    path = folder / "prompts.jsonl"
    if parallel.is_main() and not path.exists():
        rows = [row for file in config.prompts for row in read_prompts(file, config)[0]]
        places = [(number - 1) * config.round_prompts + i for i in range(config.round_prompts)]
        chosen = [rows[draw(place, len(rows), config.seed)[0]] for place in places]
        write_rows(path, [{"messages": p.messages, "safety": p.is_safety} for p in chosen])
    parallel.barrier()
    return [path]


def other_than(kind: str) -> str:
    """The other kind of reward model."""
    return next(other for other in KINDS if other != kind)


def comparisons(config: RLHFConfig, kind: str, first: int, last: int) -> list[str]:
    """Files with what the annotators of a kind said: one's own, and those of these rounds."""
    own = [str(path) for path in getattr(config, f"{kind}_data")]
    return own + [str(config.out / f"round-{n}" / f"{kind}.jsonl") for n in range(first, last + 1)]


def compare(
    config: RLHFConfig,
    number: int,
    folder: Path,
    models: list[Path],
    annotators: Mapping[str, Annotator] | None,
) -> None:
    """Sample this round's pairs and have them compared: by a function, by people through their
    file, or by a file of answers; raises Waiting where that is not there yet, and ValueError for
    one that nothing can be learned from: it may be mended until the reward models are trained."""
    for kind in KINDS:
        pairs, answered = folder / f"{kind}-pairs.jsonl", folder / f"{kind}.jsonl"
        if not parallel.broadcast(answered.exists()):
            sample_kind(config, number, kind, pairs, models)
            if annotators and parallel.is_main():
                tokenizer = Tokenizer(tokenizer_path(config.model))
                annotate(pairs, answered, annotators[kind], tokenizer, number)
    parallel.barrier()
    if config.annotations is not None:
        collect(config.annotations, number, folder)
    names = [f"{kind}{part}.jsonl" for kind in KINDS for part in ("-pairs", "")]
    there = [name for name in names if parallel.broadcast((folder / name).exists())]
    answers = [f"{kind}.jsonl" for kind in KINDS]
    parallel.on_main(lambda: written.check(folder, *there, brought=answers))
    missing = [kind for kind in KINDS if not (folder / f"{kind}.jsonl").exists()]
    if missing:
        parallel.on_main(lambda: written.forget(folder, *(f"{kind}.jsonl" for kind in missing)))
        files = " and ".join(f"{kind}-pairs.jsonl" for kind in missing)
        wanted = " and ".join(f"{kind}.jsonl" for kind in missing)
        raise Waiting(
            f"{files} in {folder} wait{'s' * (len(missing) == 1)} for an annotator: write the "
            f"preferences to {wanted} there (messages, chosen, rejected, rating, safety), then run "
            "the same command"
        )
    for kind in KINDS:
        read_preferences(folder / f"{kind}.jsonl")


def keep_comparisons(folder: Path) -> None:
    """From now on the round's comparisons may not change: models have learned from them."""
    names = [f"{kind}{part}.jsonl" for kind in KINDS for part in ("-pairs", "")]
    there = [name for name in names if (folder / name).exists()]
    parallel.on_main(lambda: written.note(folder, *there))


def check_prompts(config: RLHFConfig, stages: Sequence[SamplingConfig]) -> None:
    """ValueError where a kind, or one of the stages, has no prompt that leaves room for an answer:
    some are sampled from days later."""
    tokenizer = Tokenizer(tokenizer_path(config.model))
    context = open_source(config.model).config.context
    asked = [(getattr(config, f"{kind}_prompts"), prompt_room(config, context)) for kind in KINDS]
    asked += [(stage.prompts, prompt_room(stage, context)) for stage in stages]
    asked += [(config.eval_prompts, room) for _, room in asked[-1:]]
    for paths, room in asked:
        if paths:
            load_prompts(paths, tokenizer, room, config)


def sample_kind(
    config: RLHFConfig, number: int, kind: str, pairs: Path, models: list[Path]
) -> None:
    """Answers of the two newest models to this kind's prompts, in pairs."""
    tokenizer = Tokenizer(tokenizer_path(config.model))
    longest = prompt_room(config, open_source(models[-1]).config.context)
    prompts, skipped = load_prompts(getattr(config, f"{kind}_prompts"), tokenizer, longest, config)
    say(skipped)
    temperatures = tuple(config.temperatures)
    newest, before = (
        Variant(model, temperatures, name)
        for model, name in zip(models[:-3:-1], names_of(number), strict=True)
    )
    found = sample_pairs(
        pairs,
        (newest, before),
        tokenizer,
        prompts,
        getattr(config, f"{kind}_pairs"),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        round_index=2 * number + KINDS.index(kind),
        device=device_of_name(config.device),
        chunk=config.chunk,
        limits=config.limits(),
        compute_dtype=compute_dtype(config),
        sampling_tp=config.sampling_tp,
        engine=engine_of(config, tokenizer),
    )
    if not found:
        parallel.barrier()  # every rank has counted them
        if parallel.is_main():
            pairs.unlink()
        other = "start from another model"
        raise ValueError(
            f"there is nothing to compare for {kind}: of each two answers of {models[-1]} both are "
            "alike or one is empty; "
            + advice("amend", f"go on with higher temperatures (--amend), or {other}", ANEW)
        )


def names_of(number: int) -> tuple[str, str]:
    """What the comparisons of round `number` call the two newest models; V0 is the one that the
    loop starts from. (A path would be another when the folder is moved.)"""
    return f"V{number - 1}", f"V{max(0, number - 2)}"


def own_answers(config: RLHFConfig, selected: Path, path: Path) -> None:
    """The version's selected answers as dialogues, so that ordinary chat is not forgotten."""
    if parallel.is_main() and not path.exists():
        rows = read_samples(selected)[: config.gatt_answers or None]
        write_rows(
            path,
            [
                {"messages": [*row["messages"], {"role": "assistant", "content": row["answer"]}]}
                for row in rows
            ],
        )
    parallel.barrier()


def newest_wins(folder: Path, number: int) -> dict[str, dict[str, float]]:
    """How often the newest model's answer was preferred over that of the one before it, by kind: a
    round's comparisons are an A/B test of the two that costs nothing (paper section 3.4.1).

    Nothing for a kind whose rows do not say what gave the answers, and in V1, of one model.
    """
    found = {}
    newest, before = names_of(number)
    for kind in KINDS:
        rows, _ = read_preferences(folder / f"{kind}.jsonl")
        tried = [
            r for r in rows if {r.chosen_model, r.rejected_model} == {newest, before} != {newest}
        ]
        if tried:
            wins = torch.tensor([float(row.chosen_model == newest) for row in tried])
            share = clustered(wins.double(), [opening(row.messages) for row in tried])
            found[kind] = share._asdict()
    return found


def record(
    path: Path,
    number: int,
    steps: Mapping[str, Path],
    before: dict[str, dict[str, float]],
    after: dict[str, dict[str, float]],
    wins: dict[str, dict[str, float]],
) -> None:
    """Append the version's row, once; `steps` are the models that it made, the last is its own."""
    rows = [row for _, row in json_rows(path)] if path.exists() else []
    rows = [row for row in rows if field(row, "version", int) < number]
    row = {
        "version": number,
        "model": [str(model) for model in steps.values()][-1],
        "steps": {name: str(model) for name, model in steps.items()},
        "accuracy_before_training": before,
        "accuracy_on_trained": after,
        "newest_wins": wins,
    }
    write_rows(path, [*rows, row])
