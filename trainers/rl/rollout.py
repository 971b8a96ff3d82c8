"""Rollouts: answers sampled with the policy's own weights, and second looks at the same ids.

The ids, lengths and log-probs are kept as they were drawn; nothing is ever tokenised again. An
answer's length is stored, never searched for: Llama 2 has no padding piece, and EOS belongs to
the answer. S answers, T tokens of the longest one, A = sum of the lengths, C model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.core import ops, parallel
from puna.core.generation.generate import Completion
from puna.core.generation.sampling import EosIds
from puna.core.model import Transformer
from puna.core.native.engine import unfit
from puna.core.packed import forward_groups
from puna.core.tensor_parallel import generate_together
from puna.core.text.chat import decode_answer
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.prompts import EncodedPrompt
from puna.trainers.rl.engine import Engine
from puna.trainers.rl.rewards import Answer, check_finite


class Rollout(NamedTuple):
    """Answers to S prompts (a prompt asked for K answers stands here K times)."""

    prompts: list[list[int]]  # S lists of ids
    answers: list[list[int]]  # S lists of ids, EOS included where the answer is finished
    lengths: Tensor  # (S,) int64, tokens per answer
    logprobs: Tensor  # (S, T) fp32, of the tempered distribution the tokens were drawn from
    finished: Tensor  # (S,) bool, the answer ends in EOS

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and answer of each row as one list of ids."""
        return [p + a for p, a in zip(self.prompts, self.answers, strict=True)]

    @property
    def mask(self) -> Tensor:
        """(S, T) bool, True on answer tokens."""
        return answer_mask(self.lengths, self.logprobs.shape[1])

    def select(self, rows: Sequence[int]) -> "Rollout":
        """The rows given, in that order; T stays as it is."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        return Rollout(
            [self.prompts[i] for i in rows],
            [self.answers[i] for i in rows],
            self.lengths[index],
            self.logprobs[index],
            self.finished[index],
        )


def as_answers(
    answers: Sequence[list[int]],
    finished: Sequence[bool],
    prompts: Sequence[EncodedPrompt],
    tokenizer: Tokenizer,
) -> list[Answer]:
    """Ids as rewards, annotators and judges are given them; one prompt for each answer."""
    rows = zip(prompts, answers, finished, strict=True)
    return [
        Answer(p.messages, decode_answer(tokenizer, ids), p.ids, ids, ended, p.is_safety)
        for p, ids, ended in rows
    ]


def answer_mask(lengths: Tensor, steps: int) -> Tensor:
    """(S, T) bool from lengths (S,): True on the first `lengths[s]` of T = `steps` tokens."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def pad_answers(flat: Tensor, lengths: Tensor, steps: int) -> Tensor:
    """(S, T) with zeros on the right, from flat (A,) answer tokens laid end to end."""
    padded = flat.new_zeros(len(lengths), steps)
    padded[answer_mask(lengths, steps)] = flat
    return padded


@contextmanager
def at_hand(policy: Transformer, engine: Engine | None) -> Iterator[Transformer]:
    """What answers several times in a row: the policy with its weights gathered once (collective),
    or as it is where an `engine` draws."""
    if engine is not None:
        yield policy
        return
    with parallel.gathered(policy) as whole:
        yield whole


def draw_answers(
    policy: Transformer,
    prompts: Sequence[list[int]],
    *,
    prompt_ids: Sequence[int],
    sample_ids: Sequence[int],
    max_new_tokens: int,
    eos_id: EosIds,
    temperature: float,
    seed: int,
    round_index: int,
    among: int = 1,
    engine: Engine | None = None,
    **options: Any,
) -> list[Completion]:
    """An answer to each prompt, of which `among` neighbouring ranks have the same ones and draw a
    part each (collective). `policy` may be gathered already.

    The draw for token t of row s is a function of (seed, round_index, prompt_ids[s],
    sample_ids[s], t) alone: not of the batch, the order or the rank. `options` are `generate`'s, of
    what stands side by side, what was computed before and what the model is called. An `engine`
    draws in place of this process, by a generator of its own, and says no log-probs.
    """
    place = parallel.rank() % among
    mine = range(place, len(prompts), among)
    asked = [prompts[i] for i in mine]
    numbers = [prompt_ids[i] for i in mine]
    samples = [sample_ids[i] for i in mine]
    if engine is not None:
        answers = engine.draw(
            policy,
            asked,
            [(seed, round_index, *key) for key in zip(numbers, samples, strict=True)],
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
            temperature=temperature,
            batch_size=options.get("batch_size", 256),
        )
        found = [Completion(each.tokens, [], each.finished) for each in answers]
    else:
        with parallel.gathered(policy) as whole:  # once: from shards it is 20x slower
            found = generate_together(
                whole,
                asked,
                max_new_tokens=max_new_tokens,
                eos_id=eos_id,
                temperature=temperature,
                seed=seed,
                round_index=round_index,
                prompt_ids=numbers,
                sample_ids=samples,
                weight_format=_format(whole),
                **{"called": "the policy", **options},
            )
    if among == 1:
        return found
    first = parallel.rank() - place
    parts = parallel.gather([list(each) for each in found])[first : first + among]
    return [Completion(*parts[i % among][i // among]) for i in range(len(prompts))]


def _format(model: Transformer) -> str:
    """Of the weights that draw: that of the products in force, so that log-probs are
    training's (with heads of 16, 32, ... to the bit)."""
    return "bf16" if ops.products() == "bf16" and unfit(model) is None else "fp32"


@torch.no_grad()
def collect(
    policy: Transformer,
    prompts: Sequence[list[int]],
    *,
    temperature: float,
    engine: Engine | None = None,
    max_tokens: int = 16384,
    **options: Any,
) -> Rollout:
    """Sample one answer to each of this rank's prompts (repeat a prompt for K answers), as
    `draw_answers` does with these `options`.

    Nothing is cut off the distribution (no top-k, no top-p): a ratio to a truncated one would not
    be a ratio of probabilities. The log-probs are the policy's also where an `engine` draws: then
    it scores the answers, `max_tokens` in one forward pass. Raises ValueError for a temperature
    that is not above 0, an empty prompt, or what the engine cannot do.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; rollouts are sampled, so it must be above 0"
        )
    if any(not prompt for prompt in prompts):
        raise ValueError("an empty prompt cannot be answered; it needs at least BOS")
    tp = parallel.tp_of(policy)
    drawn = draw_answers(
        policy, prompts, temperature=temperature, engine=engine, among=tp, **options
    )
    if engine is not None:
        return scored_again(policy, prompts, drawn, temperature, max_tokens)
    logprobs = torch.tensor([p for c in drawn for p in c.logprobs], dtype=torch.float32)
    assert bool((logprobs <= 0).all()), "a log-probability is never positive"
    return as_rollout(prompts, drawn, logprobs, next(policy.parameters()).device)


def as_rollout(
    prompts: Sequence[list[int]],
    answers: Sequence[Any],
    logprobs: Tensor,
    device: torch.device,
) -> Rollout:
    """Answers with their `tokens` and whether they are `finished`, and (A,) log-probs."""
    lengths = torch.tensor([len(answer.tokens) for answer in answers], dtype=torch.int64)
    assert bool((lengths > 0).all()), "an answer has at least one token"
    steps = int(lengths.max()) if len(lengths) else 0
    return Rollout(
        list(prompts),
        [answer.tokens for answer in answers],
        lengths.to(device),
        pad_answers(logprobs, lengths, steps).to(device),
        torch.tensor([answer.finished for answer in answers], dtype=torch.bool).to(device),
    )


def scored_again(
    policy: Transformer,
    prompts: Sequence[list[int]],
    drawn: Sequence[Any],
    temperature: float,
    max_tokens: int,
) -> Rollout:
    """What somebody else drew, with the log-probs that the policy gives it (collective)."""
    device = next(policy.parameters()).device
    unknown = torch.zeros(sum(len(answer.tokens) for answer in drawn))
    rollout = as_rollout(prompts, drawn, unknown, device)
    logprobs, _ = answer_logprobs(policy, rollout, temperature=temperature, max_tokens=max_tokens)
    return rollout._replace(logprobs=logprobs)


def sample_everywhere(
    policy: Transformer,
    prompts: Sequence[list[int]],
    *,
    prompt_ids: Sequence[int],
    sample_ids: Sequence[int],
    chunk: int = 0,
    look: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[list[int]]:
    """The ids of an answer to each prompt, on every rank: each draws its share of them, as
    `draw_answers` does with these `options`, `chunk` answers at a time (0: all). `look` is called
    between two chunks and may raise, where a stop was asked for.

    Prompts and options are the same on all ranks, and the answers do not depend on how many there
    are.
    """
    found: list[list[int]] = []
    size = chunk or max(1, len(prompts))
    for start in range(0, len(prompts), size):
        if start:
            look()
        part = slice(start, start + size)
        drawn = draw_answers(
            policy,
            prompts[part],
            prompt_ids=prompt_ids[part],
            sample_ids=sample_ids[part],
            among=parallel.world_size(),
            **options,
        )
        found += [completion.tokens for completion in drawn]
    return found


def answer_states(
    model: Transformer, rollout: Rollout, *, max_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """One packed forward pass per micro-batch: (rows, hidden (A', C), targets (A',)).

    hidden[j] is the state *before* answer token targets[j] was emitted (the one that predicts it
    and whose value the critic estimates); the A' tokens are those of the rows, in order, end to
    end. With an empty list of rows (see `packed`) one stand-in token is yielded.
    """
    sequences = rollout.sequences
    before = [
        range(len(prompt) - 1, len(sequence) - 1)
        for prompt, sequence in zip(rollout.prompts, sequences, strict=True)
    ]
    for rows, hidden in forward_groups(model, sequences, before, max_tokens):
        asked = [t for i in rows for t in rollout.answers[i]] if rows else [0]
        yield rows, hidden, torch.tensor(asked, dtype=torch.int64, device=hidden.device)


@torch.no_grad()
def answer_logprobs(
    model: Transformer, rollout: Rollout, *, temperature: float, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), both (S, T) fp32 and zero past an answer's end, under `model`.

    `temperature` is the one the answers were drawn at: behaviour, reference and new log-probs
    are all of the tempered distribution.
    """
    logprobs, entropy = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    for rows, hidden, targets in answer_states(model, rollout, max_tokens=max_tokens):
        new = model.logprobs(hidden, targets, temperature=temperature)
        if rows:
            for out, flat in zip((logprobs, entropy), new, strict=True):
                out[rows] = pad_answers(flat, rollout.lengths[rows], out.shape[1])
    return logprobs, entropy


@torch.no_grad()
def answer_values(critic: Transformer, rollout: Rollout, *, max_tokens: int) -> Tensor:
    """The critic's value (S, T) fp32 of the state before each answer token, zero past the end.

    Raises RuntimeError where one is not finite: the critic is at fault, not its learning rate.
    """
    values = torch.zeros_like(rollout.logprobs)
    for rows, hidden, _ in answer_states(critic, rollout, max_tokens=max_tokens):
        flat = critic.logits(hidden)[:, 0]
        if rows:
            values[rows] = pad_answers(flat, rollout.lengths[rows], values.shape[1])
    check_finite("the critic", values)
    return values
