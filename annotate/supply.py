"""Answers sampled ahead of time, in a thread beside the page, so that nobody waits for one.

Both answers come from two models at drawn temperatures (paper section 3.2.1), which of them stands
on the left is drawn, too. Each answer's own seed is kept: the same call gives it again.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puna.annotate.background import Background, requests
from puna.annotate.config import AnnotateConfig
from puna.core.checkpoint.folder import load_model, open_source
from puna.core.checkpoint.hashes import digests
from puna.core.device import device_of_name
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.text.chat import Message, check_text, decode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.annotations.items import (
    Given,
    add_item,
    ask_batch,
    give_up,
    put_answers,
    unanswered,
    waiting_ahead,
)
from puna.trainers.annotations.store import Store
from puna.trainers.data.prompts import EncodedPrompt, common_tokenizer, draw, load_prompts
from puna.trainers.train import next_token

TRIES = 6  # pairs drawn for an item before it is given up
SAME = "the models give equal or empty answers"


class Speaker(NamedTuple):
    """A model that answers."""

    name: str
    version: str  # of its weights
    model: Transformer


class Supply:
    """Makes items of prompts and answers them, `config.ahead` before they are asked for."""

    def __init__(self, store: Store, config: AnnotateConfig):
        self.store, self.config = store, config
        self.tokenizer = Tokenizer(common_tokenizer(*config.models))
        self.room = room_for_prompts(config)
        self.prompts, skipped = load_prompts(config.prompts, self.tokenizer, self.room, config)
        next_token.say(skipped)
        self.speakers = speakers_of(config)
        self.pairs = config.pairs or len(self.prompts)
        self.batch = ask_batch(store, f"annotate:{config.batch}", self.pairs, config.batch)
        self.position = 0  # of the next prompt; one that has an item already is passed over
        self.background = Background(self.step, "answers can no longer be sampled")

    def step(self) -> bool:
        """Answer one item, a new one if need be; returns whether there was something to do."""
        item = unanswered(self.store)
        if item is not None:
            self.answer(item["id"], item["messages"])
            return True
        return waiting_ahead(self.store) < self.config.ahead and self.add()

    def add(self) -> bool:
        """Make an item of the next prompt; False where all have one."""
        while self.position < self.pairs:
            place, _ = draw(self.position, len(self.prompts), self.config.seed)
            prompt: EncodedPrompt = self.prompts[place]
            drawn = np.random.default_rng((self.config.seed, self.position)).random()
            made = add_item(
                self.store,
                self.batch,
                "safety" if prompt.is_safety else "helpfulness",
                f"annotate:{self.batch}:{self.position}",
                prompt.messages,
                people=1 + int(drawn < self.config.overlap),
            )
            self.position += 1
            if made is not None:
                return True
        return False

    def answer(self, item: int, messages: Sequence[Message]) -> None:
        """Draw two answers until they differ; an item that gets none leaves the batch."""
        random = np.random.default_rng((self.config.seed, item))
        prompt = encode_prompt(self.tokenizer, messages)
        for _ in range(TRIES):
            given = self.pair(prompt, random)
            if len({each.text for each in given}) == 2 and all(map(is_answer, given)):
                left, right = given if random.random() < 0.5 else given[::-1]
                put_answers(self.store, item, left, right)
                return
        give_up(self.store, item, SAME)

    def pair(self, prompt: list[int], random: np.random.Generator) -> list[Given]:
        """One answer of each model."""
        choices = self.config.temperatures
        first = int(random.integers(len(choices)))
        second = int(random.integers(len(choices)))
        if self.speakers[0].version == self.speakers[1].version and len(choices) > 1:
            second = (first + int(random.integers(1, len(choices)))) % len(choices)
        found = []
        for speaker, which in zip(self.speakers, (first, second), strict=True):
            seed = int(random.integers(2**31))
            requests.give_way()
            (drawn,) = generate(
                speaker.model,
                [prompt],
                max_new_tokens=self.config.max_new_tokens,
                eos_id=self.tokenizer.eos_ids,
                temperature=choices[which],
                seed=seed,
                called=speaker.name,
            )
            text = decode_answer(self.tokenizer, drawn.tokens)
            found.append(Given(text, speaker.name, speaker.version, choices[which], seed))
        return found

    def check_prompt(self, messages: Sequence[Message]) -> None:
        """ValueError where a dialogue that somebody wrote cannot be answered."""
        length = len(encode_prompt(self.tokenizer, messages))
        if length > self.room:
            raise ValueError(
                f"the dialogue has {length} tokens and the models have room for {self.room}; "
                "write less"
            )


def is_answer(given: Given) -> bool:
    """Whether a text can be an answer in a dialogue: a model can write a chat tag, too."""
    try:
        check_text(given.text)
    except ValueError:
        return False
    return True


def check_readable(config: AnnotateConfig) -> None:
    """ValueError for models and prompts that cannot be used, before there is a file."""
    tokenizer = Tokenizer(common_tokenizer(*config.models))
    load_prompts(config.prompts, tokenizer, room_for_prompts(config), config)


def room_for_prompts(config: AnnotateConfig) -> int:
    """Most tokens of a prompt, by the models' contexts."""
    sources = {path: open_source(path) for path in config.models}
    for path, source in sources.items():
        if source.head != "lm":
            raise ValueError(f"{path} is a reward model; people compare answers of chat models")
    room = min(source.config.context for source in sources.values()) - config.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in the models' "
            "context; lower it"
        )
    return room


def speakers_of(config: AnnotateConfig) -> tuple[Speaker, Speaker]:
    """Both models; where one is named, it twice, in memory once."""
    device = device_of_name(config.device)
    found = [
        Speaker(str(path), version_of(path), load_model(path, device=device).eval())
        for path in dict.fromkeys(config.models)
    ]
    return found[0], found[-1]


def version_of(path: Path) -> str:
    """A short hash of a model's weights: the same folder can hold another model tomorrow."""
    hashes = "".join(each.sha256 for each in digests(files_of(path)))
    return hashlib.sha256(hashes.encode()).hexdigest()[:12]


def files_of(path: Path) -> list[Path]:
    """The files of a model's weights."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
