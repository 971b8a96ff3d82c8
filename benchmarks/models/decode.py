"""Decoding speed of one row on the CPU: the greedy tokens after BOS alone.

llama2.c can begin nowhere else, so this is a bench of its own beside `generate`. Timed is the
writing of `NEW` tokens, one forward pass each from position 0 on, without loading the model: by
the wall clock for Puna (all of `generate`) and llama.cpp, by its own report for llama2.c. As in
`generate`, nothing is timed before all have written the same tokens up to near-ties. Puna's rows
of rounded weights (bf16, int8) may write others: their `error` is the share that differs, which
is large for random weights (`puna bench weights` measures the loss of a trained model).

Both peers wait for their threads by spinning: with other work on the cores they lose far more
than Puna does, so figures count only from a machine that does nothing else.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from puna.benchmarks.machine import read_rate
from puna.benchmarks.models.decode_peers import (
    BOS,
    Decoded,
    Decoder,
    llama2c_decoder,
    llama_cpp_decoder,
    llama_cpp_installed,
)
from puna.benchmarks.models.generate import PUNA, Variant, limit, take_turns, verify
from puna.benchmarks.models.llama_bench import llama_bench_decoder
from puna.benchmarks.models.shapes import Ceilings, Models, multiplied_parameters
from puna.benchmarks.opponents import attempted
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import peak_mb
from puna.core.generation.generate import generate
from puna.core.native.engine import FORMATS
from puna.core.native.loader import extension

NEW = 255  # tokens; with BOS the budget of 256


def bench_decode(
    models: Models,
    rounds: int,
    llama2c: Path | None,
    llama_bench: Mapping[str, Path] | None = None,
    *,
    peers: bool = True,
) -> list[Row]:
    """Rows of one shape, none on a GPU; llama2.c's where the path of its run is given, and those of
    each llama-bench by the name it is given. RuntimeError where the providers disagree."""
    if models.gpu:
        return []
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as folder:
        decoders: dict[Variant, Decoder] = {PUNA: puna_decoder(models)}
        if llama2c is not None:
            decoders["llama2.c", "fp32"] = llama2c_decoder(llama2c, models.puna, NEW, Path(folder))
        if peers and llama_cpp_installed():
            theirs = attempted(
                "llama.cpp", lambda: llama_cpp_decoder(models.puna, NEW, Path(folder))
            )
            if theirs is not None:
                decoders["llama.cpp", "fp32"] = theirs
        answers = {variant: [decode().tokens] for variant, decode in decoders.items()}
        errors = verify(models, torch.tensor([[BOS]]), answers)
        for dtype in ("bf16", "int8") if extension() is not None else ():
            rounded = decoders["puna", dtype] = puna_decoder(models, dtype)
            pairs = zip(rounded().tokens, answers[PUNA][0], strict=True)
            errors["puna", dtype] = sum(a != b for a, b in pairs) / NEW
        for name, program in (llama_bench or {}).items():  # its tokens are its own
            decoders[name, "fp32"] = llama_bench_decoder(program, models.puna, NEW, Path(folder))
        elsewhere = ("llama2.c", *(llama_bench or {}))
        peaks = {
            variant: None if variant[0] in elsewhere else peak_mb(decode, models.device)
            for variant, decode in decoders.items()
        }
        timings = take_turns(decoders, rounds, models.device, clock=reported_seconds)

    work = {dtype: work_of(models, dtype) for dtype in FORMATS}
    return [
        row(work[variant[1]], variant[0], timings[variant], errors.get(variant), peaks[variant])
        for variant in decoders
    ]


def work_of(models: Models, dtype: str) -> Work:
    """Its limit: the weights are read as fast as a block of their size can be."""
    ceilings = models.ceilings
    if dtype != "fp32":
        size = round(FORMATS[dtype] * multiplied_parameters(models.config))
        ceilings = Ceilings(ceilings.matmul, read_rate(models.device, size))
    bound = limit(models.config, ceilings, 1, (1 + NEW) / 2, FORMATS[dtype])
    return Work("decode", str(models.shape), 1, NEW, bound, dtype)


def puna_decoder(models: Models, weights: str = "fp32") -> Decoder:
    def decode() -> Decoded:
        start = time.perf_counter()
        (found,) = generate(
            models.puna,
            [[BOS]],
            max_new_tokens=NEW,
            eos_id=None,
            temperature=0.0,
            weight_format=weights,
        )
        return Decoded(found.tokens, time.perf_counter() - start)

    return decode


def reported_seconds(decode: object) -> float:
    """The clock: what a decoder says that it took."""
    assert callable(decode)
    found = decode()
    assert isinstance(found, Decoded)
    return found.seconds
