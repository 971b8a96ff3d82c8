"""A pretraining corpus: the ids of all documents end to end, in 2 or 4 bytes each.

Every document is BOS, its text, EOS; the paper does not say what separated Llama 2's. On disk a
corpus is a one-dimensional `.npy` array, opened without reading it into memory: BOS tells where
documents begin.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from puna.core.checkpoint.atomic import atomic_file
from puna.core.documents import regular_file
from puna.core.tokenizer import Tokenizer

CHUNK = 1 << 24  # tokens looked at together, so that a corpus larger than memory can be opened


class Corpus(NamedTuple):
    """Documents end to end."""

    tokens: np.ndarray
    """(N,) uint16 or uint32, in memory or mapped from a file"""
    starts: np.ndarray
    """(documents,) int64, ascending: where each document's BOS is in `tokens`"""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest integers that hold every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def encode_corpus(tokenizer: Tokenizer, texts: Iterable[str]) -> Corpus:
    """Texts as a corpus. Raises ValueError where there is none."""
    dtype = token_dtype(tokenizer.vocab_size)
    documents = [np.asarray(tokenizer.encode(text, bos=True, eos=True), dtype) for text in texts]
    if not documents:
        raise ValueError("there is no text to train on")
    lengths = [len(document) for document in documents]
    return Corpus(np.concatenate(documents), np.cumsum([0, *lengths[:-1]]))


def save_corpus(path: Path, corpus: Corpus) -> None:
    """Writes the ids as `.npy`; raises ValueError for a path of another ending."""
    if path.suffix != ".npy":
        raise ValueError(f"{path}: a corpus of ids is written as .npy; name it so")
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, corpus.tokens, allow_pickle=False)


def open_corpus(path: Path, tokenizer: Tokenizer) -> Corpus:
    """A corpus on disk, mapped into memory.

    Raises ValueError where the file is absent, no such array, or made with a tokenizer of a
    larger vocabulary.
    """
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
    starts = []
    for begin in range(0, len(tokens), CHUNK):
        chunk = tokens[begin : begin + CHUNK]
        if int(chunk.max()) >= tokenizer.vocab_size:
            raise ValueError(
                f"{path} holds the id {int(chunk.max())}, outside the vocabulary of "
                f"{tokenizer.vocab_size} in {tokenizer.path}; encode the text with this tokenizer"
            )
        starts.append(np.flatnonzero(chunk == tokenizer.bos_id) + begin)
    return Corpus(tokens, np.concatenate(starts))


def split_corpus(corpus: Corpus, eval_share: float) -> tuple[Corpus, Corpus]:
    """(training part, held-out part): the last `eval_share` (0..1) of the tokens, cut anywhere.

    A cut document goes on in the held-out part without a BOS.
    """
    assert 0.0 < eval_share < 1.0
    tokens, starts = corpus
    cut = len(tokens) - round(len(tokens) * eval_share)
    first = int(np.searchsorted(starts, cut))
    return Corpus(tokens[:cut], starts[:first]), Corpus(tokens[cut:], starts[first:] - cut)
