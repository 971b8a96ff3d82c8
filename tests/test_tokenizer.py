"""Tokenizer against Llama 2's own file and ids. Run: python -m pytest tests/test_tokenizer.py -v"""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.text.tokenizer import Tokenizer, stream_text, train_tokenizer

SHARED = Path(
    os.environ.get("PUNA_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
)
LLAMA2 = SHARED / "llama2-tokenizer" / "tokenizer.model"
needs_shared = pytest.mark.skipif(not LLAMA2.exists(), reason=f"no real inputs at {SHARED}")

TEXT = [
    "the quick brown fox jumps over the lazy dog 2023 times",
    "a second line, with a comma; and 42 numbers",
    "und noch eine Zeile mit Umlauten: äöü",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(TEXT * 20, path, vocab_size=320)


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return Tokenizer(LLAMA2)


def wire_fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(field number, value) pairs of one protobuf message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    fields: list[tuple[int, int | bytes]] = []
    while position < len(data):
        key = varint()
        if key & 7 == 0:
            fields.append((key >> 3, varint()))
            continue
        size = {2: varint, 5: lambda: 4, 1: lambda: 8}[key & 7]()
        fields.append((key >> 3, data[position : position + size]))
        position += size
    return fields


def settings(path: Path, spec: int) -> dict[int, int | bytes]:
    (message,) = [value for field, value in wire_fields(path.read_bytes()) if field == spec]
    assert isinstance(message, bytes)
    return dict(wire_fields(message))


@needs_shared
@pytest.mark.shared
def test_llama2_ids_of_47_texts(llama2: Tokenizer) -> None:
    texts = (LLAMA2.parent / "expected.inp").read_text(encoding="utf-8")
    rows = (LLAMA2.parent / "expected.out").read_text().split("\n")
    inputs = texts.split("\n__ggml_vocab_test__\n")  # the last one is empty, as is its row
    assert len(rows) == 47
    for text, row in zip(inputs, rows, strict=True):
        assert llama2.encode(text) == [int(token) for token in row.split()], repr(text)


@needs_shared
@pytest.mark.shared
def test_llama2_special_ids(llama2: Tokenizer) -> None:
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id) == (32000, 1, 2)
    assert llama2.piece(3) == "<0x00>" and llama2.piece(258) == "<0xFF>"
    assert llama2.encode("a", bos=True, eos=True) == [1, *llama2.encode("a"), 2]


@needs_shared
@pytest.mark.shared
def test_training_settings_are_llama2s(small: Tokenizer) -> None:
    """Every setting that our file states is the one in Llama 2's, but for the size."""
    vocab_size, trainer, normalizer = 4, 2, 3
    theirs, ours = settings(LLAMA2, trainer), settings(small.path, trainer)
    assert {key for key in ours if theirs.get(key) != ours[key]} == {vocab_size}
    theirs, ours = settings(LLAMA2, normalizer), settings(small.path, normalizer)
    assert {key for key in ours if theirs.get(key, b"") != ours[key]} <= {2}  # 2: compiled rules


@pytest.mark.parametrize("text", ["<s>", "</s>", "a <s> b </s> c", "<unk>", "<0x0A>"])
def test_control_pieces_in_text_are_text(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert not {0, small.bos_id, small.eos_id} & set(ids)
    assert small.decode(ids) == text


@given(st.text())
def test_round_trip(small: Tokenizer, text: str) -> None:
    # SentencePiece writes a space as U+2581, so that this one character does not come back.
    assert small.decode(small.encode(text)) == text.replace("\u2581", " ")


def test_digits_are_split_and_unknown_characters_are_bytes(small: Tokenizer) -> None:
    pieces = [small.piece(token) for token in small.encode("2023 \U0001f600")]
    assert [piece for piece in pieces if piece.isdigit()] == ["2", "0", "2", "3"]
    assert pieces[-4:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


@given(st.data())
def test_stream_is_decode(small: Tokenizer, data: st.DataObject) -> None:
    byte = st.sampled_from([3 + byte for byte in b"a\xe2\x82\xac\xf0\x9f\x98\x81\xed\xa0\xc0"])
    anything = st.integers(0, small.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(anything, byte), max_size=12))
    assert "".join(stream_text(small, ids)) == small.decode(ids)


def test_stream_holds_back_half_characters(small: Tokenizer) -> None:
    ids = small.encode("\U0001f600!")
    parts = list(stream_text(small, iter(ids)))
    assert "".join(parts) == "\U0001f600!"
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_stream_shows_a_token_before_the_next_is_asked_for(small: Tokenizer) -> None:
    stream = stream_text(small, (token for token in small.encode("the fox") + [-1]))
    assert next(stream).startswith("t")  # the bad id at the end was not yet drawn


def test_training_is_deterministic_and_leaves_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer((line for line in TEXT * 20), tmp_path / name / "t.model", vocab_size=300)
        assert [file.name for file in (tmp_path / name).iterdir()] == ["t.model"]
    assert (tmp_path / "a" / "t.model").read_bytes() == (tmp_path / "b" / "t.model").read_bytes()


def test_training_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TEXT * 20, tmp_path / "t.model", vocab_size=300)
    assert capfd.readouterr() == ("", "")


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    """SentencePiece alone drops lines of more than 4192 bytes."""
    tokenizer = train_tokenizer(["ab " * 5000], tmp_path / "t.model", vocab_size=264)
    assert "\u2581ab" in {tokenizer.piece(token) for token in range(tokenizer.vocab_size)}


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (TEXT, 5000, r"only enough for \d+ pieces, not 5000; ask for \d+ or fewer \(--vocab-size"),
        (TEXT, 200, r"vocab_size 200 is too small.*at least \d+; ask for more \(--vocab-size"),
        ([], 300, "no text to train"),
        (["", "  \n "], 300, "no text to train"),
    ],
)
def test_vocabulary_that_cannot_be(
    tmp_path: Path, texts: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, tmp_path / "t.model", vocab_size=vocab_size)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_texts_is_passed_on(tmp_path: Path) -> None:
    def texts():
        yield TEXT[0]
        raise KeyError("row 2")

    with pytest.raises(KeyError, match="row 2"):
        train_tokenizer(texts(), tmp_path / "t.model", vocab_size=300)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")


def test_bad_ids_and_bad_text(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"token id 320 is outside the vocabulary of 320"):
        small.decode([5, 320])
    with pytest.raises(ValueError, match="lone surrogate"):
        small.encode("\ud800")


def test_what_goes_on_keeps_the_space_before_it(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["once upon a time there was"] * 30, tmp_path / "t", vocab_size=290)
    ids = tokenizer.encode("once upon a time")
    words = tokenizer.encode("once upon")
    assert ids[: len(words)] == words
    assert "".join(stream_text(tokenizer, ids[len(words) :], continued=True)) == " a time"
    assert "".join(stream_text(tokenizer, ids[len(words) :])) == "a time"
