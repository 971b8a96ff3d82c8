"""A pretraining corpus: the ids of all documents end to end, in 2 or 4 bytes each, in shards.

Every document is BOS, its text, EOS; the paper does not say what separated Llama 2's. On disk a
corpus is a folder of `.npy` arrays with an index beside them, corpus.json, or one such array. Where
documents begin, BOS tells when a row is read: nothing of a corpus is looked at as a whole, so
opening one takes as long for 2T tokens as for 2M.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from puna.core.checkpoint.hashes import digest
from puna.core.documents import count_of, field, read_object, regular_file
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.train.advice import advice

INDEX = "corpus.json"
KINDS = {"complete": bool, "tokenizer": str, "shards": dict, "tokens": int}  # what it holds
HEADER = 128  # bytes before the ids: the shape's digits may change, their place may not
LOOKS, LOOK = 64, 4096  # places of a file that are looked at when it is opened, and tokens of each


class Corpus(NamedTuple):
    """Documents end to end, none of them in two shards."""

    shards: tuple[np.ndarray, ...]
    """each (n,) uint16 or uint32, in memory or mapped from a file"""
    bos_id: int
    vocab_size: int

    @property
    def size(self) -> int:
        """Tokens in all."""
        return sum(map(len, self.shards))


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest integers that hold every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def is_corpus(path: Path) -> bool:
    """Whether a path names a corpus, and no text."""
    return path.suffix == ".npy" or (path / INDEX).is_file() or any(path.glob("tokens-*.npy"))


def open_corpus(paths: Sequence[Path], tokenizer: Tokenizer) -> Corpus:
    """The corpora at `paths`, one after the other, mapped into memory.

    Raises ValueError where one is absent, unfinished, damaged, or made with another tokenizer.
    """
    files = [file for path in paths for file in shards_of(path, tokenizer)]
    shards = tuple(open_shard(file, tokenizer) for file in files)
    return Corpus(shards, tokenizer.bos_id, tokenizer.vocab_size)


def shards_of(path: Path, tokenizer: Tokenizer) -> list[Path]:
    """A corpus's files: what its index names, with the sizes that it says."""
    if not path.is_dir():
        return [path]
    index = read_index(path, KINDS, "write a corpus with `puna tokenizer encode`")
    again = "; run `puna tokenizer encode` with this output again"
    if not index["complete"]:
        raise ValueError(f"{path} is not written to its end{again}")
    if index["tokenizer"] != digest(tokenizer.path).sha256:
        raise ValueError(
            f"{path} was written with another tokenizer than {tokenizer.path}; encode the text "
            "with this one"
        )
    files: list[Path] = []
    for name, size in index["shards"].items():
        file = path / Path(name).name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} is missing or not as {INDEX} says; encode the text again")
        files.append(file)
    width = np.dtype(token_dtype(tokenizer.vocab_size)).itemsize
    tokens = sum(file.stat().st_size - HEADER for file in files) // width
    if not files or tokens != index["tokens"]:
        raise ValueError(f"{path / INDEX} does not name all shards; encode the text again")
    return files


def read_index(folder: Path, kinds: Mapping[str, type], absent: str) -> dict[str, Any]:
    """A corpus's index; ValueError where there is none, saying `absent`, and naming it where it
    lacks something or holds something of another kind."""
    found = read_object(folder / INDEX, absent)
    try:
        for name, kind in kinds.items():
            field(found, name, kind)
    except ValueError as error:
        raise ValueError(f"{folder / INDEX}: {error}; encode the text again") from error
    return found


def open_shard(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """One array of ids, mapped; some places of it are looked at."""
    with regular_file(path).open("rb") as file:
        magic = file.read(len(MAGIC_PREFIX))
    if magic != MAGIC_PREFIX:  # np.load opens other files, too, but not as an array
        raise ValueError(f"{path} is no .npy array; write one with `puna tokenizer encode`")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is parsed as Python: it fails in as many ways
        raise ValueError(f"{path} is no .npy array: its header is damaged") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or not len(tokens):
        raise ValueError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected a one-dimensional "
            "uint16 or uint32 array of ids, as `puna tokenizer encode --output` writes"
        )
    for begin in sorted({len(tokens) * look // LOOKS for look in range(LOOKS)}):
        check_ids(tokens[begin : begin + LOOK], tokenizer.vocab_size, str(path))
    return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """ValueError where an id is outside the vocabulary."""
    if int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"{where} holds the id {int(tokens.max())}, outside the tokenizer's vocabulary of "
            f"{vocab_size}; encode the text with this tokenizer"
        )


def split_corpus(corpus: Corpus, eval_share: float) -> tuple[Corpus, Corpus]:
    """(training part, held-out part): the last `eval_share` (0..1) of the tokens, cut anywhere.

    A cut document goes on in the held-out part without a BOS. Raises ValueError where one of the
    parts would have nothing to predict.
    """
    assert 0.0 < eval_share < 1.0
    left = round(corpus.size * eval_share)
    training: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for shard in reversed(corpus.shards):
        cut = len(shard) - min(left, len(shard))
        left -= len(shard) - cut
        training += [shard[:cut]] if cut else []
        held += [shard[cut:]] if cut < len(shard) else []
    first, last = (corpus._replace(shards=tuple(reversed(part))) for part in (training, held))
    if not (has_target(first) and has_target(last)):
        raise ValueError(
            f"{count_of(corpus.size, 'token')} are too few to train on some and hold the share "
            f"{eval_share:g} out; give more text, or "
            f"{advice('eval_share', '--eval-share 0', 'set eval_share to 0')}"
        )
    return first, last


def has_target(corpus: Corpus) -> bool:
    """Whether some token follows another one of its document: of any three tokens one does."""
    return any((shard[1:3] != corpus.bos_id).any() for shard in corpus.shards)
