"""llama.cpp's own measuring program, `llama-bench`, of whatever build is given: its ZenDNN build,
ik_llama.cpp, a newer one than the package.

It decodes tokens of its own choice from an empty context and reports their rate: the same work, but
nothing that could be held against Puna's tokens, so that its rows have no `error`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from puna.benchmarks import budget
from puna.benchmarks.machine import installed
from puna.benchmarks.models.decode_peers import Decoded, Decoder
from puna.benchmarks.models.llama_cpp import write_gguf
from puna.core.documents import parse_json
from puna.core.errors import UserError
from puna.core.model import Transformer


def named_programs(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` or a path, whose folder two above the program (build/bin) is the name. ValueError
    where one cannot be started, or two have one name."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        program = Path(path if equals else text)
        if not program.is_file() or not os.access(program, os.X_OK):
            raise ValueError(
                f"{program} is no executable file; give the path of a llama-bench that was built"
            )
        parents = program.resolve().parents
        name = name if equals else parents[min(2, len(parents) - 1)].name or program.name
        if name in found:
            raise ValueError(f"two llama-bench are called {name!r}; name them: NAME=PATH")
        found[name] = program
    if found and installed("gguf") is None:
        raise ValueError("a file for llama-bench takes the package gguf; pip install gguf")
    return found


def llama_bench_decoder(program: Path, model: Transformer, new: int, folder: Path) -> Decoder:
    """`new` tokens by one llama-bench, a process of its own on as many threads as PyTorch has."""
    path = folder / "fp32.gguf"
    if not path.exists():
        write_gguf(path, model)
    threads = str(torch.get_num_threads())
    command = [str(program.resolve()), "-m", str(path), "-p", "0", "-n", str(new)]
    command += ["-t", threads, "-r", "1", "-o", "json"]

    def decode() -> Decoded:
        ended = budget.run(command)
        if ended.returncode:
            said = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
            raise UserError(f"{program} ended with status {ended.returncode}: {said}")
        return Decoded([], new / rate_of(ended.stdout, str(program)))

    return decode


def rate_of(printed: str, program: str) -> float:
    """Tokens a second in llama-bench's JSON; UserError where there is none."""
    try:
        (row,) = parse_json(printed.encode(), program, "is it a llama-bench?")
        rate = float(row["avg_ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{program} printed no rate: {json.dumps(printed[:80])}") from error
    if not 0 < rate < 1e12:
        raise UserError(f"{program} printed no rate: {rate}")
    return rate
