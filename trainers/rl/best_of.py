"""Which of many samples to keep, and what drawing more of them buys (paper section 3.2.3, Fig. 7).

A sample is one answer with its scores: a row of `samples.jsonl`, or of the `pool.jsonl` that later
rounds choose from again. The sampling itself is in `sampling`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor

from puna.core.checkpoint.atomic import atomic_file, write_text
from puna.core.documents import append_rows, are_ids, field, json_rows, shortened
from puna.core.text.chat import Message
from puna.trainers.data.formats import Columns, parse_prompt
from puna.trainers.rl.config import BestOfConfig
from puna.trainers.train import written

SAMPLES, SELECTED, POOL = "samples.jsonl", "selected.jsonl", "pool.jsonl"


class Drawn(TypedDict):
    """One answer."""

    messages: list[Message]  # up to the last user message
    is_safety: bool  # the prompt carries the safety tag
    answer: str  # the text
    tokens: list[int]  # the ids as they were drawn, EOS included
    finished: bool
    round: int  # the RLHF version whose model drew it
    prompt: int  # number of the prompt in that round
    sample: int  # 0 .. K-1


class Sample(Drawn):
    """One scored answer."""

    score: float  # the raw score of the reward that judged last
    scores: dict[str, float]  # its parts: helpfulness and safety, where it is Eq. 4


TYPES = {
    "messages": list,
    "is_safety": bool,
    "answer": str,
    "tokens": list,
    "finished": bool,
    "score": float,
    "scores": dict,
    "round": int,
    "prompt": int,
    "sample": int,
}


def write_samples(path: Path, samples: Iterable[Drawn], mode: Literal["w", "a"]) -> None:
    """Write or append one line a sample, on to the disk. Raises OSError naming the file."""
    append_rows(path, samples, mode)


def read_samples(path: Path) -> list[Sample]:
    """The scored samples of a file; ValueError as `file:line: ...` for a row that is none."""
    return cast(list[Sample], rows_with(path, Sample.__required_keys__))


def read_drawn(path: Path) -> list[Drawn]:
    """The samples of a file, scored or not; ValueError as `file:line: ...` for a row that is
    none."""
    return cast(list[Drawn], rows_with(path, Drawn.__required_keys__))


def rows_with(path: Path, names: frozenset[str]) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"{path}: no such file; a pool is the pool.jsonl of a rejection run")
    rows = []
    for where, row in json_rows(path):
        try:
            check_sample(row, names)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        rows.append(row)
    return rows


def check_sample(row: dict[str, Any], names: frozenset[str] = Sample.__required_keys__) -> None:
    """ValueError where `row` is no sample with these columns: a file may have been edited, or be
    another kind."""
    if missing := sorted(names - row.keys()):
        raise ValueError(
            f"the sample lacks {', '.join(missing)}; name what `puna sample` or `puna rejection` "
            "wrote" + " with reward models" * ("scores" in missing)
        )
    for name in names & row.keys():
        field(row, name, TYPES[name])
    if not row["tokens"] or not are_ids(row["tokens"]):
        raise ValueError(f"tokens is {shortened(row['tokens'])}, expected ids")
    for name in row["scores"] if "scores" in names else ():
        field(row["scores"], name, float)
    parse_prompt({"messages": row["messages"]}, Columns())


def prompt_key(messages: Sequence[Message]) -> str:
    """What makes two prompts the same, whatever round they come from."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def is_usable(sample: Drawn) -> bool:
    """Whether an answer may be kept: one without EOS would teach the model not to stop."""
    return bool(sample["finished"] and sample["answer"])


def best_of(samples: Iterable[Sample]) -> list[Sample]:
    """The highest-scoring finished answer to each prompt, in order of first appearance.

    Given the samples of several rounds it is the best over all of them: what the paper turned to
    after V3, trained on V2's samples alone, had lost skills. An answer without EOS is never kept,
    nor an empty one. Ties go to the earlier sample.
    """
    return best_few(samples, 1)


def best_few(samples: Iterable[Sample], count: int) -> list[Sample]:
    """As `best_of`, the `count` best different answers to each prompt, the best first.

    What a round hands on to later ones: their reward models are others. Of 16 prompts judged by
    three pairs of them one after the other, handing on the winner alone ended with another answer
    for 7 than choosing among all samples would have.
    """
    found: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        if is_usable(sample):
            answers = found.setdefault(prompt_key(sample["messages"]), {})
            before = answers.get(sample["answer"])
            if before is None or sample["score"] > before["score"]:
                answers[sample["answer"]] = sample
    return [
        sample
        for answers in found.values()
        for sample in sorted(answers.values(), key=lambda sample: -sample["score"])[:count]
    ]


def why_none(samples: Sequence[Sample]) -> str:
    """The reason why `best_of` keeps none of the samples, as a sentence with the way out."""
    if finished := sum(sample["finished"] for sample in samples):
        return (
            f"no answer of {len(samples)} can be kept: {finished} are finished and all of these "
            "are empty; start from a policy that answers"
        )
    return (
        f"no answer of {len(samples)} is finished; raise max_new_tokens or train the policy to stop"
    )


def reward_curve(scores: Tensor, usable: Tensor) -> list[dict[str, float]]:
    """Fig. 7: rows {"k", "kept", "best", "mean", "median"} for k = 1 .. K.

    scores: (P, K); usable: (P, K) bool, answers that may be kept (at least one of all). An answer
    that may not is never the best, whatever its score. "kept" is the share of prompts for which k
    samples hold one that may. "best" is the expected score of the best of these, averaged over
    prompts: exact, from the order statistics (each of the C(K, k) subsets counted once), not one
    noisy subset. "mean" and "median" are those of the first k that may be kept, of each prompt.
    """
    count = scores.shape[1]
    lowest = torch.where(usable, scores.double(), -torch.inf)
    ordered = lowest.sort(dim=1).values
    counted = ordered.isfinite()
    ordered = torch.where(counted, ordered, 0.0)
    some = usable.any(1)
    early = torch.sort(~usable, dim=1, stable=True).indices  # the usable ones first, in order
    first = torch.where(usable, scores.double(), torch.nan).gather(1, early)[some]
    rows = []
    for k in range(1, count + 1):
        chance = [math.comb(j, k - 1) / math.comb(count, k) for j in range(count)]
        largest = torch.tensor(chance, dtype=torch.float64) * counted  # (P, K): is the best of k
        kept = largest.sum(1)
        best = ((largest * ordered).sum(1)[some] / kept[some]).mean()
        seen = first[:, :k]
        rows.append(
            {
                "k": k,
                "kept": float(kept.mean()),
                "best": float(best),
                "mean": float(seen.nanmean(1).mean()),
                "median": float(seen.nanquantile(0.5, dim=1).mean()),
            }
        )
    return rows


def keep_best(folder: Path, config: BestOfConfig, pool: Sequence[Sample] = ()) -> dict[str, Any]:
    """Write selection.json, POOL and SELECTED beside SAMPLES; returns what the first says.

    ValueError where no sample can be kept: they are removed, so that others can be drawn under
    other options.
    """
    fresh = read_samples(folder / SAMPLES)
    kept = best_of([*fresh, *pool])
    if not kept:
        (folder / SAMPLES).unlink()
        written.forget(folder, SAMPLES)
        raise ValueError(why_none(fresh))
    found = summary(fresh, kept, config.samples)
    write_text(folder / "selection.json", json.dumps(found, indent=2) + "\n")
    for name, rows in (
        (POOL, best_few(fresh, config.pool_samples)),
        (SELECTED, kept),  # last: where it stands, all of this is done
    ):
        with atomic_file(folder / name) as partial:
            write_samples(partial, rows, mode="w")
        written.note(folder, name)
    return found


def summary(fresh: list[Sample], kept: list[Sample], samples: int) -> dict[str, Any]:
    """What selection.json says: Fig. 7's curve and where the kept answers come from."""
    rows = torch.tensor([sample["score"] for sample in fresh]).view(-1, samples)
    usable = torch.tensor([is_usable(sample) for sample in fresh]).view(-1, samples)
    return {
        "prompts": len(rows),
        "kept": len(kept),
        "kept_by_round": dict(sorted(Counter(str(s["round"]) for s in kept).items())),
        "unfinished": sum(not s["finished"] for s in fresh) / len(fresh),
        "score_sampled": float(rows.mean()),
        "score_kept": sum(s["score"] for s in kept) / len(kept),
        "by_k": reward_curve(rows, usable),
    }
