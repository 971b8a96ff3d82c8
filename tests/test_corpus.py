"""Corpora of ids, in memory and on disk. Run: python -m pytest tests/test_corpus.py -v"""

from pathlib import Path

import numpy as np
import pytest

from puna.core.tokenizer import Tokenizer, train_tokenizer
from puna.trainers.data import corpus as corpus_module
from puna.trainers.data.corpus import (
    Corpus,
    encode_corpus,
    open_corpus,
    save_corpus,
    split_corpus,
    token_dtype,
)

TEXTS = ["first text", "second <s> text </s>", "third"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("corpus") / "tokenizer.model"
    return train_tokenizer(TEXTS * 10, path, vocab_size=290)


def documents(corpus: Corpus) -> list[list[int]]:
    borders = [*corpus.starts.tolist(), len(corpus.tokens)]
    return [corpus.tokens[a:b].tolist() for a, b in zip(borders[:-1], borders[1:], strict=True)]


def test_documents_keep_their_ids(tokenizer: Tokenizer) -> None:
    corpus = encode_corpus(tokenizer, iter(TEXTS))
    assert corpus.tokens.dtype == np.uint16
    assert documents(corpus) == [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    with pytest.raises(ValueError, match="no text to train on"):
        encode_corpus(tokenizer, [])


def test_width_of_an_id() -> None:
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.uint32


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_disk_round_trip(
    tokenizer: Tokenizer, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "CHUNK", chunk)
    corpus = encode_corpus(tokenizer, TEXTS)
    save_corpus(tmp_path / "ids.npy", corpus)
    assert [file.name for file in tmp_path.iterdir()] == ["ids.npy"]
    opened = open_corpus(tmp_path / "ids.npy", tokenizer)
    assert isinstance(opened.tokens, np.memmap)
    assert documents(opened) == documents(corpus)


def test_files_that_are_no_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    with pytest.raises(ValueError, match="no such file"):
        open_corpus(path, tokenizer)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="is no .npy array"):
        open_corpus(path, tokenizer)
    np.save(path, np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"float32 of shape \(2, 2\), expected a one-dimensional"):
        open_corpus(path, tokenizer)
    np.save(path, np.array([1, 300], np.uint16))
    with pytest.raises(ValueError, match="the id 300, outside the vocabulary of 290"):
        open_corpus(path, tokenizer)
    with pytest.raises(ValueError, match="name it so"):
        save_corpus(tmp_path / "ids.bin", encode_corpus(tokenizer, TEXTS))


def test_split(tokenizer: Tokenizer) -> None:
    corpus = encode_corpus(tokenizer, TEXTS * 10)
    train, held_out = split_corpus(corpus, 0.25)
    assert len(held_out.tokens) == round(len(corpus.tokens) * 0.25)
    assert np.array_equal(np.concatenate([train.tokens, held_out.tokens]), corpus.tokens)
    for part in (train, held_out):
        assert np.array_equal(part.starts, np.flatnonzero(part.tokens == tokenizer.bos_id))
