"""Decoding speed on the CPU: greedy tokens after a first one alone, of one row or of many.

llama2.c can begin nowhere else, so this is a bench of its own beside `generate`. Timed is the
writing of the tokens, one forward pass each from position 0 on, without loading the model: by
the wall clock for Puna (all of `generate`) and llama.cpp, by its own report for llama2.c. As in
`generate`, nothing is timed before all have written the same tokens up to near-ties. Rows of
rounded weights (bf16, int8) may write others: their `error` is the share that differs from Puna's
in fp32, which is large for random weights (`puna bench weights` measures the loss of a trained
model).

Both peers wait for their threads by spinning: with other work on the cores they lose far more
than Puna does, so figures count only from a machine that does nothing else.
"""

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from puna.benchmarks.machine import RATED, matmul_rate, read_rate
from puna.benchmarks.models import llama_cpp
from puna.benchmarks.models.decode_peers import BOS, Decoded, Decoder, llama2c_decoder
from puna.benchmarks.models.generate import PUNA, Variant, limit, take_turns, verify
from puna.benchmarks.models.llama_bench import llama_bench_decoder
from puna.benchmarks.models.llama_cpp import Opened, llama_cpp_installed
from puna.benchmarks.models.shapes import Ceilings, Models, multiplied_parameters
from puna.benchmarks.opponents import attempted
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import peak_mb
from puna.core.config import parameter_count
from puna.core.generation.generate import generate
from puna.core.native.engine import FORMATS, cached_bytes
from puna.core.native.loader import extension

NEW = 255  # tokens; with BOS the budget of 256
FEWER = 63  # of many rows, or of a large model: seconds each, and its rate does not depend on it
LARGE = 500e6  # parameters
BATCHES = (1, 32)


def bench_decode(
    models: Models,
    rounds: int,
    llama2c: Path | None,
    llama_bench: Mapping[str, Path] | None = None,
    *,
    peers: bool = True,
    batch: int = 1,
) -> list[Row]:
    """Rows of one shape, none on a GPU. Of one row also llama2.c's, where the path of its run is
    given, and those of each llama-bench by the name it is given. RuntimeError where the providers
    disagree."""
    if models.gpu:
        return []
    new, starts = new_tokens(models, batch), first_tokens(models, batch)
    formats = list(FORMATS) if extension() is not None else ["fp32"]
    programs = llama_bench or {} if batch == 1 else {}  # their tokens are their own
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        decoders: dict[Variant, Decoder] = {
            ("puna", dtype): partial(puna_decoded, models, dtype, starts, new) for dtype in formats
        }
        if llama2c is not None and batch == 1:
            decoders["llama2.c", "fp32"] = llama2c_decoder(llama2c, models.puna, new, folder)
        for dtype in formats if peers and llama_cpp_installed() else ():
            one = llama_cpp.opened(models.puna, dtype, folder, rows=batch, positions=new + 1)
            if (opened := attempted("llama.cpp", partial(stack.enter_context, one))) is not None:
                decoders["llama.cpp", dtype] = partial(llama_cpp_decoded, opened, starts, new)
        said = {variant: decode().tokens for variant, decode in decoders.items()}
        errors = errors_of(models, [[token] for token in starts], said)
        for name, program in programs.items():
            decoders[name, "fp32"] = llama_bench_decoder(program, models.puna, new, folder)
        elsewhere = ("llama2.c", *programs)
        peaks = {
            variant: None if variant[0] in elsewhere else peak_mb(decode, models.device)
            for variant, decode in decoders.items()
        }
        timings = take_turns(decoders, rounds, models.device, clock=reported_seconds)

    work = {dtype: work_of(models, dtype, batch, new) for dtype in formats}
    return [
        row(work[variant[1]], variant[0], timings[variant], errors.get(variant), peaks[variant])
        for variant in decoders
    ]


def new_tokens(models: Models, batch: int) -> int:
    """How many are written by each row; fewer where the context holds no more."""
    room = models.config.context - 1  # behind BOS
    many = NEW if batch == 1 and parameter_count(models.config) < LARGE else min(NEW, FEWER)
    return min(many, room)


def first_tokens(models: Models, batch: int) -> list[int]:
    """What each row begins with: BOS, which llama2.c needs, where there is one alone."""
    if batch == 1:
        return [BOS]
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(models.config.vocab_size, (batch,), generator=generator).tolist()


def errors_of(
    models: Models, prompts: list[list[int]], answers: Mapping[Variant, list[list[int]]]
) -> dict[Variant, float]:
    """Of fp32 weights the share of rows that leave Puna's at near-ties, of rounded ones the share
    of tokens that are not Puna's in fp32. RuntimeError where the providers disagree in fp32."""
    exact = {variant: found for variant, found in answers.items() if variant[1] == "fp32"}
    errors = verify(models, torch.tensor(prompts), exact)
    right = sum(answers[PUNA], [])
    for variant in answers.keys() - exact.keys():
        pairs = zip(sum(answers[variant], []), right, strict=True)
        errors[variant] = sum(a != b for a, b in pairs) / len(right)
    return errors


def work_of(models: Models, dtype: str, batch: int, new: int) -> Work:
    """Its limit: the weights are read as fast as a block of their size can be."""
    ceilings = models.ceilings
    if dtype != "fp32":
        size = round(FORMATS[dtype] * multiplied_parameters(models.config))
        rate = matmul_rate(models.device, RATED[dtype])
        ceilings = Ceilings(rate, read_rate(models.device, size))
    kept = cached_bytes(dtype, models.config.head_dim)
    bound = limit(models.config, ceilings, batch, (1 + new) / 2, FORMATS[dtype], kept)
    return Work("decode", str(models.shape), batch, batch * new, bound, dtype)


def puna_decoded(models: Models, weights: str, starts: list[int], new: int) -> Decoded:
    start = time.perf_counter()
    found = generate(
        models.puna,
        [[token] for token in starts],
        max_new_tokens=new,
        eos_id=None,
        temperature=0.0,
        weight_format=weights,
    )
    return Decoded([each.tokens for each in found], time.perf_counter() - start)


def llama_cpp_decoded(opened: Opened, starts: list[int], new: int) -> Decoded:
    llama_cpp.forget(opened)
    start = time.perf_counter()
    tokens = llama_cpp.greedy(opened, starts, new)
    return Decoded(tokens, time.perf_counter() - start)


def reported_seconds(decode: object) -> float:
    """The clock: what a decoder says that it took."""
    assert callable(decode)
    found = decode()
    assert isinstance(found, Decoded)
    return found.seconds
