"""Text to ids and back, streaming, and training a SentencePiece tokenizer as Llama 2's was.

`<s>` and `</s>` in a text are text: only `bos=True` and `eos=True` add the control tokens.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from puna.core.checkpoint.atomic import atomic_file
from puna.core.text.json_tokenizer import Control, JsonPieces
from puna.core.text.opened import open_tokenizer

PADDING = 64
MAX_SENTENCE_BYTES = 4192  # Llama 2's setting: SentencePiece drops longer lines
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space inside a piece


class Tokenizer:
    """A tokenizer with a BOS and an EOS token: a SentencePiece model, a Hugging Face tokenizer.json
    or what a GGUF file holds of one.

    What stands beside the file counts, too: the special tokens of tokenizer_config.json, all EOS
    ids of config.json and generation_config.json, the chat template, and the size that the model's
    vocabulary is padded to. Raises ValueError where the file is absent, is none of these or lacks
    BOS or EOS.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        opened = open_tokenizer(self.path)
        self._model = opened.model
        self.pieces: int = self._model.vocab_size()
        self.vocab_size = self.pieces
        """pieces, and the ids without one that the model beside it is padded with"""
        if opened.padded_to is not None and self.pads_to(opened.padded_to):
            self.vocab_size = opened.padded_to
        self.bos_id: int = opened.bos_id
        self.eos_ids: tuple[int, ...] = opened.eos_ids
        """all that end a text; the first is the one that is written"""
        self.controls: dict[str, Control] = opened.controls
        """the tokens that stand for no text, by their spelling: a text never holds one"""
        self.chat_template: str | None = opened.template
        """as the model's folder has it; None: Llama 2's"""
        self.names: dict[str, str] = opened.names
        """the spellings that a chat template knows as bos_token, eos_token and so on"""

    @property
    def eos_id(self) -> int:
        """The EOS that is written behind a text."""
        return self.eos_ids[0]

    def pads_to(self, vocab_size: int) -> bool:
        """Whether a model's vocabulary of this size can be this tokenizer's, padded: by one id in
        64 at most (32,000 pieces in 32,001, 32,064 or 32,256)."""
        return 0 <= vocab_size - self.pieces <= vocab_size // PADDING

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`. Raises ValueError for text that is no valid Unicode (lone surrogates)."""
        try:
            ids: list[int] = self._model.encode(text)
        except RuntimeError as error:
            raise ValueError("the text holds a lone surrogate: it is not valid Unicode") from error
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_start(self, text: str) -> list[int]:
        """Ids of `text` as the beginning of a sequence: behind BOS, but for tokenizers that put
        none (there must be something to go on from, so an empty text is one BOS). Raises as
        `encode` does."""
        bos = self.is_sentencepiece or self._model.puts_first(self.bos_id)
        return self.encode(text, bos=bos) or [self.bos_id]

    def encode_later(self, text: str) -> list[int]:
        """Ids of `text` where it stands behind a control token: some tokenizers put a space before
        the first word of a whole text alone. Raises as `encode` does."""
        if not isinstance(self._model, JsonPieces):
            return self.encode(text)
        try:
            return self._model.encode_later(text)
        except RuntimeError as error:
            raise ValueError("the text holds a lone surrogate: it is not valid Unicode") from error

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all threads; raises as `encode` does."""
        try:
            found: list[list[int]] = self._model.encode([*texts])
        except RuntimeError as error:
            raise ValueError("a text holds a lone surrogate: it is not valid Unicode") from error
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens and those without a piece give nothing, bytes that are no
        UTF-8 give U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = list(ids)
        self._check(ids)
        text: str = self._model.decode([token for token in ids if token < self.pieces])
        return text

    def piece(self, token: int) -> str:
        """The vocabulary entry of one id as SentencePiece writes it, such as `▁the` or `<0x0A>`."""
        self._check([token])
        piece: str = self._model.id_to_piece(token) if token < self.pieces else ""
        return piece

    def is_byte(self, token: int) -> bool:
        """Whether the id stands for one raw byte."""
        self._check([token])
        return token < self.pieces and bool(self._model.is_byte(token))

    def is_text(self, token: int) -> bool:
        """Whether the id stands for text: it is no control piece, no byte and not the unknown."""
        self._check([token])
        model = self._model
        return token < self.pieces and not (
            model.is_control(token) or model.is_unknown(token) or model.is_byte(token)
        )

    def piece_score(self, token: int) -> float:
        """What the model says of a piece: in a byte-pair model the order of its merge, negative."""
        self._check([token])
        score: float = self._model.get_score(token)
        return score

    @property
    def is_sentencepiece(self) -> bool:
        return not isinstance(self._model, JsonPieces)

    def _check(self, ids: list[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"token id {min(ids) if min(ids) < 0 else max(ids)} is outside the vocabulary of "
                f"{self.vocab_size}; is {self.path} the tokenizer of this model?"
            )


def stream_text(
    tokenizer: Tokenizer, ids: Iterable[int], *, continued: bool = False
) -> Iterator[str]:
    """Text of `ids` as they come, one string for each id that completes a character.

    The strings joined are `tokenizer.decode(ids)`; with `continued`, where the ids go on after
    others, its first word keeps the space before it. Byte tokens are held back until they make up
    a character, so that a half character is never printed.
    """
    if not tokenizer.is_sentencepiece:
        yield from _stream_json(tokenizer, ids, continued)
        return
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


def _stream_json(tokenizer: Tokenizer, ids: Iterable[int], continued: bool) -> Iterator[str]:
    """`stream_text` of a tokenizer whose pieces are no text alone: what a few more ids add to the
    text of those just before."""
    before: list[int] = tokenizer.encode("a") if continued else []
    held: list[int] = []
    for token in ids:
        held.append(token)
        known = tokenizer.decode(before)
        text = tokenizer.decode(before + held)
        if len(text) > len(known) and not text.endswith(_REPLACEMENT):
            yield text[len(known) :]
            before, held = held, []
    rest = tokenizer.decode(before + held)[len(tokenizer.decode(before)) :]
    if rest:
        yield rest


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
            f"ask for {too_high[1]} or fewer (--vocab-size), or give more text"
        )
    too_small = re.search(r"(\d+) vs (\d+)", message)
    if too_small:
        return (
            f"vocab_size {vocab_size} is too small: 3 control pieces, 256 bytes and the texts' "
            f"characters need at least {too_small[2]}; ask for more (--vocab-size), or lower "
            "--character-coverage"
        )
    return f"SentencePiece could not train on these texts: {message}"
