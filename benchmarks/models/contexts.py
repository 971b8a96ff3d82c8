"""Long contexts on the CPU: reading a prompt ("prefill"), and decoding behind it ("context").

A shape whose own context is shorter is given a longer one: the work is the same, and the weights
are random anyway. Puna's rows of rounded weights are held against its fp32 as in `decode`: by the
share of tokens that differ.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from puna.benchmarks.machine import RATED, matmul_rate, read_rate
from puna.benchmarks.models import llama_cpp
from puna.benchmarks.models.decode import errors_of
from puna.benchmarks.models.generate import Variant, limit, take_turns
from puna.benchmarks.models.llama_cpp import Opened, llama_cpp_installed
from puna.benchmarks.models.shapes import (
    Ceilings,
    Models,
    finishing_parameters,
    multiplied_parameters,
)
from puna.benchmarks.opponents import attempted
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import peak_mb
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.generation.memory import Memory
from puna.core.model import Transformer
from puna.core.native.engine import FORMATS, cached_bytes
from puna.core.native.loader import extension

LENGTHS = (512, 4096)  # of the prompt
BEHIND = 64  # tokens decoded behind the longest

Answer = Callable[[], list[int]]


def bench_prompt(models: Models, length: int, rounds: int, *, peers: bool = True) -> list[Row]:
    """Rows of reading `length` tokens, until the next one is known. RuntimeError where the
    providers disagree."""

    def ours(dtype: str) -> Answer:
        return partial(next_tokens, models.puna, prompt, dtype, 1, None)

    def theirs(opened: Opened) -> list[int]:
        llama_cpp.forget(opened)
        return [llama_cpp.prefill(opened, prompt)]

    models, prompt = prompted(models, length)
    works = {dtype: work_of_prompt(models, length, dtype) for dtype in FORMATS}
    return measured(models, prompt, length + 1, ours, theirs, works, rounds, peers, reads=True)


def bench_behind(models: Models, length: int, rounds: int, *, peers: bool = True) -> list[Row]:
    """Rows of decoding BEHIND tokens, the first after the last of a prompt of `length` that has
    been read."""

    def ours(dtype: str) -> Answer:
        memory = Memory()
        next_tokens(models.puna, prompt, dtype, 1, memory)
        return partial(next_tokens, models.puna, prompt, dtype, BEHIND, memory)

    def theirs(opened: Opened) -> list[int]:
        if opened not in filled:
            llama_cpp.prefill(opened, prompt)
            filled.append(opened)
        llama_cpp.forget(opened, length - 1)
        return llama_cpp.greedy(opened, prompt[-1:], BEHIND, behind=length - 1)[0]

    filled: list[Opened] = []
    models, prompt = prompted(models, length)
    works = {dtype: work_behind(models, length, dtype) for dtype in FORMATS}
    room = length + BEHIND
    return measured(models, prompt, room, ours, theirs, works, rounds, peers, reads=False)


def prompted(models: Models, length: int) -> tuple[Models, list[int]]:
    """The models with room for `length` tokens and BEHIND more, and such a prompt."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(models.config.vocab_size, (length,), generator=generator).tolist()
    longer = with_context(models.puna, length + BEHIND)
    return replace(models, puna=longer, config=longer.config), prompt


def with_context(model: Transformer, positions: int) -> Transformer:
    """The same weights where they are, with room for so many positions."""
    if model.config.context >= positions:
        return model
    with torch.device("meta"):
        longer = Transformer(replace(model.config, context=positions))
    longer.load_state_dict(model.state_dict(), assign=True)
    return longer


def next_tokens(
    model: Transformer, prompt: list[int], dtype: str, new: int, memory: Memory | None
) -> list[int]:
    (found,) = generate(
        model, [prompt], max_new_tokens=new, eos_id=None, temperature=0.0, weight_format=dtype,
        memory=memory,
    )  # fmt: skip
    return found.tokens


def measured(
    models: Models,
    prompt: list[int],
    positions: int,
    ours: Callable[[str], Answer],
    theirs: Callable[[Opened], list[int]],
    works: dict[str, Work],
    rounds: int,
    peers: bool,
    reads: bool,
) -> list[Row]:
    """Rows of Puna and of llama.cpp, where it is installed, in every format of weights. `theirs` is
    given a llama.cpp with room for `positions`, which `reads` prompts or goes on behind one."""
    formats = list(FORMATS) if extension() is not None else ["fp32"]
    calls: dict[Variant, Answer] = {("puna", dtype): ours(dtype) for dtype in formats}
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as folder, ExitStack() as stack:
        for dtype in formats if peers and llama_cpp_installed() else ():
            one = llama_cpp.opened(
                models.puna, dtype, Path(folder), rows=1, positions=positions, reads=reads
            )
            opened = attempted("llama.cpp", partial(stack.enter_context, one))
            if opened is not None:
                calls["llama.cpp", dtype] = partial(theirs, opened)
        answers = {variant: call() for variant, call in calls.items()}
        errors = errors_of(models, [prompt], {name: [found] for name, found in answers.items()})
        peaks = {variant: peak_mb(call, models.device) for variant, call in calls.items()}
        timings = take_turns(calls, rounds, models.device)
    return [
        row(works[variant[1]], variant[0], timings[variant], errors[variant], peaks[variant])
        for variant in calls
    ]


def work_of_prompt(models: Models, length: int, dtype: str) -> Work:
    """Its limit: the matrix products of a prompt at this format's rate, and nothing else."""
    rate = matmul_rate(models.device, RATED[dtype])
    bound = length * rate / products_of_prompt(models.config, length)
    return Work("prefill", str(models.shape), 1, length, bound, dtype, f"{length:,} tokens")


def products_of_prompt(config: ModelConfig, length: int) -> float:
    """FLOPs of the matrix products that a prompt's last token needs: all blocks, but the last one's
    end and the head only once; and causal attention's two, halved by the mask."""
    head = config.vocab_size * config.dim
    blocks = multiplied_parameters(config) - head
    once = (length - 1) * finishing_parameters(config)
    width = config.n_heads * config.head_dim
    attention = 2 * (config.n_layers - 1) * width * length**2 + 4 * width * length
    return 2.0 * (blocks * length - once + head) + attention


def work_behind(models: Models, length: int, dtype: str) -> Work:
    """Its limit: weights, keys and values are read as fast as a block of their size can be."""
    config, stored = models.config, FORMATS[dtype]
    rate = read_rate(models.device, round(stored * multiplied_parameters(config)))
    ceilings = Ceilings(models.ceilings.matmul, rate)
    kept = cached_bytes(dtype, config.head_dim)
    bound = limit(config, ceilings, 1, length + BEHIND / 2, stored, kept)
    name = f"behind {length:,} tokens"
    return Work("context", str(models.shape), 1, BEHIND, bound, dtype, name)
