"""Training and generation over several ranks: what sharding costs and what more ranks win.

Outside of torchrun a process a rank is started for 1, 2, 4, ... ranks (on a CPU for 1 and 2);
under torchrun those ranks are measured. Every rank has rows of its own, as many with two ranks as
with one.

"puna" is sharded over the ranks (FSDP2), "puna-replicated" a whole copy on every rank whose
gradients are summed. A sharded model generates from weights that are gathered once a call,
gathering included; "puna-unsharded" has them whole before it begins (new ones each time, as after a
training step). Nothing is timed before the
losses of three steps agree, the first of them also with a plain model's, and the greedy tokens are
the same. The limit is the matrix products' rate of all ranks together, measured side by side.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from puna.benchmarks import budget
from puna.benchmarks.machine import matmul_rate, read_rate
from puna.benchmarks.models.generate import limit
from puna.benchmarks.models.shapes import (
    DTYPES,
    Ceilings,
    Shape,
    multiplied_parameters,
    weights_of,
)
from puna.benchmarks.models.steps import puna_step
from puna.benchmarks.models.train import TOLERANCE, flops
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import finish, interleaved, peak_mb
from puna.core import parallel
from puna.core.device import device_of_name
from puna.core.errors import UserError
from puna.core.generation.generate import generate
from puna.core.model import Transformer

ROWS, TOKENS = {"cpu": 4, "cuda": 2}, {"cpu": 256, "cuda": 4096}  # of a rank's training step
PROMPTS, PROMPT, NEW = {"cpu": 8, "cuda": 32}, 16, 128  # of a rank's answers
BYTES = 2 * 16 + 4  # a parameter: two models that train and a whole copy, at the most


def bench_fsdp(
    shape: Shape, device: torch.device, dtype: str, rounds: int, *, quick: bool = False
) -> Iterator[list[Row]]:
    """The rows of one number of ranks after the other (collective under torchrun)."""
    if parallel.world_size() > 1:
        yield measured(shape, device, dtype, rounds)
        return
    for ranks in [rank_counts(device)[-1]] if quick else rank_counts(device):
        yield launched(ranks, shape, device, dtype, rounds)


def rank_counts(device: torch.device) -> list[int]:
    """1, 2, 4, ... and as many as there are; on a CPU 1 and 2."""
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def launched(ranks: int, shape: Shape, device: torch.device, dtype: str, rounds: int) -> list[Row]:
    """`measured` in processes of their own, which share this one's threads."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "puna.benchmarks.models.fsdp"]
    given = {"shape": shape.size, "layers": shape.layers, "rounds": rounds, "dtype": dtype}
    command += [f"--{name}={value}" for name, value in given.items()]
    command += [f"--device={device.type}", *(["--tiny"] if shape.tiny else [])]
    threads = max(1, torch.get_num_threads() // rank_counts(device)[-1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    ended = budget.run(command, env=environment)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()] or ["nothing"]
        failure = next((line for line in said if "Error" in line), said[-1])
        raise UserError(f"{ranks} ranks ended with status {ended.returncode}: {failure.strip()}")
    found: list[Row] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measured(shape: Shape, device: torch.device, dtype: str, rounds: int) -> list[Row]:
    """The rows of the ranks that there are (collective); the same on each. UserError where they
    train or write something else than one process would."""
    kind = None if dtype == "fp32" else DTYPES[dtype]
    rate = everywhere(matmul_rate(device, DTYPES[dtype], dry=shape.tiny))
    found = train_rows(shape, device, dtype, kind, rounds, rate)
    return found + generate_rows(shape, device, dtype, kind, rounds, rate)


def train_rows(
    shape: Shape,
    device: torch.device,
    dtype: str,
    kind: torch.dtype | None,
    rounds: int,
    rate: float,
) -> list[Row]:
    ranks, config = parallel.world_size(), shape.config
    rows, length = ROWS[device.type], min(TOKENS[device.type], config.context)
    tokens = own_tokens(config.vocab_size, rows, length, device)
    truth = first_loss(shape, tokens)
    sharded = puna_step(weights_of(shape, device), tokens, kind)
    work: dict[str, Callable[[], float]] = {"puna": of_all(sharded)}
    if ranks > 1:
        whole = puna_step(weights_of(shape, device), tokens, kind, replicate=ranks)
        work["puna-replicated"] = of_all(whole)
    errors = verify({name: [step() for _ in range(3)] for name, step in work.items()}, truth, dtype)
    peaks = {name: peak_mb(step, device) for name, step in work.items()}
    timings = interleaved(work, rounds, device, lambda call: together(call, device))
    bound = rate / flops(config, length)
    done = Work(
        "fsdp", str(shape), ranks * rows, ranks * rows * length, bound, dtype, "train", ranks
    )
    return [row(done, name, timings[name], errors[name], peaks[name]) for name in work]


def generate_rows(
    shape: Shape,
    device: torch.device,
    dtype: str,
    kind: torch.dtype | None,
    rounds: int,
    rate: float,
) -> list[Row]:
    ranks, config = parallel.world_size(), shape.config
    count, new = PROMPTS[device.type], min(NEW, config.context - PROMPT)
    prompts = own_tokens(config.vocab_size, count, PROMPT, device).tolist()
    plain = weights_of(shape, device, DTYPES[dtype])
    sharded = parallel.prepare(weights_of(shape, device), compute_dtype=kind)

    def answers(model: Transformer) -> list[list[int]]:
        found = generate(model, prompts, max_new_tokens=new, eos_id=None, temperature=0.0)
        return [each.tokens for each in found]

    def gathered() -> list[list[int]]:
        with parallel.gathered(sharded) as whole:
            return answers(whole)

    @torch.no_grad()
    def unsharded() -> list[list[int]]:
        # Weights have changed since the last rollout, here, too: the engine packs them anew. Twice
        # or half the logits have the same greedy tokens.
        plain.model.norm.weight.mul_(next(factors))
        return answers(plain)

    factors = cycle((2.0, 0.5))
    work = {"puna": gathered, "puna-unsharded": unsharded}
    same = [a == b for a, b in zip(*(call() for call in work.values()), strict=True)]
    error = 1 - everywhere(sum(same) / len(same)) / ranks
    if error:
        raise UserError(
            f"nothing was timed: of the answers {error:.0%} are others from gathered weights than "
            "from whole ones; run `make test`"
        )
    peaks = {name: peak_mb(call, device) for name, call in work.items()}
    timings = interleaved(work, rounds, device, lambda call: together(call, device))
    size = DTYPES[dtype].itemsize
    read = everywhere(read_rate(device, size * multiplied_parameters(config)))
    ceilings = Ceilings(rate / ranks, read / ranks)
    bound = ranks * limit(config, ceilings, count, PROMPT + new / 2, size, size)
    done = Work(
        "fsdp", str(shape), ranks * count, ranks * count * new, bound, dtype, "generate", ranks
    )
    return [row(done, name, timings[name], error, peaks[name]) for name in work]


def own_tokens(vocabulary: int, rows: int, length: int, device: torch.device) -> Tensor:
    """This rank's (rows, length) of what all have."""
    generator = torch.Generator().manual_seed(0)
    ranks = parallel.world_size()
    tokens = torch.randint(vocabulary, (ranks * rows, length), generator=generator)
    return tokens.chunk(ranks)[parallel.rank()].to(device)


def of_all(step: Callable[[], float]) -> Callable[[], float]:
    """A rank's part of the loss becomes the whole loss."""
    return lambda: everywhere(step())


def everywhere(number: float) -> float:
    """The sum over all ranks."""
    return float(parallel.all_sum(torch.tensor(number, dtype=torch.float64)))


@torch.no_grad()
def first_loss(shape: Shape, tokens: Tensor) -> float:
    """Of a model that nothing was done to, in fp32."""
    model = weights_of(shape, tokens.device)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    loss = float(model.cross_entropy(model(tokens), targets))
    return everywhere(loss) / parallel.world_size()


def verify(losses: dict[str, list[float]], truth: float, dtype: str) -> dict[str, float]:
    """Largest relative difference from the sharded model's losses, and of the first from the
    truth."""
    errors = {}
    for name, found in losses.items():
        pairs = [*zip(found, losses["puna"], strict=True), (found[0], truth)]
        errors[name] = max(abs(a - b) / abs(b) for a, b in pairs)
        if not errors[name] <= TOLERANCE[dtype]:
            raise UserError(
                f"nothing was timed: {name} trains to other losses ({found} against "
                f"{losses['puna']}, the first {truth} in one process); run `make test`"
            )
    return errors


def together(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call that all ranks begin together, until the last has finished."""
    finish(device)
    parallel.barrier()
    start = perf_counter()
    call()
    finish(device)
    parallel.barrier()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="One number of ranks; rank 0 prints the rows.")
    parser.add_argument("--shape", required=True)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    given: Any = parser.parse_args()
    parallel.init()
    shape = Shape(given.shape, given.layers, given.tiny)
    found = measured(shape, device_of_name(given.device), given.dtype, given.rounds)
    if parallel.is_main():
        sys.stdout.write(json.dumps(found) + "\n")
    parallel.close()


if __name__ == "__main__":
    main()
