"""Opens the files that hold a tokenizer: what they say, in one form."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from puna.core.documents import read_object, regular_file
from puna.core.text.beside import CHAT_TEMPLATE, Beside, read_beside
from puna.core.text.gguf_tokenizer import read_tokenizer
from puna.core.text.json_tokenizer import Control, JsonPieces, spelled

LARGEST_BYTES = 1 << 26  # Llama 2's has half a MB
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Opened(NamedTuple):
    """What a tokenizer's files say."""

    model: Any  # SentencePiece's processor, or JsonPieces
    bos_id: int
    eos_ids: tuple[int, ...]
    controls: dict[str, Control]
    template: str | None
    names: dict[str, str]
    padded_to: int | None


NAMES = ("tokenizer.model", "tokenizer.json")  # in a model's folder


def open_tokenizer(path: Path) -> Opened:
    """The tokenizer in a tokenizer.model, a tokenizer.json or a GGUF file, with what stands beside
    it. Raises ValueError where it is none of these or lacks BOS or EOS."""
    if path.is_dir():
        inside = [file for name in NAMES if (file := path / name).is_file()]
        raise ValueError(
            f"{path} is a folder, expected a tokenizer's file"
            + (f"; give {inside[0]}" if inside else "")
        )
    regular_file(path, "no such file; give the path of a tokenizer.model or tokenizer.json")
    if path.suffix == ".json":
        return _of_document(path, read_object(path), read_beside(path))
    if path.suffix == ".gguf":
        return _of_document(path, *read_tokenizer(path))
    return _of_sentencepiece(path)


def document_of(path: Path) -> dict[str, Any]:
    """The contents of a tokenizer.json, of one or of a GGUF file. Raises ValueError as `Tokenizer`
    does."""
    return read_tokenizer(path)[0] if path.suffix == ".gguf" else read_object(path)


def _of_sentencepiece(path: Path) -> Opened:
    if path.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"{path} is too large to be a tokenizer.model; give that file")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last from its message
        raise ValueError(
            f"{path} is not a SentencePiece model; "
            "train one with `puna tokenizer train` or take a checkpoint's tokenizer.model"
        ) from error
    if not _is_whole(model):
        raise ValueError(f"{path} is damaged: a piece is no text; fetch it again")
    bos, eos = model.bos_id(), model.eos_id()
    if bos < 0 or eos < 0:
        raise ValueError(f"{path} has no BOS or no EOS piece; Llama 2 needs both")
    beside = read_beside(path)
    size = model.vocab_size()
    ends = [token for token in beside.ids.get("eos_token_id", ()) if token < size]
    ids = list(range(size))
    kinds = zip(ids, model.is_control(ids), strict=True)
    controls = {model.id_to_piece(token): Control(token) for token, control in kinds if control}
    names = {"bos_token": model.id_to_piece(bos), "eos_token": model.id_to_piece(eos)}
    eos_ids = tuple(dict.fromkeys((eos, *ends)))
    template = None if beside.template == CHAT_TEMPLATE else beside.template
    return Opened(model, bos, eos_ids, controls, template, names, beside.vocab_size)


def _of_document(path: Path, document: Mapping[str, Any], beside: Beside) -> Opened:
    """Of the contents of a tokenizer.json, and of what is said of it elsewhere."""
    numbered = [*beside.ids.get("eos_token_id", ()), *beside.ids.get("bos_token_id", ())]
    try:
        special = [*beside.tokens.values(), *spelled(document, numbered)]
        model = JsonPieces(document, special)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    size = model.vocab_size()
    known = {
        name: [token for token in (model.id_of(beside.tokens.get(name, "")), *more) if token >= 0]
        for name, more in (
            ("eos_token", beside.ids.get("eos_token_id", ())),
            ("bos_token", beside.ids.get("bos_token_id", ())),
        )
    }
    ends = tuple(dict.fromkeys(token for token in known["eos_token"] if token < size))
    if not ends:
        raise ValueError(
            f"{path} has no EOS token; name its eos_token in a tokenizer_config.json beside it"
        )
    begins = [token for token in known["bos_token"] if token < size]
    names = {"eos_token": model.id_to_piece(ends[0])}
    if begins:
        names["bos_token"] = model.id_to_piece(begins[0])
    # Without a BOS a text begins behind the end of another.
    bos = begins[0] if begins else ends[0]
    template = beside.template or CHAT_TEMPLATE
    named = {**beside.tokens, **names}
    return Opened(model, bos, ends, model.controls, template, named, beside.vocab_size)


def _is_whole(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether all pieces are text, and those that stand for bytes say which."""
    ids = list(range(model.vocab_size()))
    try:
        pieces = model.id_to_piece(ids)
    except UnicodeDecodeError:
        return False
    are_bytes = zip(pieces, model.is_byte(ids), strict=True)
    return all(_BYTE.fullmatch(piece) for piece, is_byte in are_bytes if is_byte)
