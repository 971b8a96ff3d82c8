"""llama2.c's `run`, a program that decodes on CPUs, on Puna's weights.

It reads a file that is written here in its own format, begins at BOS and writes greedy tokens.
"""

import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from puna.benchmarks import budget
from puna.core.checkpoint import llama2c
from puna.core.errors import UserError
from puna.core.model import Transformer

BOS = 1  # where llama2.c's run begins, and where it ends


class Decoded(NamedTuple):
    tokens: list[list[int]]  # the new ones of each row
    seconds: float  # that writing them took, without loading


Decoder = Callable[[], Decoded]


def check_llama2c(executable: Path) -> None:
    """ValueError unless llama2.c's run can be started."""
    if not executable.is_file() or not os.access(executable, os.X_OK):
        raise ValueError(
            f"{executable} is no executable file; compile llama2.c's run.c "
            "(gcc -Ofast -march=native -fopenmp run.c -lm -o run) and give the path of run"
        )


def llama2c_decoder(executable: Path, model: Transformer, new: int, folder: Path) -> Decoder:
    """`new` tokens by llama2.c's run, a process of its own on as many threads as PyTorch has.

    Its time is the one it prints, in whole milliseconds and from the second token on; the first
    is counted at the mean of the others.
    """
    write_llama2c(folder, model)
    command = [str(executable.resolve()), "model.bin", "-t", "0", "-n", str(new)]

    def decode() -> Decoded:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment.pop("GOMP_SPINCOUNT", None)  # Puna's choice (puna/__init__.py), not its own
        ended = budget.run(command, cwd=folder, env=environment)
        if ended.returncode:
            raise UserError(
                f"llama2.c's run ended with status {ended.returncode}: {ended.stderr.strip()}"
            )
        return Decoded([read_tokens(ended.stdout, new)], new / read_rate(ended.stderr))

    return decode


def write_llama2c(folder: Path, model: Transformer) -> None:
    """model.bin, and a tokenizer.bin that spells every token as its number: `123;`.

    The tokenizer's layout: the longest piece's length (int32), then for each token its score
    (fp32), its length (int32) and its bytes.
    """
    llama2c.write(folder / "model.bin", model.config, _tensors(model))
    pieces = [f"{token};".encode() for token in range(model.config.vocab_size)]
    data = [struct.pack("<i", max(map(len, pieces)))]
    data += [struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces]
    (folder / "tokenizer.bin").write_bytes(b"".join(data))


def read_tokens(printed: str, new: int) -> list[int]:
    """The tokens that run printed with our tokenizer.bin. RuntimeError unless there are `new`."""
    if not re.fullmatch(r"(\d+;)*\s*", printed):
        raise UserError(f"llama2.c's run printed no token numbers: {printed[:80]!r}")
    tokens = [int(number) for number in re.findall(r"\d+", printed)]
    if len(tokens) != new:
        raise UserError(f"llama2.c's run wrote {len(tokens)} tokens, not {new}; BOS ends it")
    return tokens


def read_rate(printed: str) -> float:
    """The tokens a second that run reports."""
    found = re.search(r"achieved tok/s: (\d+(?:\.\d+)?)", printed)
    if not found or not float(found[1]):
        raise UserError(f"llama2.c's run printed no rate: {printed[:80]!r}")
    return float(found[1])


def _tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, by our names, in fp32 on the CPU."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().float().cpu()
