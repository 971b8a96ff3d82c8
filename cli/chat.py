"""`puna chat`: talk to a model in the terminal, answers streamed as they are drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import puna
from puna.core.chat import Message, check_dialogue, tags_of
from puna.core.terminal import say
from puna.trainers.train.ranges import Above, AtMost, Count, Options, Seed, TemperatureOrGreedy


@dataclass(kw_only=True)
class ChatConfig(Options):
    """Talk to a chat model. An empty line or Ctrl-D ends, /new starts a new dialogue, Ctrl-C stops
    an answer and takes the message back."""

    model: Path
    """a model folder (ours, Hugging Face's or Meta's), a .gguf or a llama2.c .bin"""
    tokenizer: Path | None = None
    """tokenizer.model or tokenizer.json, where the model's folder has none"""
    system: str = ""
    """system message: an instruction that should hold for the whole dialogue"""
    temperature: TemperatureOrGreedy = 0.6
    """0 is greedy (Meta's default: 0.6)"""
    top_p: Annotated[float, Above(0), AtMost(1)] = 0.9
    """keep the most likely tokens up to this mass (Meta's default: 0.9)"""
    max_new_tokens: Count = 256
    seed: Seed = 0
    device: str = "cpu"
    weights: Literal["fp32", "bf16", "int8"] = "fp32"
    """numbers that are read on the CPU: rounded ones are faster and a little worse"""


def run(config: ChatConfig) -> None:
    """Read messages from stdin until it ends; a message that cannot be sent says why."""
    llama = puna.load(config.model, device=config.device, tokenizer=config.tokenizer)
    if llama.model.head != "lm":
        raise ValueError(f"{config.model} is a reward model; chat needs a language model")
    fresh: list[Message] = []
    if config.system:
        fresh = [{"role": "system", "content": config.system}]
    messages = list(fresh)
    memory = puna.Memory()
    tags = () if llama.tokenizer is None else tags_of(llama.tokenizer)
    say("Talk to the model; /new starts again, an empty line ends.")
    while (text := _read()) is not None:
        if text == "/new":
            messages = list(fresh)
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": text}]
        try:
            check_dialogue(asked, tags)
            answer = _answer(llama, asked, memory, config)
            answered: list[Message] = [*asked, {"role": "assistant", "content": answer}]
            check_dialogue(answered, tags)  # a model can write a chat tag, too
        except KeyboardInterrupt:
            say("\n(stopped; the message is taken back)")
            continue
        except ValueError as error:
            say(f"({error}; say it otherwise, or /new to start again)", error=True)
            continue
        messages = answered


def _read() -> str | None:
    try:
        text = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        say()
        return None
    return text or None


def _answer(
    llama: puna.Llama, messages: list[Message], memory: puna.Memory, config: ChatConfig
) -> str:
    drawn = llama.stream(
        messages,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        round_index=len(messages),  # another draw for each turn
        weight_format=config.weights,
        memory=memory,
    )
    pieces = []
    for piece in drawn:
        say(piece, end="")
        pieces.append(piece)
    say()
    return "".join(pieces).strip()
