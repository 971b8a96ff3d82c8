"""Memory of training, in a process that does nothing else:

    python -m puna.benchmarks.models.step_memory --provider puna --shape 15m --batch 8

prints one number: megabytes of resident memory at the height of three training steps, over what
the process held when its imports were done. Random weights, gradients and AdamW's state are in
it; what torch.compile needs while it compiles is in "transformers-compiled".
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # the optimizers import it in their first step

from puna.benchmarks.models.shapes import Shape
from puna.benchmarks.models.steps import Step, compiled_step, puna_step, transformers_step
from puna.benchmarks.timing import status_mb, tells_memory
from puna.core.checkpoint.hf_config import config_json
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.native.loader import extension

PROVIDERS = ("puna", "transformers", "transformers-compiled")


def fresh_peak_mb(provider: str, shape: Shape, batch: int, tokens: int) -> float | None:
    """Megabytes that training needs, measured in a new process with as many threads as this one.

    None where the system does not tell: anything but Linux.
    """
    if not tells_memory():
        return None
    command = [sys.executable, "-m", "puna.benchmarks.models.step_memory", "--provider", provider]
    numbers = {"batch": batch, "tokens": tokens, "threads": torch.get_num_threads()}
    numbers["layers"] = shape.layers
    command += ["--shape", shape.size, *(f"--{name}={value}" for name, value in numbers.items())]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(printed.split()[-1])


def builder(provider: str) -> Callable[[ModelConfig, torch.Tensor], Step]:
    """A step on random weights; everything is imported before it is returned."""
    if provider == "puna":
        extension()

        def puna(config: ModelConfig, ids: torch.Tensor) -> Step:
            model = Transformer(config)
            model.init_weights(seed=0)
            return puna_step(model, ids)

        return puna
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: F401

    def peer(config: ModelConfig, ids: torch.Tensor) -> Step:
        theirs = LlamaConfig(**config_json(config, "lm", torch.float32, None))
        model: Any = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
        return (transformers_step if provider == "transformers" else compiled_step)(model, ids)

    return peer


def main() -> None:
    parser = argparse.ArgumentParser(description="Megabytes that training needs, from the start.")
    parser.add_argument("--provider", choices=PROVIDERS, required=True)
    parser.add_argument("--shape", required=True, help="a name of puna.core.config.SIZES")
    parser.add_argument("--layers", type=int, default=0, help="blocks kept; 0: all")
    parser.add_argument("--batch", type=int, required=True, help="rows")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    config = Shape(given.shape, given.layers).config
    torch.set_num_threads(given.threads)
    build = builder(given.provider)
    before = status_mb("VmRSS")
    step = build(config, torch.randint(config.vocab_size, (given.batch, given.tokens)))
    for _ in range(3):
        step()
    print(status_mb("VmHWM") - before)


if __name__ == "__main__":
    main()
