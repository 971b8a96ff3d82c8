"""Texts as a corpus of ids: once, whatever the number of ranks and restarts, shard by shard.

A shard is on disk before the index names it, so encoding that was interrupted goes on behind the
last finished one. Texts are read one after the other and never held together.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib.format import magic

from puna.core.checkpoint.atomic import atomic_file, make_folder, remove_empty, write_text
from puna.core.checkpoint.hashes import digest, digests
from puna.core.checkpoint.steady import Stamps, check_unchanged, stamps_of
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.columns import Reading
from puna.trainers.data.corpus import HEADER, INDEX, Corpus, read_index, token_dtype
from puna.trainers.data.files import Source, is_packed, sources
from puna.trainers.data.long_texts import ids_in_pieces
from puna.trainers.data.readers import Skipped, each_text
from puna.trainers.train.progress import Meter, meter

SHARD = 1 << 28  # tokens: half a gigabyte of 2-byte ids
TOGETHER = 1 << 20  # characters of text that are encoded in one call, on all threads
KILOBYTE, MEGABYTE = 1_000, 1_000_000


class Texts(NamedTuple):
    """Files of texts, and what is read of a row."""

    paths: Sequence[Path]
    how: Reading | None = None

    def sources(self) -> list[list[Source]]:
        """The files that each of the paths stands for."""
        return [sources(path) for path in self.paths]

    def size(self) -> int:
        """Bytes of all files, as they are packed."""
        return sum(each.file.stat().st_size for found in self.sources() for each in found)


class Encoded(NamedTuple):
    """What became of the texts."""

    documents: int
    tokens: int
    skipped: Skipped


def encode_corpus(tokenizer: Tokenizer, texts: Iterable[str]) -> Corpus:
    """Texts as a corpus in memory. Raises ValueError where there is none."""
    documents = [*encoded(tokenizer, texts)]
    if not documents:
        raise ValueError("there is no text to train on")
    return Corpus((np.concatenate(documents),), tokenizer.bos_id, tokenizer.vocab_size)


def encode_file(path: Path, tokenizer: Tokenizer, texts: Texts) -> Encoded:
    """Write all texts as one `.npy`."""
    skipped = Skipped()
    with progress(texts) as counter:
        documents = encoded(tokenizer, read(texts, skipped, counter, stamps_in(texts)))
        count, tokens = write_shard(path, tokenizer, documents, counter)
    return Encoded(count, tokens, skipped)


def encode_folder(
    folder: Path, tokenizer: Tokenizer, texts: Texts, shard: int = SHARD, *, anew: bool = False
) -> Encoded:
    """Write the texts into `folder`, or go on with what was interrupted.

    A shard ends with the document that fills it. Raises ValueError where the folder holds something
    else, or a corpus of other texts, another column or another tokenizer (with `anew` that is
    replaced), and where a text changes until it is read.
    """
    before = stamps_in(texts)
    skipped = Skipped()
    with begun(folder, tokenizer, texts, anew) as index:
        if index["complete"]:
            return Encoded(index["documents"], index["tokens"], skipped)
        with progress(texts) as counter:
            found = read(texts, skipped, counter, before)
            done = index["documents"]
            if sum(1 for _ in islice(found, done)) < done:
                raise ValueError(f"{folder} holds more documents than the texts; remove it")
            documents = encoded(tokenizer, found)
            while (first := next(documents, None)) is not None:
                name = f"tokens-{len(index['shards']):05}.npy"
                rest = chain([first], documents)
                count, tokens = write_shard(folder / name, tokenizer, rest, counter, shard)
                check_unchanged(before)
                index["shards"][name] = (folder / name).stat().st_size
                index["documents"] += count
                index["tokens"] += tokens
                write_index(folder, index)
        index["complete"] = True
        write_index(folder, index)
    return Encoded(index["documents"], index["tokens"], skipped)


@contextmanager
def begun(folder: Path, tokenizer: Tokenizer, texts: Texts, anew: bool) -> Iterator[dict[str, Any]]:
    """The folder's index as far as it has come, or a new one, which goes again where the block ends
    over a mistake before there is a shard."""
    files = [each.file for found in texts.sources() for each in found]
    fresh = {
        "complete": False,
        "tokenizer": digest(tokenizer.path).sha256,
        "texts": [each.sha256 for each in digests(files)],
        "column": (texts.how or Reading()).columns.text,
        "documents": 0,
        "tokens": 0,
        "shards": {},
    }
    index = index_of(folder, fresh)
    if (what := other(index, fresh)) and anew:
        shutil.rmtree(folder)
        index = {}
    if not index:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and holds no corpus; choose another name")
        made = make_folder(folder)
        write_index(folder, fresh)
        try:
            yield fresh
        except (OSError, ValueError):
            if [*folder.iterdir()] == [folder / INDEX]:
                (folder / INDEX).unlink()
                remove_empty(made)
            raise
        return
    if what:
        raise ValueError(f"{folder} was written {what}; choose another name")
    yield index


def index_of(folder: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """What the folder's index says, with what older ones did not; empty where there is none."""
    if not (folder / INDEX).exists():
        return {}
    kinds = {name: type(value) for name, value in fresh.items() if name != "column"}
    found = read_index(folder, kinds, "remove the folder to encode anew")
    return {name: found.get(name, value) for name, value in fresh.items()}


def other(index: dict[str, Any], fresh: dict[str, Any]) -> str:
    """In what a corpus differs from what is asked for; empty where in nothing."""
    how = {
        "tokenizer": "with another tokenizer",
        "texts": "of other texts",
        "column": "of another column of the texts",
    }
    return next((how[name] for name in how if index and index[name] != fresh[name]), "")


def write_index(folder: Path, index: dict[str, Any]) -> None:
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


def write_shard(
    path: Path,
    tokenizer: Tokenizer,
    documents: Iterator[np.ndarray],
    counter: Meter,
    limit: int | None = None,
) -> tuple[int, int]:
    """Documents into one `.npy` until it has `limit` tokens or they end: (documents, tokens)."""
    count = tokens = 0
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.write(bytes(HEADER))
        for document in documents:
            document.tofile(file)
            count += 1
            tokens += len(document)
            counter.units += len(document)
            if limit is not None and tokens >= limit:
                break
        if not count:
            raise ValueError("there is no text to train on")
        write_header(file, dtype, tokens)
    return count, tokens


def write_header(file: BinaryIO, dtype: np.dtype, tokens: int) -> None:
    """The header of a one-dimensional `.npy` array, padded to HEADER bytes."""
    shape = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({tokens},), }}"
    room = HEADER - len(magic(1, 0)) - 2
    file.seek(0)
    file.write(magic(1, 0) + room.to_bytes(2, "little") + f"{shape:<{room - 1}}\n".encode())
    file.seek(0, os.SEEK_END)


def encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each text with BOS and EOS, some texts encoded together."""
    dtype = token_dtype(tokenizer.vocab_size)
    for some in together(texts):
        if len(some[0]) > TOGETHER:
            bos, eos = (np.asarray([end], dtype) for end in (tokenizer.bos_id, tokenizer.eos_id))
            yield np.concatenate([bos, *ids_in_pieces(tokenizer, some[0], dtype), eos])
            continue
        for ids in tokenizer.encode_all(some):
            yield np.asarray([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)


def together(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about TOGETHER characters; one that is longer is alone."""
    some: list[str] = []
    size = 0
    for text in texts:
        if len(text) > TOGETHER and some:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
        if size >= TOGETHER:
            yield some
            some, size = [], 0
    if some:
        yield some


def stamps_in(texts: Texts) -> Stamps:
    return stamps_of(each.file for found in texts.sources() for each in found)


def read(texts: Texts, skipped: Skipped, counter: Meter, stamps: Stamps) -> Iterator[str]:
    """The texts of all files, one after the other; moves the progress on. ValueError where a file
    is not as it was at its `stamps`."""
    before, (unit, _) = 0, unit_of(texts.size())
    for path, found in zip(texts.paths, texts.sources(), strict=True):
        seen = before
        packed = any(map(is_packed, found))
        for text in each_text(path, texts.how, skipped):
            seen += 0 if packed else len(text)
            move_to(seen // unit, counter)
            yield text
        check_unchanged(stamps)
        before += sum(each.file.stat().st_size for each in found)
        move_to(before // unit, counter)


def move_to(units: int, counter: Meter) -> None:
    """At most to the last one: that is done with the last id."""
    while counter.step < min(units, counter.total - 1):
        counter.advance(0)


def unit_of(size: int) -> tuple[int, str]:
    """In which so many bytes are counted: 1.1 MB once were "2/2 MB"."""
    return (KILOBYTE, "kB") if size < 10 * MEGABYTE else (MEGABYTE, "MB")


@contextmanager
def progress(texts: Texts) -> Iterator[Meter]:
    """A meter in bytes of the files, the last of which is done with the last id."""
    size = texts.size()
    unit, name = unit_of(size)
    with meter(f"encoding, {name}", max(1, round(size / unit))) as counter:
        yield counter
        counter.step = counter.total - 1
        counter.advance(0)
