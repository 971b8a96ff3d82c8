"""`puna tokenizer train|encode|inspect`: make a vocabulary, use it, look at it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from puna.core.checkpoint.atomic import check_absent
from puna.core.documents import count_of
from puna.core.terminal import say, say_table
from puna.core.text.tokenizer import Tokenizer, train_tokenizer
from puna.trainers.data.columns import Reading
from puna.trainers.data.encoding import Texts, encode_file, encode_folder
from puna.trainers.data.readers import read_texts
from puna.trainers.train.ranges import AtLeast, AtMost


@dataclass
class TrainTokenizer(Reading):
    """Train a SentencePiece tokenizer with Llama 2's settings."""

    data: tuple[Path, ...]
    """Texts: .txt files, or files of rows with a text column."""
    output: Path
    """The tokenizer.model to write."""
    vocab_size: Annotated[int, AtLeast(260)] = 32_000
    """Number of pieces, with 3 control and 256 byte pieces among them (paper 2.2: 32k)."""
    character_coverage: Annotated[float, AtLeast(0.98), AtMost(1)] = 0.99995
    """Share of the text's characters that get a piece; the rest are bytes (Llama 2's value)."""


@dataclass
class Encode(Reading):
    """Show the ids and pieces of a text, or write whole files as a corpus for pretraining."""

    tokenizer: Path
    """A tokenizer.model."""
    text: str | None = None
    """The text to show."""
    data: tuple[Path, ...] = ()
    """Texts to write: .txt files, or files of rows with a text column."""
    output: Path | None = None
    """The corpus of ids to write: a folder, which can be continued, or one .npy file."""


@dataclass
class Inspect(Reading):
    """Describe a tokenizer, and how well it fits some text."""

    tokenizer: Path
    """A tokenizer.model."""
    data: tuple[Path, ...] = ()
    """Texts to measure it on: .txt files, or files of rows with a text column."""


def run(config: TrainTokenizer | Encode | Inspect) -> None:
    """Does what the configuration is for. Raises ValueError for the user's mistakes."""
    if isinstance(config, TrainTokenizer):
        train(config)
    elif isinstance(config, Encode):
        encode(config)
    else:
        inspect(config)


def train(config: TrainTokenizer) -> None:
    """Writes a tokenizer."""
    check_absent(config.output, "--output")
    tokenizer = train_tokenizer(
        _texts(config.data, config),
        config.output,
        vocab_size=config.vocab_size,
        character_coverage=config.character_coverage,
    )
    say(f"wrote {config.output}: {tokenizer.vocab_size} pieces")


def encode(config: Encode) -> None:
    """Shows the ids of a text, or writes those of files."""
    if (config.text is None) == (config.output is None) or bool(config.data) != bool(config.output):
        raise ValueError("give either --text, or --data and --output")
    tokenizer = Tokenizer(config.tokenizer)
    if config.output is not None:
        is_file = config.output.suffix == ".npy"
        if is_file:  # a folder is gone on with
            check_absent(config.output, "--output")
        write = encode_file if is_file else encode_folder
        found = write(config.output, tokenizer, Texts(config.data, config))
        if found.skipped:
            say(str(found.skipped))
        tokens = count_of(found.tokens, "token")
        say(f"wrote {config.output}: {tokens} of {count_of(found.documents, 'document')}")
        return
    ids = tokenizer.encode(config.text or "")
    say(" ".join(map(str, ids)))
    say(" ".join(tokenizer.piece(token) for token in ids))


def inspect(config: Inspect) -> None:
    """Prints what a tokenizer is made of."""
    tokenizer = Tokenizer(config.tokenizer)
    pieces = range(tokenizer.vocab_size)
    n_bytes = sum(tokenizer.is_byte(token) for token in pieces)
    longest = max((tokenizer.piece(token) for token in pieces), key=len)
    rows = [
        ("file", str(config.tokenizer)),
        ("pieces", f"{tokenizer.vocab_size:,}"),
        ("of these, bytes", f"{n_bytes}" if n_bytes else "0: unknown characters are lost"),
        ("BOS", f"{tokenizer.bos_id} {tokenizer.piece(tokenizer.bos_id)}"),
        ("EOS", f"{tokenizer.eos_id} {tokenizer.piece(tokenizer.eos_id)}"),
        ("longest piece", longest),
    ]
    if config.data:
        texts = list(_texts(config.data, config))
        n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        size = sum(len(text.encode("utf-8")) for text in texts)
        rows.append(("tokens in the texts", f"{n_tokens:,}"))
        rows.append(("bytes a token", f"{size / n_tokens:.3f}"))
    say_table(rows)


def _texts(paths: tuple[Path, ...], how: Reading) -> Iterator[str]:
    """The documents of all files; says what was skipped."""
    if not paths:
        raise ValueError("give the texts with --data")
    for path in paths:
        texts, skipped = read_texts(path, how)
        if skipped:
            say(str(skipped))
        yield from texts
