"""`puna generate`: continue prompts, or answer them in the chat format."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import puna
from puna.core.chat import Message
from puna.core.ranks import is_main
from puna.core.terminal import say
from puna.trainers.train.ranges import (
    Above,
    AtMost,
    Count,
    CountOrZero,
    Options,
    Seed,
    TemperatureOrGreedy,
)


@dataclass(kw_only=True)
class GenerateConfig(Options):
    """Continue a prompt with a model; the text is printed as it is drawn."""

    model: Path
    """a model folder (ours, Hugging Face's or Meta's), a .gguf or a llama2.c .bin"""
    prompt: str
    """text to continue; empty starts from BOS"""
    tokenizer: Path | None = None
    """tokenizer.model or tokenizer.json, where the model's folder has none"""
    chat: bool = False
    """the prompt is a user's message: use the chat format"""
    system: str = ""
    """system message, with --chat"""
    temperature: TemperatureOrGreedy = 0.6
    """0 is greedy (Meta's default: 0.6)"""
    top_p: Annotated[float, Above(0), AtMost(1)] = 0.9
    """keep the most likely tokens up to this mass (Meta's default: 0.9)"""
    top_k: CountOrZero = 0
    """keep so many of the most likely tokens, of whose mass top_p is then a part; 0 is off"""
    max_new_tokens: Count = 256
    seed: Seed = 0
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] = "fp32"
    """of the weights in memory, and of the products"""
    tp: Count = 1
    """ranks, started by torchrun, that share a model larger than one device"""
    weights: Literal["fp32", "bf16", "int8"] = "fp32"
    """numbers that are read on the CPU: rounded ones are faster and a little worse"""


def run(config: GenerateConfig) -> str:
    """Print the continuation, and return it."""
    llama = puna.load(
        config.model,
        device=config.device,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        tp=config.tp,
    )
    drawn = llama.stream(
        prompt(config),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed,
        weight_format=config.weights,
    )
    pieces = []
    for piece in drawn:
        if is_main():
            say(piece, end="")
        pieces.append(piece)
    if is_main() and sys.stdout.isatty():  # a file or a pipe gets the text and nothing else
        say()
    return "".join(pieces)


def prompt(config: GenerateConfig) -> str | list[Message]:
    """The text to continue, or with --chat the messages to answer."""
    if not config.chat:
        if config.system:
            raise ValueError("--system belongs to the chat format; add --chat")
        return config.prompt
    messages: list[Message] = [{"role": "user", "content": config.prompt}]
    if config.system:
        messages.insert(0, {"role": "system", "content": config.system})
    return messages
