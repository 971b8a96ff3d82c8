"""Batched sampling from a model: prompts of different lengths in, answers with log-probs out."""

from collections.abc import Iterator
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from puna.core import ops
from puna.core.documents import count_of
from puna.core.generation import continuous
from puna.core.generation.continuous import Remembered
from puna.core.generation.kv_cache import room, rows_within
from puna.core.generation.memory import Memory, ample
from puna.core.generation.sampling import (
    EosIds,
    Sampler,
    all_of,
    blamed,
    check_settings,
    row_keys,
)
from puna.core.generation.slots import Ended, Slots, continued
from puna.core.generation.stopping import Stops
from puna.core.model import Transformer
from puna.core.native.engine import Engine, engine_for


class Completion(NamedTuple):
    tokens: list[int]  # the answer's ids, EOS included where it was drawn
    logprobs: list[float]  # one a token: tempered, untruncated, fp32
    finished: bool  # False: cut off by max_new_tokens or the context


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: EosIds,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    round_index: int = 0,
    prompt_ids: list[int] | None = None,
    sample_ids: list[int] | None = None,
    batch_size: int = 256,
    cache_bytes: int | None = None,
    weight_format: str = "fp32",
    memory: Memory | None = None,
    stops: Stops | None = None,
    called: str = "the model",
) -> list[Completion]:
    """Continue each prompt (a list of ids) until EOS, `max_new_tokens` or the context's end; or
    until one of the strings of `stops` is complete, the token that completes it included.

    `eos_id` is none, one or several. `prompt_ids` and `sample_ids` name the rows for the
    counter-based draw (default: 0, 1, ... and 0); `batch_size` is how many are continued at once,
    fewer where their keys and values would take more than `cache_bytes` (one always is; None: 8 GB,
    on a GPU what is free). Results come in the order of `prompts`. An fp32 model on the CPU runs on
    the native engine, which puts the next prompt in the place of an answer that ends;
    `weight_format` "bf16" or "int8" makes it read rounded weights, which is faster and a little
    worse (`puna bench weights` says both). With a `memory`, what it holds of a conversation is not
    run again. Raises ValueError for an empty prompt or one that fills the context, for ids the
    model does not know, for settings that do not fit, and for logits that hold NaN or inf: of the
    model as `called`. Calls share nothing but the weights: several threads may generate from one
    model.
    """
    sampler = Sampler(temperature, top_k, top_p)
    check_settings(
        sampler,
        seed=seed,
        round_index=round_index,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        batch_size=batch_size,
    )
    _check(model, prompts)
    ids = _row_numbers("prompt_ids", prompt_ids, list(range(len(prompts))))
    samples = _row_numbers("sample_ids", sample_ids, [0] * len(prompts))
    keys = row_keys(seed, round_index, ids, samples)
    limits = _limits(model, prompts, max_new_tokens)
    with blamed(called):
        completions = complete(
            model,
            prompts,
            keys,
            limits,
            sampler,
            eos_id,
            batch_size,
            cache_bytes,
            weight_format,
            remembered=_remembered(memory, ids, samples),
            stops=stops,
        )
    if stops is None:
        return completions
    return [_stopped(each, stops.length(n, each.tokens)) for n, each in enumerate(completions)]


def complete(
    model: Transformer,
    prompts: list[list[int]],
    keys: Tensor,
    limits: list[int],
    sampler: Sampler,
    eos_id: EosIds,
    batch_size: int,
    cache_bytes: int | None = None,
    weight_format: str = "fp32",
    remembered: Remembered | None = None,
    stops: Stops | None = None,
) -> list[Completion]:
    """`generate` with a key (N,) int64 and a limit for each prompt; nothing is checked, and what
    was drawn behind one of the strings of `stops` is still there."""
    engine = engine_for(model, weight_format)
    dtype = torch.float32 if engine is not None else model.dtype
    longest = max((len(prompt) + n for prompt, n in zip(prompts, limits, strict=True)), default=1)
    if remembered is not None:
        longest = ample(model.config, longest)
    if cache_bytes is None:
        prompt = max(map(len, prompts), default=1)
        cache_bytes = room(model.config, model.device, dtype, prompt)
    slots = min(batch_size, rows_within(cache_bytes, model.config, dtype, longest))
    if engine is not None:
        return _by_engine(engine, prompts, keys, limits, sampler, eos_id, slots, remembered, stops)
    return _by_pytorch(model, prompts, keys, limits, sampler, eos_id, slots, stops)


def stream(
    model: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    eos_id: EosIds,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    round_index: int = 0,
    weight_format: str = "fp32",
    memory: Memory | None = None,
    called: str = "the model",
) -> Iterator[int]:
    """The ids of `generate(model, [prompt], ...)`, each as soon as it is drawn.

    Raises ValueError as `generate` does, at once and not with the first id (but for logits that
    hold NaN). On the native engine a stream goes on with the weights that it began with.
    """
    sampler = Sampler(temperature, top_k, top_p)
    check_settings(
        sampler, seed=seed, round_index=round_index, max_new_tokens=max_new_tokens, eos_id=eos_id
    )
    _check(model, [prompt])
    first = torch.zeros(1, dtype=torch.int64)
    keys = row_keys(seed, round_index, first, first)
    limits = _limits(model, [prompt], max_new_tokens)
    engine = engine_for(model, weight_format)
    return _drawn(model, engine, prompt, keys, limits, sampler, eos_id, called, memory)


@torch.inference_mode()
def _drawn(
    model: Transformer,
    engine: Engine | None,
    prompt: list[int],
    keys: Tensor,
    limits: list[int],
    sampler: Sampler,
    eos_id: EosIds,
    called: str,
    memory: Memory | None,
) -> Iterator[int]:
    with blamed(called):
        if engine is not None:
            one = engine, [prompt], keys, limits, sampler, eos_id, 1
            zero = torch.zeros(1, dtype=torch.int64)
            remembered = _remembered(memory, zero, zero)
            told = list(prompt)  # what has been run: a token is, when the next one is drawn
            for drawn in continuous.decode(*one, steps=1, remembered=remembered):
                if remembered is not None:
                    remembered.keep(0, told)
                told.append(int(drawn.tokens))
                yield told[-1]
            return
        if limits[0] < 1:
            return
        slots = Slots(model, 1, len(prompt) + limits[0], limits[0], sampler, eos_id)
        slots.fill([(0, 0)], [prompt], keys, limits)
        while True:
            if slots.state.logprobs[0, slots.state.counts[0] - 1].isnan():
                raise ops.NoDistribution(0)
            yield int(slots.state.last)
            if not slots.state.going:
                return
            slots.step()


def _by_engine(
    engine: Engine,
    prompts: list[list[int]],
    keys: Tensor,
    limits: list[int],
    sampler: Sampler,
    eos_id: EosIds,
    batch_size: int,
    remembered: Remembered | None,
    stops: Stops | None,
) -> list[Completion]:
    given = engine, prompts, keys, limits, sampler, eos_id, batch_size
    steps = list(continuous.decode(*given, remembered=remembered, stops=stops))
    shape = len(prompts), max(limits, default=0)
    tokens, logprobs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    lengths = torch.zeros(len(prompts), dtype=torch.int64)
    if steps:
        drawn = continuous.Drawn(*(torch.cat(parts) for parts in zip(*steps, strict=True)))
        tokens[drawn.prompts, drawn.counts] = drawn.tokens
        logprobs[drawn.prompts, drawn.counts] = drawn.logprobs
        lengths = torch.bincount(drawn.prompts, minlength=len(prompts))
    completions, ends = [], all_of(eos_id)
    for ids, scores, length in zip(
        tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True
    ):
        ended = length > 0 and ids[length - 1] in ends
        completions.append(Completion(ids[:length], scores[:length], ended))
    if remembered is not None:
        for number, (prompt, done) in enumerate(zip(prompts, completions, strict=True)):
            if done.tokens:
                remembered.keep(number, prompt + done.tokens[:-1])
    return completions


def _by_pytorch(
    model: Transformer,
    prompts: list[list[int]],
    keys: Tensor,
    limits: list[int],
    sampler: Sampler,
    eos_id: EosIds,
    slots: int,
    stops: Stops | None,
) -> list[Completion]:
    found = {
        each.prompt: each
        for each in continued(model, prompts, keys, limits, sampler, eos_id, slots, stops)
    }
    none, ends = Ended(-1, [], []), set(all_of(eos_id))
    answers = [found.get(number, none) for number in range(len(prompts))]
    return [
        Completion(each.tokens, each.logprobs, bool(ends.intersection(each.tokens[-1:])))
        for each in answers
    ]


def _stopped(whole: Completion, length: int | None) -> Completion:
    """A completion as far as it counts."""
    if length is None:
        return whole
    return Completion(whole.tokens[:length], whole.logprobs[:length], True)


def _remembered(memory: Memory | None, ids: Tensor, samples: Tensor) -> Remembered | None:
    if memory is None:
        return None
    names = list(zip(ids.tolist(), samples.tolist(), strict=True))
    return Remembered(memory, names, memory.begin())


def _limits(model: Transformer, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    return [min(max_new_tokens, model.config.context - len(prompt)) for prompt in prompts]


def _check(model: Transformer, prompts: list[list[int]]) -> None:
    if model.head != "lm":
        raise ValueError("text is generated by a model with an 'lm' head; this one has 'score'")
    known = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < model.config.context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; it must have at least one and leave "
                f"room in the context of {model.config.context}"
            )
        if not all(issubclass(kind, Integral) for kind in set(map(type, prompt))):
            raise ValueError(f"prompt {row} holds something else than ids: {str(prompt)[:60]}")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < known:
                raise ValueError(
                    f"prompt {row} holds token {token}; the model knows 0 to {known - 1}: "
                    "is this its tokenizer?"
                )


def _row_numbers(name: str, given: list[int] | None, default: list[int]) -> Tensor:
    if given is not None and len(given) != len(default):
        raise ValueError(f"{len(given)} {name} for {count_of(len(default), 'prompt')}")
    numbers = default if given is None else given
    if any(not -(2**63) <= number < 2**63 for number in numbers):
        raise ValueError(f"{name} holds {max(numbers, key=abs)}; they must fit 64 bits")
    return torch.tensor(numbers, dtype=torch.int64)
