"""A chat of many turns on the CPU: keys and values stay between turns, so that each runs its own
tokens only. Beside it, for Puna in fp32, the same chat with all of it run again in every turn.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from puna.benchmarks.machine import read_rate
from puna.benchmarks.models import llama_cpp
from puna.benchmarks.models.contexts import next_tokens, with_context
from puna.benchmarks.models.generate import PUNA, Variant, check_near_tie, limit, take_turns
from puna.benchmarks.models.llama_cpp import Opened, llama_cpp_installed
from puna.benchmarks.models.shapes import Ceilings, Models, multiplied_parameters
from puna.benchmarks.opponents import attempted
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import peak_mb
from puna.core.generation.memory import Memory
from puna.core.model import Transformer
from puna.core.native.engine import FORMATS, cached_bytes
from puna.core.native.loader import extension

TURNS = 10
ASKED = ANSWERED = 32  # tokens of a question and of an answer
POSITIONS = TURNS * (ASKED + ANSWERED)

Turns = list[list[int]]
Chat = Callable[[], Turns]  # returns the answers


def bench_chat(models: Models, rounds: int, *, peers: bool = True) -> list[Row]:
    """Rows of TURNS questions and greedy answers. RuntimeError where the providers disagree."""
    generator = torch.Generator().manual_seed(TURNS)
    drawn = torch.randint(models.config.vocab_size, (TURNS, ASKED), generator=generator)
    questions: Turns = drawn.tolist()
    formats = list(FORMATS) if extension() is not None else ["fp32"]
    longer = with_context(models.puna, POSITIONS + 1)
    models = replace(models, puna=longer, config=longer.config)
    chats: dict[Variant, Chat] = {
        ("puna", dtype): partial(chat, longer, questions, dtype, True) for dtype in formats
    }
    again: Variant = ("puna, all again", "fp32")
    chats[again] = partial(chat, longer, questions, "fp32", False)
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as folder, ExitStack() as stack:
        for dtype in formats if peers and llama_cpp_installed() else ():
            one = llama_cpp.opened(longer, dtype, Path(folder), rows=1, positions=POSITIONS + 1)
            opened = attempted("llama.cpp", partial(stack.enter_context, one))
            if opened is not None:
                chats["llama.cpp", dtype] = partial(llama_cpp_chat, opened, questions)
        errors = errors_of(models, questions, {variant: one() for variant, one in chats.items()})
        peaks = {variant: peak_mb(one, models.device) for variant, one in chats.items()}
        timings = take_turns(chats, rounds, models.device)
    return [
        row(
            work_of(models, dtype, again == (provider, dtype)),
            provider.split(",")[0],
            timings[provider, dtype],
            errors[provider, dtype],
            peaks[provider, dtype],
        )
        for provider, dtype in chats
    ]


def chat(model: Transformer, questions: Turns, dtype: str, keeps: bool) -> Turns:
    """Puna's answers; `keeps`: what was run of the turns before is not run again."""
    memory = Memory() if keeps else None
    said: list[int] = []
    answers: Turns = []
    for question in questions:
        said += question
        answers.append(next_tokens(model, said, dtype, ANSWERED, memory))
        said += answers[-1]
    return answers


def llama_cpp_chat(opened: Opened, questions: Turns) -> Turns:
    """The last token of an answer has not been run yet: it goes before the next question."""
    llama_cpp.forget(opened)
    answers: Turns = []
    left: list[int] = []
    place = 0
    for question in questions:
        asked = left + question
        first = llama_cpp.prefill(opened, asked, behind=place)
        place += len(asked)
        (more,) = llama_cpp.greedy(opened, [first], ANSWERED - 1, behind=place)
        answers.append([first, *more])
        place += ANSWERED - 1
        left = answers[-1][-1:]
    return answers


def errors_of(
    models: Models, questions: Turns, answers: Mapping[Variant, Turns]
) -> dict[Variant, float]:
    """The share of answers that are not Puna's in fp32. In fp32 the first of them must leave it at
    a near-tie (those after it follow another chat); RuntimeError else."""
    right, errors = answers[PUNA], {}
    for variant, found in answers.items():
        others = [turn for turn in range(TURNS) if found[turn] != right[turn]]
        errors[variant] = len(others) / TURNS
        if others and variant[1] == "fp32":
            turn = others[0]
            turns = zip(questions[:turn], right[:turn], strict=True)
            said = [token for question, answer in turns for token in question + answer]
            prompt = said + questions[turn]
            check_near_tie(models, prompt, right[turn], found[turn], " ".join(variant))
    return errors


def work_of(models: Models, dtype: str, again: bool) -> Work:
    """Its limit: an answer's tokens are written as fast as weights, keys and values can be read,
    and questions take no time."""
    config, stored = models.config, FORMATS[dtype]
    rate = read_rate(models.device, round(stored * multiplied_parameters(config)))
    kept = cached_bytes(dtype, config.head_dim)
    ceilings = Ceilings(models.ceilings.matmul, rate)
    bound = limit(config, ceilings, 1, POSITIONS / 2, stored, kept)
    name = f"{TURNS} turns" + ", all run again" * again
    return Work("chat", str(models.shape), 1, TURNS * ANSWERED, bound, dtype, name)
