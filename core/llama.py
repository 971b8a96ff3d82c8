"""A Llama as one object: text in, text out. The way in for those who use Puna as a library.

    llama = load("runs/chat/model")
    llama.generate([{"role": "user", "content": "How are you?"}])

Wherever a text or a chat is taken, a list of them is, too, and gives a list (`stream` takes one).
A chat is a list of messages, `{"role": "system" | "user" | "assistant", "content": "..."}`; a text
is continued as it is, after BOS.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import torch

from puna.core import packed, ranks, tensor_parallel
from puna.core.checkpoint.any_format import open_any
from puna.core.checkpoint.folder import check_own, check_vocabulary, save_model
from puna.core.checkpoint.source import DTYPES, in_memory
from puna.core.device import device_of_name
from puna.core.generation import generate as generation
from puna.core.generation.memory import Memory
from puna.core.generation.stopping import Stops, as_strings, streamed
from puna.core.model import Transformer
from puna.core.native.engine import check_format, in_format
from puna.core.text.asked import known_and_asked, one_or_many, prompt_ids
from puna.core.text.chat import Message
from puna.core.text.tokenizer import Tokenizer, stream_text

# A literal chat is inferred as the second: type checkers do not take it for the first.
Chat: TypeAlias = list[Message] | list[dict[str, str]]
Chats: TypeAlias = list[list[Message]] | list[list[dict[str, str]]] | list[Chat]
WeightFormat: TypeAlias = Literal["fp32", "bf16", "int8"]

LONGEST = 1 << 22  # tokens: the angles of more would take gigabytes


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "fp32",
    tokenizer: str | os.PathLike[str] | None = None,
    context: int | None = None,
    tp: int = 1,
    weight_format: WeightFormat = "fp32",
) -> "Llama":
    """A language or reward model: a folder (ours, Hugging Face's or Meta's), a GGUF file or a
    llama2.c `.bin`.

    `device` "auto" is a GPU where there is one; `dtype` is a torch.dtype or "fp32", "bf16" or
    "fp16"; `tokenizer` is a tokenizer.model, where the model has none beside it; `context` is the
    longest sequence in tokens, where it is not to be the stored one (Meta's folders store none:
    4096). So many ranks that torchrun started (`tp`) share a language model that is larger than one
    device: each generates, with the same arguments, and gets the same. `weight_format` "bf16" or
    "int8" rounds the weights while they are read, so that they take 2 or 1.1 bytes a number, and no
    more meanwhile: such a model generates on the CPU and does nothing else. Raises ValueError for
    what is no Llama 2 or damaged, for a tokenizer of another vocabulary and for a device that is
    not there.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected a type of floats, as torch.bfloat16")
    whole = isinstance(context, int) and not isinstance(context, bool)
    if context is not None and not (whole and 1 <= context <= LONGEST):
        raise ValueError(
            f"context is {context!r}; it must be a whole number of tokens, 1 to {LONGEST}"
        )
    place = device_of_name(device)
    source = open_any(path)
    if context is not None:
        source = source._replace(config=replace(source.config, context=context))
    file = tokenizer or source.tokenizer
    vocabulary = None if file is None else check_vocabulary(file, source.config.vocab_size)
    if tokenizer is not None and source.tokenizer is not None:
        check_own(tokenizer, source.tokenizer)
    check_format(weight_format)
    if weight_format != "fp32":
        if tp > 1 or place.type != "cpu" or dtype != torch.float32:
            raise ValueError(
                f"{weight_format} weights are read on one CPU and computed with in fp32; give "
                "device cpu and dtype fp32, and no tp"
            )
        if source.head != "lm":
            raise ValueError(
                f"{path} is a reward model; {weight_format} weights are for a language model"
            )
        rounded = in_format(source, weight_format)
        return Llama(rounded, vocabulary, Path(path), weight_format)
    if tp > 1:
        ranks.init()
        place = device_of_name(device)  # of the local rank
        return Llama(tensor_parallel.load(source, tp, place, dtype, "tp"), vocabulary, Path(path))
    return Llama(in_memory(source, place, dtype), vocabulary, Path(path))


class Llama:
    """A model with its tokenizer; `model` and `tokenizer` are there for all that is not here.

    `Llama(model, tokenizer)` wraps a model that is in memory already. A method raises ValueError
    where the model has another head than it needs, and where it needs the tokenizer and there is
    none.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        path: Path | None = None,
        weight_format: WeightFormat = "fp32",
    ):
        """`path` is where the model came from, for messages; `weight_format` what `generate` reads
        where it is not told."""
        self.weight_format: WeightFormat = weight_format
        self.model = model
        self.tokenizer = tokenizer
        self.path = path

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        kind, device = str(self.model.dtype).removeprefix("torch."), str(self.model.device)
        if device == "meta":
            kind, device = self.weight_format, "cpu"
        return (
            f"<Llama {self._name()}: {self.model.head} head, {size:,} parameters, {kind} on "
            f"{device}>"
        )

    @overload
    def generate(
        self,
        prompts: str | Chat,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        round_index: int = 0,
        weight_format: WeightFormat | None = None,
        batch_size: int = 256,
        memory: Memory | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: list[str] | Chats | list[str | Chat],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        round_index: int = 0,
        weight_format: WeightFormat | None = None,
        batch_size: int = 256,
        memory: Memory | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        round_index: int = 0,
        weight_format: WeightFormat | None = None,
        batch_size: int = 256,
        memory: Memory | None = None,
    ) -> str | list[str]:
        """The continuation of a text or the answer to a chat; of a list of them, the list of these.

        `temperature` 0 is greedy; `top_p` keeps the most likely tokens up to that mass, `top_k` so
        many of them (0: all); with both, the mass is of what `top_k` leaves. A text ends before a
        string of `stop`, of several the one that is complete first. What is drawn depends on
        `seed`, `round_index` and the place in the list alone: the same call gives the same text,
        and `[chat] * 4` four different ones. `weight_format` "bf16" or "int8" reads rounded
        weights on a CPU, faster and a little worse (None: as the model was loaded, in fp32 where
        nothing was said); `batch_size` prompts are continued at once. A
        `memory` that is handed over for each turn of a chat spares a CPU the turns before. Raises
        ValueError for a prompt that fills the context and for a chat that does not end with a user
        message.
        """
        several, alone = one_or_many(prompts)
        self._require("lm", "generate")
        tokenizer = self._tokenizer("generate")
        stops = stops_of(tokenizer, several, stop)
        done = generation.generate(
            self.model,
            [prompt_ids(tokenizer, prompt) for prompt in several],
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_ids,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            round_index=round_index,
            batch_size=batch_size,
            weight_format=weight_format or self.weight_format,
            memory=memory,
            stops=stops if stops.strings else None,
            called=self._name(),
        )
        texts = [stops.text(number, each.tokens) for number, each in enumerate(done)]
        texts = [
            text if isinstance(prompt, str) else text.strip()
            for prompt, text in zip(several, texts, strict=True)
        ]
        return texts[0] if alone else texts

    def stream(
        self,
        prompt: str | Chat,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        round_index: int = 0,
        weight_format: WeightFormat | None = None,
        memory: Memory | None = None,
    ) -> Iterator[str]:
        """The text of `generate(prompt, ...)` piece by piece, as it is drawn.

        An answer to a chat may have spaces around it, which `generate` takes off. Raises
        ValueError as `generate` does, at once.
        """
        several, alone = one_or_many(prompt)
        if not alone:
            raise ValueError("stream takes one text or one chat; generate takes a list of them")
        self._require("lm", "generate")
        tokenizer, strings = self._tokenizer("generate"), as_strings(stop)
        drawn = generation.stream(
            self.model,
            prompt_ids(tokenizer, several[0]),
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_ids,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            round_index=round_index,
            weight_format=weight_format or self.weight_format,
            memory=memory,
            called=self._name(),
        )
        continued = isinstance(prompt, str) and bool(prompt)
        answered = (token for token in drawn if token not in tokenizer.eos_ids)
        pieces = stream_text(tokenizer, answered, continued=continued)
        return streamed(pieces, strings) if strings else pieces

    @overload
    def logprobs(self, texts: str | Chat) -> list[float]: ...

    @overload
    def logprobs(self, texts: list[str] | Chats | list[str | Chat]) -> list[list[float]]: ...

    def logprobs(self, texts: Any) -> list[float] | list[list[float]]:
        """Log-probabilities in nats: of a text, one for each token; of a chat that ends with an
        assistant message, one for each token of that last answer, EOS included. Raises ValueError
        where they are NaN."""
        several, alone = one_or_many(texts)
        self._require("lm", "logprobs")
        self._whole("logprobs")
        tokenizer = self._tokenizer("logprobs")
        pairs = [known_and_asked(tokenizer, text) for text in several]
        found = packed.logprobs(self.model, [known + asked for known, asked in pairs])
        self._refuse_nan(any(bool(values.isnan().any()) for values in found), "log-probabilities")
        lists = [
            values[len(known) - 1 :].tolist()
            for values, (known, _) in zip(found, pairs, strict=True)
        ]
        return lists[0] if alone else lists

    @overload
    def score(self, dialogues: Chat) -> float: ...

    @overload
    def score(self, dialogues: Chats) -> list[float]: ...

    def score(self, dialogues: Any) -> float | list[float]:
        """A reward model's raw score of a chat that ends with an assistant message, read at its
        last token, EOS included; of a list of chats, the list of these. Raises ValueError where one
        is not finite."""
        several, alone = one_or_many(dialogues)
        self._require("score", "score")
        tokenizer = self._tokenizer("score")
        if any(isinstance(dialogue, str) for dialogue in several):
            raise ValueError("a reward model scores chats; give lists of messages, not texts")
        pairs = [known_and_asked(tokenizer, dialogue) for dialogue in several]
        sequences = [prompt + answer for prompt, answer in pairs]
        scores: list[float] = packed.score(self.model, sequences).tolist()
        self._refuse_nan(not all(map(math.isfinite, scores)), "scores")
        return scores[0] if alone else scores

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a model folder, which transformers opens as well; returns its path.

        An earlier model there is replaced when all is on disk. Raises ValueError where `path` holds
        something else.
        """
        self._whole("save")
        save_model(path, self.model, None if self.tokenizer is None else self.tokenizer.path)
        return Path(path)

    def _name(self) -> str:
        return "this model" if self.path is None else str(self.path)

    def _refuse_nan(self, found: bool, what: str) -> None:
        if found:
            raise ValueError(
                f"{self._name()} gives {what} that are no numbers (training that diverged, or "
                "damaged weights); take an earlier checkpoint or the weights it was made from"
            )

    def _require(self, head: str, verb: str) -> None:
        if self.model.head != head:
            is_a, needs = ("reward", "language") if head == "lm" else ("language", "reward")
            raise ValueError(f"{self._name()} is a {is_a} model; {verb} needs a {needs} model")

    def _whole(self, verb: str) -> None:
        if self.model.device.type == "meta":
            raise ValueError(
                f"{self._name()} was loaded with {self.weight_format} weights, to generate; load "
                f"it without weight_format to {verb}"
            )

    def _tokenizer(self, verb: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{self._name()} has no tokenizer.model; name the tokenizer it was trained with "
                f"(tokenizer=) for {verb} to read and write text"
            )
        return self.tokenizer


def stops_of(
    tokenizer: Tokenizer, prompts: Sequence[str | list[Message]], stop: str | Sequence[str]
) -> Stops:
    """What reads the continuations of texts, with the space before them, and answers to chats."""
    known = [tokenizer.encode(each) if isinstance(each, str) else [] for each in prompts]
    return Stops(as_strings(stop), tokenizer, known)
