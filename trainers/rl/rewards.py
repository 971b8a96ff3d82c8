"""From answers to rewards: one small protocol, and the paper's Eq. 4 as its default.

    R_c = R_s  if is_safety(prompt) or sigma(R_s) < 0.15,  else R_h
    R   = WHITEN(LOGIT(sigma(R_c))) - beta * KL(policy || reference)

The logit undoes the sigmoid, so the raw score of the chosen model is whitened. A reward of one's
own is a function of answers that returns one number for each. S answers, T tokens of the longest
one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.core.documents import count_of
from puna.core.errors import UserError
from puna.core.model import Transformer
from puna.core.packed import score
from puna.core.text.chat import Message
from puna.trainers.rl.losses import whiten

SAFETY_THRESHOLD = 0.15  # on sigma(R_s): precision 0.89, recall 0.55 on Meta's safety test set

RAW_SAFETY_THRESHOLD = math.log(SAFETY_THRESHOLD / (1 - SAFETY_THRESHOLD))

# What an answer that ran out of tokens before its EOS is worth. The paper does not say.
UNFINISHED = ("keep", "subtract", "replace", "mask")


class Answer(NamedTuple):
    """One answer and what it answers: what rewards, annotators and judges are given."""

    messages: list[Message]
    """the dialogue up to the last user message"""
    text: str
    prompt_ids: list[int] = []
    """ids up to where the answer begins"""
    ids: list[int] = []
    """as they were drawn, EOS included where there is one; empty where only the text is known"""
    finished: bool = True
    """False where it was cut off before its EOS"""
    is_safety: bool = False
    """Eq. 4's is_safety(prompt): it was written to draw out an unsafe answer"""


class Scores(NamedTuple):
    """One score an answer, and what a reward wants to be logged beside it."""

    raw: Tensor
    """(S,) fp32"""
    parts: Mapping[str, Tensor] = {}
    """(S,) each: their means are logged as `reward_<name>`"""
    branches: Mapping[str, Tensor] = {}
    """(S,) bool each: how many are True is logged as `branch_<name>`"""


Reward = Callable[[Sequence[Answer]], "Scores | Tensor | Sequence[float]"]
"""Answers -> one raw score each. Every rank calls it with its own share, equally often."""


def score_answers(reward: Reward, answers: Sequence[Answer], device: torch.device) -> Scores:
    """What `reward` says of each answer, checked, on `device`.

    Raises ValueError where it does not give one number for each answer, RuntimeError where one is
    not finite.
    """
    found = reward([own_copy(answer) for answer in answers])
    scores = found if isinstance(found, Scores) else Scores(found)  # type: ignore[arg-type]
    if not isinstance(scores.parts, Mapping) or not isinstance(scores.branches, Mapping):
        raise ValueError("the reward's parts and branches must be dictionaries, of name to values")

    def checked(values: Any, who: str) -> Tensor:
        numbers = as_numbers(who, values, len(answers)).to(device)
        check_finite(who, numbers)
        return numbers

    return Scores(
        checked(scores.raw, "the reward"),
        {name: checked(part, f"the reward's part {name!r}") for name, part in scores.parts.items()},
        {
            name: checked(branch, f"the reward's branch {name!r}").bool()
            for name, branch in scores.branches.items()
        },
    )


def as_numbers(who: str, found: Any, count: int) -> Tensor:
    """(count,) fp32 of what `who` gave for `count` answers; ValueError where it is not that."""
    values = found if isinstance(found, Tensor) else one_each(who, found, count, "score", "answer")
    try:
        numbers = torch.as_tensor(values).detach()
        if numbers.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{who} gave {str(values)[:60]}; it must return one number for each answer"
        ) from None
    if numbers.shape != (count,):
        raise ValueError(
            f"{who} gave scores of shape {tuple(numbers.shape)} for {count_of(count, 'answer')}; "
            "it must return one number for each answer"
        )
    return numbers.float()


def one_each(who: str, found: Any, count: int, what: str, of: str) -> list[Any]:
    """What a reward, a judge or an annotator gave, as a list of one for each of `count` things.

    Raises ValueError where it gave something else, a text or nothing at all, or another number.
    """
    if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Iterable):
        raise ValueError(f"{who} gave {str(found)[:60]!r}; it must return one {what} for each {of}")
    values = list(islice(found, count + 1))  # a generator may have no end
    if len(values) != count:
        gave = "more than " * (len(values) > count) + count_of(min(len(values), count), what)
        told = f"{gave} for {count_of(count, of)}"
        raise ValueError(f"{who} gave {told}; it must return one for each {of}")
    return values


def own_copy(answer: Answer) -> Answer:
    """An answer whose lists may be changed: prompts and ids are used again after the scoring."""
    return answer._replace(
        messages=[{**message} for message in answer.messages],
        prompt_ids=list(answer.prompt_ids),
        ids=list(answer.ids),
    )


def check_finite(who: str, scores: Tensor, of: str = "answer") -> None:
    """UserError naming `who` where one of its scores (S,) or (S, T) is not a finite number."""
    good = torch.isfinite(scores).flatten(1).all(1) if scores.dim() > 1 else torch.isfinite(scores)
    bad = int((~good).sum())
    if bad:
        raise UserError(
            f"{who} gave no finite score for {bad:,} of {count_of(len(scores), of)}; nothing was "
            "trained on them: look at its weights or its code, then run again"
        )


class RewardModels:
    """Eq. 4 over two reward models; with one of them alone, that one's score."""

    def __init__(
        self,
        helpfulness: Transformer | None,
        safety: Transformer | None,
        *,
        combine: str = "switch",
        threshold: float = SAFETY_THRESHOLD,
        max_tokens: int = 16384,
    ):
        """combine: "switch" is the paper's, "sum" adds the scores; threshold: on sigma(R_s), of the
        switch; max_tokens: most tokens in one forward pass. Raises ValueError without any model.
        """
        models = {"helpfulness": helpfulness, "safety": safety}
        self.models = {name: model for name, model in models.items() if model is not None}
        if not self.models:
            raise ValueError("there is no reward model; name one, or hand a reward function over")
        self.combine, self.threshold, self.max_tokens = combine, threshold, max_tokens

    @property
    def context(self) -> int:
        """Tokens of the longest dialogue that all models can read."""
        return min(model.config.context for model in self.models.values())

    def __call__(self, answers: Sequence[Answer]) -> Scores:
        sequences = [answer.prompt_ids + answer.ids for answer in answers]
        parts = {}
        for name, model in self.models.items():
            parts[name] = score(model, sequences, max_tokens=self.max_tokens)
            check_finite(f"the {name} reward model", parts[name])
        if len(parts) == 1:
            return Scores(next(iter(parts.values())), parts)
        helpfulness, safety = parts["helpfulness"], parts["safety"]
        if self.combine == "sum":
            return Scores(helpfulness + safety, parts)
        is_safety = torch.tensor(
            [answer.is_safety for answer in answers], dtype=torch.bool, device=safety.device
        )
        raw, branches = switch(helpfulness, safety, is_safety, self.threshold)
        return Scores(raw, parts, branches)


def switch(
    helpfulness: Tensor, safety: Tensor, is_safety: Tensor, threshold: float = SAFETY_THRESHOLD
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4's switch: (raw score of the model chosen, fp32; which answers went which way).

    helpfulness, safety: (S,) raw scores; is_safety: (S,) bool. Returns (S,) and three (S,) bool:
    "is_safety" and "unsafe" (below the threshold) take the safety score, "helpfulness" the other.
    """
    unsafe = (safety < math.log(threshold / (1 - threshold))) & ~is_safety
    from_safety = is_safety | unsafe
    branches = {"is_safety": is_safety, "unsafe": unsafe, "helpfulness": ~from_safety}
    return torch.where(from_safety, safety, helpfulness).float(), branches


def settle_unfinished(raw: Tensor, finished: Tensor, policy: str, penalty: float) -> Tensor:
    """Raw scores (S,) after the rule for answers without EOS (finished (S,) bool is False).

    keep: the reward's opinion stands. subtract: minus `penalty`. replace: `-penalty` whatever the
    answer says. mask: as keep, but the caller gives these answers no gradient and no part in any
    whitening. All act before whitening, in units of the raw score. Raises ValueError for another
    name.
    """
    if policy not in UNFINISHED:
        raise ValueError(f"unknown rule '{policy}' for unfinished answers: {', '.join(UNFINISHED)}")
    if policy == "subtract":
        return torch.where(finished, raw, raw - penalty)
    if policy == "replace":
        return torch.where(finished, raw, torch.full_like(raw, -penalty))
    return raw


def token_rewards(
    raw: Tensor,
    kl: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    counted: Tensor | None = None,
    whitened: bool = True,
) -> Tensor:
    """Eq. 4 per token: whitened score on an answer's last token, minus beta * KL on each.

    raw: (S,) raw scores, whitened here over the batch of all ranks and before KL is subtracted
    (others whiten per token with the KL inside: that is not the paper's), or taken as they are
    where `whitened` is False. kl: (S, T) k1 per token; lengths: (S,) tokens per answer, EOS
    included; counted: (S,) bool, answers that take part in the whitening. Returns (S, T), zero
    past an answer's end.
    """
    steps = torch.arange(kl.shape[1], device=kl.device)
    rewards = torch.where(steps < lengths[:, None], -beta * kl, torch.zeros_like(kl))
    terminal = whiten(raw, counted) if whitened else raw
    return rewards + torch.where(steps == lengths[:, None] - 1, terminal[:, None], 0.0)
