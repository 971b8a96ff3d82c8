"""Memory of loading a model and generating with it, in a process that does nothing else:

    python -m puna.benchmarks.models.load_memory --model runs/base/model --weights int8

prints one number: megabytes of resident memory at the height, over what the process held when its
imports were done.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from puna.benchmarks.timing import status_mb, tells_memory
from puna.core.checkpoint.source import fresh
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.llama import load
from puna.core.model import Transformer
from puna.core.native.engine import FORMATS, in_format

TINY = ModelConfig(64, 1, 2, 2, 64, 64, context=64)


def fresh_peak_mb(model: Path, weights: str) -> float | None:
    """Megabytes, measured in a new process with as many threads as this one; None where the system
    does not tell: anything but Linux."""
    if not tells_memory():
        return None
    command = [sys.executable, "-m", "puna.benchmarks.models.load_memory", "--weights", weights]
    command += ["--model", str(model), "--threads", str(torch.get_num_threads())]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(printed.split()[-1])


def answer(model: Transformer, weights: str) -> None:
    generate(model, [[1]], max_new_tokens=8, eos_id=None, weight_format=weights)


def main() -> None:
    parser = argparse.ArgumentParser(description="Megabytes that generating needs.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--weights", choices=list(FORMATS), required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    # The same with next to nothing first: what that imports and sets up is not the model's.
    answer(in_format(fresh(TINY, seed=0), given.weights), given.weights)
    before = status_mb("VmHWM")
    llama = load(given.model, device="cpu", weight_format=given.weights)
    answer(llama.model, given.weights)
    print(status_mb("VmHWM") - before)


if __name__ == "__main__":
    main()
