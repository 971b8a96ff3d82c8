"""Corpora of ids, in memory and on disk. Run: python -m pytest tests/test_corpus.py -v"""

import json
from pathlib import Path

import numpy as np
import pytest

from puna.core.text.tokenizer import Tokenizer, train_tokenizer
from puna.trainers.data import encoding
from puna.trainers.data.columns import Columns, Reading
from puna.trainers.data.corpus import Corpus, open_corpus, split_corpus, token_dtype
from puna.trainers.data.encoding import (
    Texts,
    encode_corpus,
    encode_file,
    encode_folder,
)
from puna.trainers.data.packing import CorpusRows

TEXTS = ["first text", "second <s> text </s>", "third", "fourth text of all", "fifth"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("corpus") / "tokenizer.model"
    return train_tokenizer(TEXTS * 10, path, vocab_size=290)


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    """All texts, in two files."""
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    for name, some in (("a", rows[:2]), ("b", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    return Texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def documents(corpus: Corpus) -> list[list[int]]:
    found: list[list[int]] = []
    for shard in corpus.shards:
        for token in shard.tolist():
            if token == corpus.bos_id:
                found.append([])
            found[-1].append(token)
    return found


def expected(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]


def test_documents_keep_their_ids(tokenizer: Tokenizer) -> None:
    corpus = encode_corpus(tokenizer, iter(TEXTS))
    assert corpus.shards[0].dtype == np.uint16
    assert documents(corpus) == expected(tokenizer)
    with pytest.raises(ValueError, match="no text to train on"):
        encode_corpus(tokenizer, [])


def test_width_of_an_id() -> None:
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.uint32


def test_one_file(tokenizer: Tokenizer, texts: Texts, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    found = encode_file(path, tokenizer, texts)
    opened = open_corpus([path], tokenizer)
    assert isinstance(opened.shards[0], np.memmap)
    assert documents(opened) == expected(tokenizer)
    assert (found.documents, found.tokens) == (len(TEXTS), opened.size)
    assert np.array_equal(np.load(path, allow_pickle=False), opened.shards[0])


@pytest.mark.parametrize(("limit", "shards"), [(1, 5), (10, 4), (1 << 28, 1)])
def test_a_folder_of_shards(
    tokenizer: Tokenizer, texts: Texts, tmp_path: Path, limit: int, shards: int
) -> None:
    found = encode_folder(tmp_path / "corpus", tokenizer, texts, limit)
    opened = open_corpus([tmp_path / "corpus"], tokenizer)
    assert len(opened.shards) <= shards and all(len(s) >= limit for s in opened.shards[:-1])
    assert documents(opened) == expected(tokenizer)
    assert (found.documents, found.tokens) == (len(TEXTS), opened.size)


@pytest.mark.parametrize("stop", range(5))
def test_an_interrupted_folder_goes_on(
    tokenizer: Tokenizer, texts: Texts, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_folder(tmp_path / "whole", tokenizer, texts, 1)
    written = []
    write = encoding.write_shard

    def interrupted(path: Path, *rest):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "write_shard", interrupted)
        encode_folder(tmp_path / "corpus", tokenizer, texts, 1)
    with pytest.raises(ValueError, match="is not written to its end; run `puna tokenizer encode`"):
        open_corpus([tmp_path / "corpus"], tokenizer)
    encode_folder(tmp_path / "corpus", tokenizer, texts, 1)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert whole == {file.name: file.read_bytes() for file in (tmp_path / "corpus").iterdir()}


def test_a_folder_belongs_to_its_texts(tokenizer: Tokenizer, texts: Texts, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    encode_folder(folder, tokenizer, texts)
    before = (folder / "tokens-00000.npy").stat().st_mtime_ns
    encode_folder(folder, tokenizer, texts)  # done: nothing is written again
    assert (folder / "tokens-00000.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was written of other texts"):
        encode_folder(folder, tokenizer, Texts(texts.paths[:1]))
    column = Reading(columns=Columns(text="body"))
    with pytest.raises(ValueError, match="was written of another column of the texts"):
        encode_folder(folder, tokenizer, Texts(texts.paths, column))
    other = train_tokenizer(TEXTS * 10, tmp_path / "other.model", vocab_size=280)
    with pytest.raises(ValueError, match="was written with another tokenizer"):
        encode_folder(folder, other, texts)
    with pytest.raises(ValueError, match="was written with another tokenizer than"):
        open_corpus([folder], other)
    with pytest.raises(ValueError, match="exists and holds no corpus"):
        encode_folder(tmp_path, tokenizer, texts)
    index = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(index | {"tokens": 7}))
    with pytest.raises(ValueError, match=r"corpus.json does not name all shards"):
        open_corpus([folder], tokenizer)
    (folder / "tokens-00000.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokens-00000.npy is missing or not as corpus.json says"):
        open_corpus([folder], tokenizer)


def test_files_that_are_no_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    with pytest.raises(ValueError, match="no such file"):
        open_corpus([path], tokenizer)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="is no .npy array"):
        open_corpus([path], tokenizer)
    np.save(path, np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"float32 of shape \(2, 2\), expected a one-dimensional"):
        open_corpus([path], tokenizer)
    np.save(path, np.array([1, 300], np.uint16))
    with pytest.raises(ValueError, match="the id 300, outside the tokenizer's vocabulary of 290"):
        open_corpus([path], tokenizer)


def test_an_id_that_no_look_met_is_met_by_its_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = np.ones(10_000_000, np.uint16)
    tokens[9_990_000] = 300
    np.save(tmp_path / "ids.npy", tokens)
    rows = CorpusRows(open_corpus([tmp_path / "ids.npy"], tokenizer), 1000)
    rows.batch([0, 9_988, 9_991])
    with pytest.raises(ValueError, match="row 9991 of the corpus holds the id 300"):
        rows.batch([9_990])


def test_opening_reads_as_much_of_any_size(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        "puna.trainers.data.corpus.check_ids", lambda tokens, *rest: read.append(len(tokens))
    )
    totals = []
    for size in (1 << 20, 1 << 21, 1 << 22):
        np.save(tmp_path / "ids.npy", np.full(size, 5, np.uint16))
        read.clear()
        split_corpus(open_corpus([tmp_path / "ids.npy"], tokenizer), 0.25)
        totals.append(sum(read))
    assert totals == [64 * 4096] * 3


@pytest.mark.parametrize("limit", [1, 40, 1 << 28])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
def test_split(
    tokenizer: Tokenizer, texts: Texts, tmp_path: Path, limit: int, share: float
) -> None:
    many = Texts([*texts.paths] * 6)
    encode_folder(tmp_path / "corpus", tokenizer, many, limit)
    corpus = open_corpus([tmp_path / "corpus"], tokenizer)
    train, held_out = split_corpus(corpus, share)
    assert held_out.size == round(corpus.size * share)
    together = np.concatenate([*train.shards, *held_out.shards])
    assert np.array_equal(together, np.concatenate(corpus.shards))


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 5, 6, 2], 0.01),  # nothing is held out
        ([1, 5, 6, 2], 0.9),  # nothing is left to train on
        ([1, 5, 6, 2], 0.25),  # one token held out predicts nothing
        ([1, 5, 2, 1], 0.5),  # nor do the end of a document and the beginning of another
    ],
)
def test_a_part_with_nothing_to_predict_is_said_with_the_way_out(
    ids: list[int], share: float
) -> None:
    corpus = Corpus((np.array(ids, np.uint16),), bos_id=1, vocab_size=8)
    with pytest.raises(ValueError, match="^4 tokens are too few .*; give more text, or .*eval.*0$"):
        split_corpus(corpus, share)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(3, "kB: 1/1"), (1_149_400, "kB: 1149/1149"), (12_300_000, "MB: 12/12")],
)
def test_progress_is_counted_in_what_there_is(size, shown, tmp_path, capsys):
    """1.1 MB once were "2/2 MB"."""
    with (tmp_path / "text.txt").open("wb") as file:
        file.truncate(size)
    with encoding.progress(Texts([tmp_path / "text.txt"])) as counter:
        encoding.move_to(10**9, counter)
        assert counter.step == counter.total - 1
    assert f"encoding, {shown}, " in capsys.readouterr().out
