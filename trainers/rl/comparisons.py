"""Preference data for a round: pairs of answers from two model variants, and what is said of them.

Paper section 3.2.1: the two answers come from two different model variants and from varied
temperatures; the annotator chooses one, on four levels, and at the safety stage labels safety.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

import numpy as np
import torch

from puna.core import parallel
from puna.core.checkpoint.atomic import atomic_file
from puna.core.checkpoint.folder import open_model
from puna.core.checkpoint.source import Source
from puna.core.documents import are_ids, field, json_rows, shortened
from puna.core.model import Transformer
from puna.core.text.chat import decode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.formats import RATINGS, SAFETY, Columns, parse_prompt
from puna.trainers.data.prompts import EncodedPrompt, draw
from puna.trainers.rl.chunks import append_chunks
from puna.trainers.rl.engine import Engine
from puna.trainers.rl.rewards import Answer, one_each
from puna.trainers.rl.rollout import at_hand, draw_answers
from puna.trainers.train import written

CHUNK = 512  # answers between two looks at whether to stop


class Verdict(NamedTuple):
    """What an annotator says of answers a and b."""

    chosen: int  # 0: a, 1: b
    rating: str  # significantly_better, better, slightly_better or negligibly_better
    safety: str | None  # chosen_safe, both_safe, both_unsafe, chosen_unsafe; None: not asked


Annotator = Callable[[Sequence[Answer], Sequence[Answer]], Sequence[Verdict]]
"""Answers a and b to the same prompts -> one verdict each."""


class Variant(NamedTuple):
    """A model that answers, at one of several temperatures."""

    model: Path
    temperatures: tuple[float, ...]
    name: str = ""  # what the rows call it; empty: the model's path


class Side(NamedTuple):
    """What one variant answers."""

    path: Path  # where its answers are kept until the pairs are whole
    number: int  # which of the two it is; part of the random numbers
    variant: Variant
    temperatures: list[float]  # of each answer


def sample_pairs(
    path: Path,
    variants: tuple[Variant, Variant],
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    count: int,
    *,
    max_new_tokens: int,
    seed: int,
    round_index: int,
    device: torch.device,
    chunk: int = CHUNK,
    limits: Mapping[str, int] = MappingProxyType({}),
    compute_dtype: torch.dtype | None = None,
    sampling_tp: int = 1,
    engine: Engine | None = None,
) -> int:
    """Write `count` rows of {"messages", "is_safety", "a", "b", "a_ids", "b_ids", and of both
    "_model" and "_temperature"} to `path`, less those whose answers are equal or empty (nobody
    could rank them); returns how many were written. Which variant is a is drawn. Where both are
    one model, as in V1, no pair has one temperature, unless there is but one. `limits` are
    `generate`'s, of what stands side by side; an `engine` draws in place of this process.

    The draws depend on (seed, round_index, prompt, variant) only, so that a repeated call writes
    the same file. A variant's answers are kept beside `path`, `chunk` after `chunk`, until it is
    written: an interrupted call goes on from there. All ranks take part and rank 0 writes.
    """
    drawn = [path.with_name(f"{path.stem}-drawn-{number}.jsonl") for number in (1, 2)]
    if parallel.broadcast(path.exists()):
        parallel.on_main(lambda: discard(drawn))  # where a kill came before it
        return sum(1 for _ in json_rows(path))
    parallel.on_main(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    places = [draw(position, len(prompts), seed + round_index) for position in range(count)]
    chosen = [prompts[place] for place, _ in places]
    rng = np.random.default_rng((seed, round_index))
    temperatures = draw_temperatures(variants, count, rng)
    swapped = (rng.random(count) < 0.5).tolist()
    options = {
        "max_new_tokens": max_new_tokens,
        "eos_id": tokenizer.eos_ids,
        "seed": seed,
        "round_index": round_index,
        "engine": engine,
        **limits,
    }
    load = partial(
        parallel.load,
        device=device,
        frozen=True,
        compute_dtype=compute_dtype,
        sampling_tp=sampling_tp,
    )
    for number, variant in enumerate(variants):
        side = Side(drawn[number], number, variant, temperatures[number])
        draw_side(side, load, tokenizer, chosen, chunk, options)
    return int(parallel.on_main(lambda: pair(path, chosen, drawn, swapped)))


def draw_temperatures(
    variants: Sequence[Variant], count: int, rng: np.random.Generator
) -> list[list[float]]:
    """Of each variant the temperature of each of its `count` answers."""
    found: list[list[float]] = []
    which = np.zeros(count, dtype=np.int64)
    for number, variant in enumerate(variants):
        choices = len(variant.temperatures)
        if number and variant == variants[0] and choices > 1:
            which = (which + rng.integers(1, choices, size=count)) % choices
        else:
            which = rng.integers(choices, size=count)
        found.append([variant.temperatures[index] for index in which])
    return found


def draw_side(
    side: Side,
    load: Callable[[Source], Transformer],
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    chunk: int,
    options: Mapping[str, Any],
) -> None:
    """Append one answer to each prompt to the side's file, as `draw_answers` does with these
    `options`; where all are there already nothing is loaded."""
    variant = side.variant
    with ExitStack() as stack:

        @cache
        def model() -> Transformer:
            opened = load(open_model(variant.model))
            return stack.enter_context(at_hand(opened, options["engine"]))

        def draw_rows(rows: Sequence[int]) -> list[dict[str, Any]]:
            found: dict[int, dict[str, Any]] = {}
            for temperature in dict.fromkeys(variant.temperatures):  # the same ones on all ranks
                some = [row for row in rows if side.temperatures[row] == temperature]
                completions = draw_answers(
                    model(),
                    [prompts[row].ids for row in some],
                    prompt_ids=some,
                    sample_ids=[side.number] * len(some),
                    temperature=temperature,
                    called=str(variant.model),
                    **options,
                )
                for row, each in zip(some, completions, strict=True):
                    found[row] = {
                        "messages": prompts[row].messages,
                        "answer": decode_answer(tokenizer, each.tokens),
                        "ids": each.tokens,
                        "model": variant.name or str(variant.model),
                        "temperature": temperature,
                    }
            return [found[row] for row in rows]

        asked = [prompt.messages for prompt in prompts]
        append_chunks("comparisons: sampling", side.path, asked, chunk, 1, draw_rows)


def pair(
    path: Path, prompts: Sequence[EncodedPrompt], drawn: Sequence[Path], swapped: Sequence[bool]
) -> int:
    """Write the pairs of what both variants have answered; returns how many they are."""
    answers = [[row for _, row in json_rows(each)] for each in drawn]
    rows: list[dict[str, Any]] = []
    for prompt, one, other, swap in zip(prompts, *answers, swapped, strict=True):
        if one["answer"] and other["answer"] and one["answer"] != other["answer"]:
            a, b = (other, one) if swap else (one, other)
            row: dict[str, Any] = {"messages": prompt.messages, "is_safety": prompt.is_safety}
            row |= {"a": a["answer"], "b": b["answer"]}
            for name in ("ids", "model", "temperature"):
                row |= {f"a_{name}": a[name], f"b_{name}": b[name]}
            rows.append(row)
    write_rows(path, rows)
    discard(drawn)
    return len(rows)


def discard(drawn: Sequence[Path]) -> None:
    """The pairs are whole: what they were made from is no longer needed."""
    written.forget(drawn[0].parent, *(path.name for path in drawn))
    for path in drawn:
        path.unlink(missing_ok=True)


def annotate(
    pairs: Path, path: Path, annotator: Annotator, tokenizer: Tokenizer, batch: int
) -> None:
    """Ask `annotator` about all rows of `pairs`; write preference rows of round `batch`.

    Raises ValueError where it gives another number of verdicts than there are pairs.
    """
    if path.exists():
        return
    found = read_pairs(pairs)
    said = annotator(*([_answer(pair, side, tokenizer) for pair in found] for side in "ab"))
    given = one_each("the annotator", said, len(found), "verdict", "pair")
    verdicts = [check_verdict(verdict, number) for number, verdict in enumerate(given, 1)]
    rows = []
    for pair, verdict in zip(found, verdicts, strict=True):
        chosen, rejected = "ab" if verdict.chosen == 0 else "ba"
        row = {
            "messages": pair["messages"],
            "chosen": pair[chosen],
            "rejected": pair[rejected],
            "rating": verdict.rating,
            "batch": batch,
        }
        for role, side in (("chosen", chosen), ("rejected", rejected)):
            for name in ("model", "temperature"):
                if f"{side}_{name}" in pair:
                    row[f"{role}_{name}"] = pair[f"{side}_{name}"]
        if verdict.safety is not None:
            row["safety"] = verdict.safety
        rows.append(row)
    write_rows(path, rows)


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows that `sample_pairs` wrote; ValueError as `file:line: ...` for another."""
    found = []
    for where, row in json_rows(path):
        try:
            field(row, "is_safety", bool)
            parse_prompt({"messages": field(row, "messages", list)}, Columns())
            for side in "ab":
                field(row, side, str)
                ids = field(row, f"{side}_ids", list)
                if not ids or not are_ids(ids):
                    raise ValueError(f"{side}_ids is {shortened(ids)}, expected ids")
        except ValueError as error:
            raise ValueError(f"{where}: not a pair of answers: {error}") from error
        found.append(row)
    return found


def check_verdict(given: Any, number: int) -> Verdict:
    """A verdict, or a tuple like one; ValueError for what no annotator can mean, before anything
    is written."""
    try:
        verdict = given if isinstance(given, Verdict) else Verdict(*given)
    except TypeError:
        raise ValueError(
            f"the annotator's verdict {number} is {str(given)[:60]!r}; it must be a Verdict of "
            f"{', '.join(Verdict._fields)}"
        ) from None
    allowed = {
        "chosen": (0, 1),
        "rating": RATINGS,
        "safety": (None, *SAFETY, "chosen_unsafe"),
    }
    for name, values in allowed.items():
        said = getattr(verdict, name)
        if not isinstance(said, (int, str, NoneType)) or said not in values:
            raise ValueError(
                f"the annotator's verdict {number} has {name} {said!r}; expected one of "
                f"{', '.join(map(str, values))}"
            )
    return verdict


def _answer(pair: dict[str, Any], side: str, tokenizer: Tokenizer) -> Answer:
    """Answer "a" or "b" of a row of pairs."""
    ids = pair[f"{side}_ids"]
    return Answer(
        messages=pair["messages"],
        text=pair[side],
        prompt_ids=encode_prompt(tokenizer, pair["messages"]),
        ids=ids,
        finished=ids[-1] in tokenizer.eos_ids,
        is_safety=pair["is_safety"],
    )


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """JSON lines, whole or not at all."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
