"""Decoding speed of one row on the CPU: the greedy tokens after BOS alone.

llama2.c can begin nowhere else, so this is a bench of its own beside `generate`. Timed is the
writing of `NEW` tokens, one forward pass each from position 0 on, without loading the model: by
the wall clock for Puna (all of `generate`) and llama.cpp, by its own report for llama2.c. As in
`generate`, nothing is timed before all have written the same tokens up to near-ties.

Both peers wait for their threads by spinning: with other work on the cores they lose far more
than Puna does, so figures count only from a machine that does nothing else.
"""

import tempfile
import time
from pathlib import Path

import torch

from puna.benchmarks.decode_peers import (
    BOS,
    Decoded,
    Decoder,
    llama2c_decoder,
    llama_cpp_decoder,
    llama_cpp_installed,
)
from puna.benchmarks.generate import PUNA, Variant, limit, take_turns, verify
from puna.benchmarks.models import Models
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import peak_mb
from puna.core.generation import generate

NEW = 255  # tokens; with BOS the budget of 256


def bench_decode(models: Models, rounds: int, llama2c: Path | None) -> list[Row]:
    """Rows of one shape, none on a GPU; llama2.c's where the path of its run is given.
    RuntimeError where the providers disagree."""
    if models.device.type != "cpu":
        return []
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as folder:
        decoders: dict[Variant, Decoder] = {PUNA: puna_decoder(models)}
        if llama2c is not None:
            decoders["llama2.c", "fp32"] = llama2c_decoder(llama2c, models.puna, NEW, Path(folder))
        if llama_cpp_installed():
            decoders["llama.cpp", "fp32"] = llama_cpp_decoder(models.puna, NEW, Path(folder))
        answers = {variant: [decode().tokens] for variant, decode in decoders.items()}
        errors = verify(models, torch.tensor([[BOS]]), answers)
        peaks = {
            variant: None if variant[0] == "llama2.c" else peak_mb(decode, models.device)
            for variant, decode in decoders.items()
        }
        timings = take_turns(decoders, rounds, models.device, clock=reported_seconds)

    def work(dtype: str) -> Work:
        bound = limit(models.config, models.ceilings, 1, (1 + NEW) / 2)
        return Work("decode", models.shape, 1, NEW, bound, dtype)

    return [
        row(work(variant[1]), variant[0], timings[variant], errors[variant], peaks[variant])
        for variant in decoders
    ]


def puna_decoder(models: Models) -> Decoder:
    def decode() -> Decoded:
        start = time.perf_counter()
        (found,) = generate(models.puna, [[BOS]], max_new_tokens=NEW, eos_id=None, temperature=0.0)
        return Decoded(found.tokens, time.perf_counter() - start)

    return decode


def reported_seconds(decode: object) -> float:
    """The clock: what a decoder says that it took."""
    assert callable(decode)
    found = decode()
    assert isinstance(found, Decoded)
    return found.seconds
