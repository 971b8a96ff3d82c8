"""Yes or no of an answer, by a function from Python: whether it obeys, whether it refuses."""

from collections.abc import Callable, Sequence
from typing import Any

from puna.trainers.rl.rewards import Answer, one_each

Judge = Callable[[Sequence[Answer]], Sequence[bool]]
"""Answers -> one yes or no each; `messages` is the dialogue so far, its instruction first."""


def judged(judge: Judge, answers: Sequence[Answer], who: str = "the judge") -> list[bool]:
    """What `judge` says of each answer; ValueError, calling it `who`, for what is no yes or no."""
    found = one_each(who, judge(answers), len(answers), "verdict", "answer")
    return [_is_yes(verdict, who) for verdict in found]


def _is_yes(verdict: Any, who: str) -> bool:
    """A judge's yes or no, numpy's and torch's too: "no" and NaN would count as a yes."""
    plain = verdict.item() if getattr(verdict, "shape", None) == () else verdict
    if not isinstance(plain, int) or plain not in (0, 1):
        raise ValueError(f"{who} gave {verdict!r}; it must return True or False for an answer")
    return bool(plain)
