"""`puna generate`: continue prompts, or answer them in the chat format."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from puna.core.chat import Message, encode_prompt
from puna.core.checkpoint.folder import load_model, tokenizer_path
from puna.core.generation.generate import stream
from puna.core.tokenizer import Tokenizer, stream_text
from puna.trainers.train.ranges import (
    Above,
    AtMost,
    Count,
    CountOrNone,
    Options,
    Seed,
    TemperatureOrGreedy,
)


@dataclass(kw_only=True)
class GenerateConfig(Options):
    """Continue a prompt with a model; the text is printed as it is drawn."""

    model: Path
    """a model folder (ours or Hugging Face's) or a llama2.c .bin"""
    prompt: str
    """text to continue; empty starts from BOS"""
    tokenizer: Path | None = None
    """tokenizer.model, where the model's folder has none"""
    chat: bool = False
    """the prompt is a user's message: use the chat format"""
    system: str = ""
    """system message, with --chat"""
    temperature: TemperatureOrGreedy = 0.6
    """0 is greedy (Meta's default: 0.6)"""
    top_p: Annotated[float, Above(0), AtMost(1)] = 0.9
    """keep the most likely tokens up to this mass (Meta's default: 0.9)"""
    top_k: CountOrNone = 0
    """keep so many of the most likely tokens; 0 is off"""
    max_new_tokens: Count = 256
    seed: Seed = 0
    device: str = "cpu"
    weights: Literal["fp32", "bf16", "int8"] = "fp32"
    """numbers that are read on the CPU: rounded ones are faster and a little worse"""


def run(config: GenerateConfig) -> str:
    """Print the continuation, and return it."""
    tokenizer = Tokenizer(config.tokenizer or tokenizer_path(config.model))
    model = load_model(config.model, device=config.device)
    if model.head != "lm":
        raise ValueError(f"{config.model} is a reward model; generate needs a language model")
    drawn = stream(
        model,
        prompt_ids(tokenizer, config),
        max_new_tokens=config.max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        weights=config.weights,
    )
    pieces = []
    for piece in stream_text(tokenizer, (i for i in drawn if i != tokenizer.eos_id)):
        print(piece, end="", flush=True)
        pieces.append(piece)
    if sys.stdout.isatty():  # a file or a pipe gets the text and nothing else
        print()
    return "".join(pieces)


def prompt_ids(tokenizer: Tokenizer, config: GenerateConfig) -> list[int]:
    if not config.chat:
        if config.system:
            raise ValueError("--system belongs to the chat format; add --chat")
        return tokenizer.encode(config.prompt, bos=True) if config.prompt else [tokenizer.bos_id]
    messages: list[Message] = [{"role": "user", "content": config.prompt}]
    if config.system:
        messages.insert(0, {"role": "system", "content": config.system})
    return encode_prompt(tokenizer, messages)
