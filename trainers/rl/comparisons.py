"""Preference data for a round: pairs of answers from two model variants, and what is said of them.

Paper section 3.2.1: the two answers come from two different model variants and from varied
temperatures; the annotator chooses one, on four levels, and at the safety stage labels safety.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

import numpy as np
import torch

from puna.core import parallel
from puna.core.checkpoint.atomic import atomic_file
from puna.core.checkpoint.folder import open_model
from puna.core.documents import are_ids, field, json_rows, shortened
from puna.core.text.chat import decode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.formats import RATINGS, SAFETY, Columns, parse_prompt
from puna.trainers.data.prompts import EncodedPrompt, draw
from puna.trainers.rl.engine import Engine
from puna.trainers.rl.rewards import Answer, one_each
from puna.trainers.rl.rollout import at_hand, sample_everywhere


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
    the same file. All ranks take part and rank 0 writes.
    """
    if parallel.broadcast(path.exists()):
        return sum(1 for _ in json_rows(path))
    places = [draw(position, len(prompts), seed + round_index) for position in range(count)]
    chosen = [prompts[place] for place, _ in places]
    rng = np.random.default_rng((seed, round_index))
    answers: list[list[dict[str, Any]]] = []
    which = np.zeros(count, dtype=np.int64)  # temperature of each row
    for number, variant in enumerate(variants):
        choices = len(variant.temperatures)
        if number and variant == variants[0] and choices > 1:
            which = (which + rng.integers(1, choices, size=count)) % choices
        else:
            which = rng.integers(choices, size=count)
        model = parallel.load(
            open_model(variant.model),
            device,
            frozen=True,
            compute_dtype=compute_dtype,
            sampling_tp=sampling_tp,
        )
        drawn: list[dict[str, Any]] = [{}] * count
        with at_hand(model, engine) as whole:
            for index, temperature in enumerate(variant.temperatures):
                rows = np.flatnonzero(which == index).tolist()
                sampled = sample_everywhere(
                    whole,
                    [chosen[row].ids for row in rows],
                    max_new_tokens=max_new_tokens,
                    eos_id=tokenizer.eos_ids,
                    temperature=temperature,
                    seed=seed,
                    round_index=round_index,
                    prompt_ids=rows,
                    sample_ids=[number] * len(rows),
                    engine=engine,
                    called=str(variant.model),
                    **limits,
                )
                for row, ids in zip(rows, sampled, strict=True):
                    drawn[row] = {
                        "": decode_answer(tokenizer, ids),
                        "_ids": ids,
                        "_model": variant.name or str(variant.model),
                        "_temperature": temperature,
                    }
        answers.append(drawn)
    swapped = rng.random(count) < 0.5
    rows_out = []
    for prompt, one, other, swap in zip(chosen, *answers, swapped, strict=True):
        if one[""] and other[""] and one[""] != other[""]:
            a, b = (other, one) if swap else (one, other)
            row_out = {"messages": prompt.messages, "is_safety": prompt.is_safety}
            for name in one:
                row_out |= {f"a{name}": a[name], f"b{name}": b[name]}
            rows_out.append(row_out)
    if parallel.is_main():
        write_rows(path, rows_out)
    parallel.barrier()
    return len(rows_out)


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
