"""Which of many samples to keep, and what keeping more of them buys (paper section 3.2.3, Fig. 7).

A sample is one answer with its scores, a row of `samples.jsonl` or of a pool file. Plain data and
pure functions: the sampling itself is in `rejection`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from puna.core.chat import Message


class Sample(TypedDict):
    """One scored answer."""

    messages: list[Message]  # up to the last user message
    risky: bool  # the prompt carries the safety tag
    answer: str  # the text
    tokens: list[int]  # the ids as they were drawn, EOS included
    finished: bool
    score: float  # Eq. 4's combined raw score under the reward models that judged last
    helpfulness: float
    safety: float
    round: int  # the RLHF version whose model drew it
    prompt: int  # number of the prompt in that round
    sample: int  # 0 .. K-1


def prompt_key(messages: Sequence[Message]) -> str:
    """What makes two prompts the same, whatever round they come from."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def best_of(samples: Iterable[Sample]) -> list[Sample]:
    """The highest-scoring finished answer to each prompt, in order of first appearance.

    Given the samples of several rounds it is the best over all of them: what the paper turned to
    after V3, trained on V2's samples alone, had lost skills. An answer without EOS is never kept:
    it would teach the model not to stop. Ties go to the earlier sample.
    """
    best: dict[str, Sample] = {}
    for sample in samples:
        key = prompt_key(sample["messages"])
        if sample["finished"] and (key not in best or sample["score"] > best[key]["score"]):
            best[key] = sample
    return list(best.values())


def reward_curve(scores: Tensor) -> list[dict[str, float]]:
    """Fig. 7: rows {"k", "best", "mean", "median"} for k = 1 .. K, from scores (P, K).

    "best" is the expected maximum of k of the K samples, averaged over prompts: exact, from the
    order statistics (each of the C(K, k) subsets counted once), not one noisy subset. "median"
    is that of the first k samples of each prompt, averaged.
    """
    count = scores.shape[1]
    ordered = scores.double().sort(dim=1).values
    rows = []
    for k in range(1, count + 1):
        subsets = [math.comb(j, k - 1) / math.comb(count, k) for j in range(count)]
        best = (ordered @ torch.tensor(subsets, dtype=torch.float64)).mean()
        median = scores[:, :k].double().quantile(0.5, dim=1).mean()
        rows.append(
            {
                "k": k,
                "best": float(best),
                "mean": float(scores[:, :k].double().mean()),
                "median": float(median),
            }
        )
    return rows
