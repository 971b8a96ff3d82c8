"""`puna chat`: talk to a model in the terminal, answers streamed as they are drawn."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import puna
from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import say
from puna.core.text.chat import Message, check_dialogue, check_text, tags_of
from puna.trainers.train.ranges import Above, AtMost, Count, Options, Seed, TemperatureOrGreedy


@dataclass(kw_only=True)
class ChatConfig(Options):
    """Talk to a chat model. Ctrl-C stops an answer and keeps what is there of it, Ctrl-D ends; a
    block of lines that is pasted is one message; arrow keys go back to earlier messages, which no
    file keeps. /help lists what else there is."""

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


@dataclass
class Talk:
    """What has been said to a model, and how its answers are drawn."""

    llama: puna.Llama
    config: ChatConfig
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    draws: int = 0  # answers drawn of this talk: part of the random numbers
    memory: puna.Memory = field(default_factory=puna.Memory)
    saved: set[Path] = field(default_factory=set)

    @property
    def tags(self) -> tuple[str, ...]:
        tokenizer = self.llama.tokenizer
        return () if tokenizer is None else tags_of(tokenizer)

    def with_system(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


def run(config: ChatConfig) -> None:
    """Read messages from stdin until it ends; a message that cannot be sent says why."""
    llama = puna.load(
        config.model, device=config.device, tokenizer=config.tokenizer, weight_format=config.weights
    )
    if llama.model.head != "lm":
        raise ValueError(f"{config.model} is a reward model; chat needs a language model")
    talk = Talk(llama, config, config.system)
    _edit_lines()
    say("Talk to the model; /help lists the commands, Ctrl-D ends.")
    while (text := _read()) is not None:
        try:
            if command := re.fullmatch(r"(/\w+)(?:\s+(.*))?", text, re.DOTALL):
                _obey(talk, command[1], (command[2] or "").strip())
            elif text.strip():
                _answer(talk, talk.turns, text.strip())
        except (ValueError, OSError) as error:
            say(f"({error}; say it otherwise, or /new to start again)", error=True)


def _edit_lines() -> None:
    """Arrow keys, earlier messages, and what is pasted taken as a whole, on a terminal."""
    with suppress(ImportError):  # a Python without it reads lines as they come
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


def _read() -> str | None:
    """The next message, None at the end; Ctrl-C drops a line that is being written."""
    while True:
        try:
            return input("> ")
        except EOFError:
            say()
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            say("\n(Ctrl-D ends)")


def _answer(talk: Talk, before: list[Message], text: str) -> None:
    """Print the answer to a message that follows on `before`, and note both as the talk; a message
    is taken back where nothing was answered, or what cannot stand in a talk."""
    asked: list[Message] = [*before, {"role": "user", "content": text}]
    check_dialogue(talk.with_system(asked), talk.tags)
    answer, stopped = _stream(talk, talk.with_system(asked))
    if stopped and not answer:
        was_asked = before is talk.turns  # /retry has an answer already
        say(f"(stopped; the {'message is taken back' if was_asked else 'answer before stays'})")
        return
    if stopped:
        say("(stopped; what is there of the answer is kept)")
    answered: list[Message] = [*asked, {"role": "assistant", "content": answer}]
    check_dialogue(answered, talk.tags)  # a model can write a chat tag, too
    talk.turns = answered


def _stream(talk: Talk, messages: list[Message]) -> tuple[str, bool]:
    """Print an answer as it is drawn: (its text, whether Ctrl-C stopped it)."""
    config, pieces, stopped = talk.config, [], False
    talk.draws += 1
    try:
        for piece in talk.llama.stream(
            messages,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            round_index=talk.draws,  # another draw for each answer
            weight_format=config.weights,
            memory=talk.memory,
        ):
            say(piece, end="")
            pieces.append(piece)
    except KeyboardInterrupt:
        stopped = True
    say()
    return "".join(pieces).strip(), stopped


def _obey(talk: Talk, name: str, argument: str) -> None:
    if name not in COMMANDS:
        raise ValueError(
            f"there is no {name}; /help lists the commands, and a space before a message sends it "
            "as it is"
        )
    COMMANDS[name][0](talk, argument)


def _new(talk: Talk, argument: str) -> None:
    talk.turns, talk.draws = [], 0


def _retry(talk: Talk, argument: str) -> None:
    if not talk.turns:
        raise ValueError("there is no answer yet")
    *before, asked, _ = talk.turns
    _answer(talk, before, asked["content"])


def _system(talk: Talk, text: str) -> None:
    if text:
        check_text(text, "system", talk.tags)
    talk.system = text
    say("(the system message holds from here on)" if text else "(no system message)")


def _save(talk: Talk, name: str) -> None:
    if not name or not talk.turns:
        raise ValueError("/save FILE writes what has been said" if talk.turns else "nothing yet")
    path = Path(name).expanduser().absolute()
    if path.exists() and path not in talk.saved:
        raise ValueError(f"{path} is there already; give another name")
    row = {"messages": talk.with_system(talk.turns)}
    write_text(path, json.dumps(row, ensure_ascii=False) + "\n")
    talk.saved.add(path)
    say(f"(wrote {path}: a row that `puna sft` reads)")


def _help(talk: Talk, argument: str) -> None:
    for name, (_, usage) in COMMANDS.items():
        say(f"{name} {usage}")


COMMANDS: dict[str, tuple[Callable[[Talk, str], None], str]] = {
    "/new": (_new, "starts a new talk"),
    "/retry": (_retry, "draws another answer to the last message (the same at temperature 0)"),
    "/system": (_system, "TEXT sets the system message; without a text there is none"),
    "/save": (_save, "FILE writes the talk as a row of JSON"),
    "/help": (_help, "shows this; Ctrl-C stops an answer, Ctrl-D ends"),
}
