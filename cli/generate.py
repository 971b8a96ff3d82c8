"""`puna generate`: continue prompts, or answer them in the chat format; one, or a file of them."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import puna
from puna.core import parallel
from puna.core.checkpoint.atomic import check_absent
from puna.core.documents import count_of
from puna.core.llama import stops_of
from puna.core.ranks import is_main
from puna.core.tensor_parallel import generate_together
from puna.core.terminal import say
from puna.core.text.asked import prompt_ids
from puna.core.text.chat import Message
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.readers import Skipped, read_prompts, read_starts
from puna.trainers.rl.chunks import append_chunks
from puna.trainers.train import next_token
from puna.trainers.train.claim import owned
from puna.trainers.train.kinds import FREE
from puna.trainers.train.ranges import (
    Above,
    AtMost,
    Batch,
    Count,
    CountOrZero,
    Seed,
    TemperatureOrGreedy,
)


@dataclass(kw_only=True)
class GenerateConfig(ReadingMessages):
    """Continue a prompt with a model, the text printed as it is drawn; or a file of prompts, the
    texts written to another file."""

    model: Path
    """a model folder (ours, Hugging Face's or Meta's), a .gguf or a llama2.c .bin"""
    prompt: str | None = None
    """text to continue; empty starts from BOS"""
    prompts: list[Path] = field(default_factory=list)
    """in place of prompt: files of rows with `prompt` (or `text`; with --chat also `messages`), or
    .txt files with one a line"""
    out: Annotated[Path | None, FREE] = None
    """.jsonl file for what `prompts` become: rows of `prompt` and `response`, with --chat of
    `messages`, and whether each is `finished`; the same command goes on with an interrupted one"""
    tokenizer: Path | None = None
    """tokenizer.model or tokenizer.json, where the model's folder has none"""
    chat: bool = False
    """the prompt is a user's message: use the chat format"""
    system: str = ""
    """system message, with --chat; of `prompts` for those that have none"""
    temperature: TemperatureOrGreedy = 0.6
    """0 is greedy (Meta's default: 0.6)"""
    top_p: Annotated[float, Above(0), AtMost(1)] = 0.9
    """keep the most likely tokens up to this mass (Meta's default: 0.9)"""
    top_k: CountOrZero = 0
    """keep so many of the most likely tokens, of whose mass top_p is then a part; 0 is off"""
    stop: list[str] = field(default_factory=list)
    """strings that end a text, which is then without them; a line feed is $'\\n' in a shell"""
    max_new_tokens: Count = 256
    seed: Seed = 0
    batch: Batch = 64
    """of `prompts`: how many are continued side by side, and written to the file together"""
    device: Annotated[str, FREE] = "cpu"
    dtype: Literal["fp32", "bf16"] = "fp32"
    """of the weights in memory, and of the products"""
    tp: Count = 1
    """ranks, started by torchrun, that share a model larger than one device"""
    weights: Literal["fp32", "bf16", "int8"] = "fp32"
    """numbers that are read on the CPU: rounded ones are faster and a little worse"""

    def check(self) -> None:
        if (self.prompt is None) == (not self.prompts):
            raise ValueError("name either a --prompt or files of --prompts")
        if bool(self.prompts) != (self.out is not None):
            raise ValueError("--prompts and --out, the file of what they become, go together")
        if self.system and not self.chat:
            raise ValueError("--system belongs to the chat format; add --chat")


def run(config: GenerateConfig) -> str | Path:
    """Print the continuation, and return it; of files of prompts return the file of texts."""
    if (out := config.out) is not None:
        parallel.on_main(lambda: check_absent(out))
    llama = puna.load(
        config.model,
        device=config.device,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        tp=config.tp,
        weight_format=config.weights,
    )
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "weight_format": config.weights,
    }
    if config.prompts:
        return continue_files(config, llama, settings)
    pieces = []
    for piece in llama.stream(prompt(config), stop=config.stop, **settings):
        if is_main():
            say(piece, end="")
        pieces.append(piece)
    if is_main() and sys.stdout.isatty():  # a file or a pipe gets the text and nothing else
        say()
    return "".join(pieces)


def prompt(config: GenerateConfig) -> str | list[Message]:
    """The text to continue, or with --chat the messages to answer."""
    text = config.prompt or ""
    return with_system([{"role": "user", "content": text}], config) if config.chat else text


def with_system(messages: list[Message], config: GenerateConfig) -> list[Message]:
    """The same with --system, where they have no system message."""
    if not config.system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": config.system}, *messages]


class Read(NamedTuple):
    """A prompt of a file."""

    prompt: str | list[Message]
    ids: list[int]


TEXTS = "texts.jsonl"  # while there are some missing, in a folder beside the file


def continue_files(config: GenerateConfig, llama: puna.Llama, settings: dict[str, Any]) -> Path:
    """Continue all of `config.prompts`, or those that are missing; `config.out` appears when it is
    whole. Raises ValueError where a prompt or an option is another one than that with which an
    interrupted file began."""
    tokenizer = llama.tokenizer
    if config.out is None or tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; name it with --tokenizer")
    prompts, skipped = load_prompts(config, tokenizer, llama.model.config.context)
    next_token.say(skipped)

    def draw(numbers: Sequence[int]) -> list[dict[str, Any]]:
        asked = [prompts[number].prompt for number in numbers]
        stops = stops_of(tokenizer, asked, config.stop)
        done = generate_together(
            llama.model,
            [prompts[number].ids for number in numbers],
            prompt_ids=list(numbers),
            sample_ids=[0] * len(numbers),
            eos_id=tokenizer.eos_ids,
            batch_size=config.batch,
            stops=stops if stops.strings else None,
            called=str(config.model),
            **settings,
        )
        return [
            row_of(prompt, stops.text(number, each.tokens), each.finished)
            for number, (prompt, each) in enumerate(zip(asked, done, strict=True))
        ]

    asked = [each.prompt for each in prompts]
    work = config.out.with_name(f"{config.out.name}.partial")
    with owned(replace(config, out=work)):
        append_chunks("generate", work / TEXTS, asked, config.batch, 1, draw, prompt_of)
        if is_main():
            (work / TEXTS).rename(config.out)
    if is_main():
        shutil.rmtree(work)
        say(f"wrote {config.out}: {count_of(len(prompts), 'text')}")
    return config.out


def load_prompts(
    config: GenerateConfig, tokenizer: Tokenizer, context: int
) -> tuple[list[Read], Skipped]:
    """All usable prompts of the files, in order, and what was skipped: what leaves no room in the
    context, too. Raises ValueError where nothing is left."""
    prompts: list[Read] = []
    skipped = Skipped()
    for path in config.prompts:
        found, unusable = asked_in(path, config)
        skipped.merge(unusable)
        for asked, where in found:
            ids = prompt_ids(tokenizer, asked)
            if len(ids) < context:
                prompts.append(Read(asked, ids))
            else:
                skipped.add(f"no room in the context of {context} tokens", where)
    if not prompts:
        raise ValueError(f"no prompt to continue: {skipped.reasons()}".replace("\n", "; "))
    return prompts, skipped


def asked_in(
    path: Path, config: GenerateConfig
) -> tuple[list[tuple[str | list[Message], str]], Skipped]:
    """The prompts of a file, each with where it stands, and what was skipped."""
    if config.chat:
        chats, skipped = read_prompts(path, config)
        return [(with_system(each.messages, config), each.where) for each in chats], skipped
    texts, skipped = read_starts(path, config)
    return [(each.text, each.where) for each in texts], skipped


def row_of(prompt: str | list[Message], text: str, finished: bool) -> dict[str, Any]:
    """What is written of a prompt and what it became: a row that the other verbs read."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "response": text, "finished": finished}
    answer: Message = {"role": "assistant", "content": text.strip()}
    return {"messages": [*prompt, answer], "finished": finished}


def prompt_of(row: dict[str, Any]) -> Any:
    return row["prompt"] if "prompt" in row else row["messages"][:-1]
