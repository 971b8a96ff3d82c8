"""SentencePiece tokenizer: text to ids and back, streaming, and training one as Llama 2's was.

`<s>` and `</s>` in a text are text: only `bos=True` and `eos=True` add the control tokens.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from puna.core.checkpoint.atomic import atomic_file
from puna.core.documents import regular_file

LARGEST_BYTES = 1 << 26  # Llama 2's has half a MB
MAX_SENTENCE_BYTES = 4192  # Llama 2's setting: SentencePiece drops longer lines
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space inside a piece


class Tokenizer:
    """A SentencePiece model file with a BOS and an EOS piece.

    Raises ValueError where the file is absent, is no SentencePiece model or lacks BOS or EOS.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        regular_file(self.path, "no such file; give the path of a tokenizer.model")
        if self.path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"{self.path} is too large to be a tokenizer.model; give that file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last from its message
            raise ValueError(
                f"{self.path} is not a SentencePiece model; "
                "train one with `puna tokenizer train` or take a checkpoint's tokenizer.model"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        if not _is_whole(self._model):
            raise ValueError(f"{self.path} is damaged: a piece is no text; fetch it again")
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{self.path} has no BOS or no EOS piece; Llama 2 needs both")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`. Raises ValueError for text that is no valid Unicode (lone surrogates)."""
        try:
            ids: list[int] = self._model.encode(text)
        except RuntimeError as error:
            raise ValueError("the text holds a lone surrogate: it is not valid Unicode") from error
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all threads; raises as `encode` does."""
        try:
            found: list[list[int]] = self._model.encode([*texts])
        except RuntimeError as error:
            raise ValueError("a text holds a lone surrogate: it is not valid Unicode") from error
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens give nothing, bytes that are no UTF-8 give U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = list(ids)
        self._check(ids)
        text: str = self._model.decode(ids)
        return text

    def piece(self, token: int) -> str:
        """The vocabulary entry of one id as SentencePiece writes it, such as `▁the` or `<0x0A>`."""
        self._check([token])
        piece: str = self._model.id_to_piece(token)
        return piece

    def is_byte(self, token: int) -> bool:
        """Whether the id stands for one raw byte."""
        self._check([token])
        return bool(self._model.is_byte(token))

    def is_text(self, token: int) -> bool:
        """Whether the id stands for text: it is no control piece, no byte and not the unknown."""
        self._check([token])
        model = self._model
        return not (model.is_control(token) or model.is_unknown(token) or model.is_byte(token))

    def piece_score(self, token: int) -> float:
        """What the model says of a piece: in a byte-pair model the order of its merge, negative."""
        self._check([token])
        score: float = self._model.get_score(token)
        return score

    def _check(self, ids: list[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"token id {min(ids) if min(ids) < 0 else max(ids)} is outside the vocabulary of "
                f"{self.vocab_size}; is {self.path} the tokenizer of this model?"
            )


def _is_whole(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether all pieces are text, and those that stand for bytes say which."""
    ids = list(range(model.vocab_size()))
    try:
        pieces = model.id_to_piece(ids)
    except UnicodeDecodeError:
        return False
    are_bytes = zip(pieces, model.is_byte(ids), strict=True)
    return all(_BYTE.fullmatch(piece) for piece, is_byte in are_bytes if is_byte)


def stream_text(
    tokenizer: Tokenizer, ids: Iterable[int], *, continued: bool = False
) -> Iterator[str]:
    """Text of `ids` as they come, one string for each id that completes a character.

    The strings joined are `tokenizer.decode(ids)`; with `continued`, where the ids go on after
    others, its first word keeps the space before it. Byte tokens are held back until they make up
    a character, so that a half character is never printed.
    """
    held = b""
    opening: list[int] = []  # ids up to the first text: only there does decode drop spaces
    begun = continued
    for token in ids:
        if tokenizer.is_byte(token):
            held += bytes([int(tokenizer.piece(token)[1:-1], 16)])
            text, held = _take_characters(held)
            begun = True
        elif not begun:
            opening.append(token)
            text = tokenizer.decode(opening)
            begun = bool(text)
        else:
            piece = tokenizer.piece(token)
            # In the middle a piece keeps its spaces, which decode drops from the first one.
            text = piece.replace(_SPACE, " ") if _SPACE in piece else tokenizer.decode([token])
            text, held = _REPLACEMENT * len(held) + text, b""
        if text:
            yield text
    if held:
        yield _REPLACEMENT * len(held)


def _take_characters(data: bytes) -> tuple[str, bytes]:
    """Splits off the whole UTF-8 characters; what is left may still become a character."""
    text = ""
    while data:
        lead = data[0]
        size = 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4
        if lead < 0x80 or not 0xC2 <= lead < 0xF5:
            size = 1
        if len(data) < size and all(0x80 <= byte < 0xC0 for byte in data[1:]):
            break
        try:
            character = data[:size].decode("utf-8")
        except UnicodeDecodeError:  # one U+FFFD for each byte, as SentencePiece has it
            character, size = _REPLACEMENT, 1
        text, data = text + character, data[size:]
    return text, data


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    character_coverage: float = 0.99995,
) -> Tokenizer:
    """Trains a byte-pair vocabulary with Llama 2's settings and writes it to `path`.

    The settings are the trainer and normalizer spec in Llama 2's own tokenizer.model: digits
    split, unknown characters as bytes, spaces kept, no normalisation, unk 0, bos 1, eos 2, no
    pad. The same texts give the same file. Raises ValueError where the texts cannot fill
    `vocab_size` pieces, or `vocab_size` has no room for the 256 bytes and the characters.
    """
    path = Path(path)
    buffer = io.BytesIO()
    sentences = _Sentences(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=buffer,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            model_type="bpe",
            input_sentence_size=200_000_000,
            shuffle_input_sentence=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            max_sentencepiece_length=16,
            split_by_unicode_script=True,
            split_by_whitespace=True,
            split_by_number=True,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_surface=" \u2047 ",
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        if sentences.failure is not None:
            raise sentences.failure from None
        if sentences.count == 0:
            raise ValueError("there is no text to train a tokenizer on") from None
        raise ValueError(_explain(str(error), vocab_size)) from error
    with atomic_file(path) as partial:
        partial.write_bytes(buffer.getvalue())
    return Tokenizer(path)


class _Sentences:
    """Lines of the texts for SentencePiece, which hides what the texts' own iterator raised."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.count = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                for line in _lines(text):
                    self.count += 1
                    yield line
        except BaseException as failure:
            self.failure = failure
            raise


def _lines(text: str) -> Iterator[str]:
    """Lines that are not blank, those that SentencePiece would drop as too long cut in parts."""
    step = MAX_SENTENCE_BYTES // 4  # a character has at most 4 bytes
    # SentencePiece refuses NUL and lone surrogates.
    text = text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    for line in text.split("\n"):
        if len(line) <= step or len(line.encode("utf-8")) <= MAX_SENTENCE_BYTES:
            parts = [line]
        else:
            parts = [line[start : start + step] for start in range(0, len(line), step)]
        yield from (part for part in parts if part.strip())


def _explain(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint about the size of the vocabulary as one sentence with a way out."""
    too_high = re.search(r"too high \(\d+\).*?<= (\d+)", message)
    if too_high:
        return (
            f"the texts have only enough for {too_high[1]} pieces, not {vocab_size}; "
            f"ask for vocab_size <= {too_high[1]} or give more text"
        )
    too_small = re.search(r"(\d+) vs (\d+)", message)
    if too_small:
        return (
            f"vocab_size {vocab_size} is too small: 3 control pieces, 256 bytes and the texts' "
            f"characters need at least {too_small[2]}; ask for more, or lower character_coverage"
        )
    return f"SentencePiece could not train on these texts: {message}"
