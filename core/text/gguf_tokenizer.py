"""The tokenizer in a GGUF file's settings, as the contents of a tokenizer.json."""

from pathlib import Path
from typing import Any

from puna.core.checkpoint.gguf_header import read_header
from puna.core.documents import as_name, field
from puna.core.text.beside import Beside
from puna.core.text.vocabulary import byte_pair_json, sentencepiece_json

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
ENDS = ("eos", "eot", "eom")
# Control tokens that end an answer though no setting says so; llama.cpp knows them by name, too.
NAMED_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")


def read_tokenizer(path: Path) -> tuple[dict[str, Any], Beside]:
    """(the contents of a tokenizer.json, what would stand beside it) of a GGUF file.

    Raises ValueError where the file holds none, or one of a kind that is not known.
    """
    values = read_header(path).values
    try:
        return _document(values), _beside(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _document(values: dict[str, Any]) -> dict[str, Any]:
    kind = field(values, "tokenizer.ggml.model", str)
    pieces = _texts(values, "tokens")
    types = field(values, "tokenizer.ggml.token_type", list, None) or [NORMAL] * len(pieces)
    if len(types) != len(pieces) or len(set(pieces)) != len(pieces):
        raise ValueError("its tokens have other numbers than their types, or come up twice")
    added = {
        number: (piece, type_ in (CONTROL, UNKNOWN))
        for number, (piece, type_) in enumerate(zip(pieces, types, strict=True))
        if type_ in (CONTROL, USER, UNKNOWN)
    }
    bos = None
    if field(values, "tokenizer.ggml.add_bos_token", bool, kind == "llama"):
        bos = _piece(values, "bos", pieces)
    if kind == "gpt2":
        pre = field(values, "tokenizer.ggml.pre", str, "default")
        return byte_pair_json(pieces, _texts(values, "merges"), added, pre, bos)
    if kind == "llama":
        scores = field(values, "tokenizer.ggml.scores", list)
        if len(scores) != len(pieces) or not all(isinstance(each, float) for each in scores):
            raise ValueError("its tokens have other numbers than their scores")
        texts = [type_ in (NORMAL, USER) for type_ in types]
        return sentencepiece_json(pieces, scores, texts, added, bos)
    raise ValueError(f"its tokenizer is of the kind {as_name(kind)}; Puna reads llama and gpt2")


def _texts(values: dict[str, Any], name: str) -> list[str]:
    found = field(values, f"tokenizer.ggml.{name}", list)
    if not found or not all(isinstance(each, str) for each in found):
        raise ValueError(f"its {name} are no texts")
    return found


def _piece(values: dict[str, Any], name: str, pieces: list[str]) -> str | None:
    token = field(values, f"tokenizer.ggml.{name}_token_id", int, None)
    return pieces[token] if token is not None and 0 <= token < len(pieces) else None


def _beside(values: dict[str, Any]) -> Beside:
    pieces = _texts(values, "tokens")
    found = {name: _piece(values, name, pieces) for name in ("bos", *ENDS)}
    named = {f"{name}_token": found[name] for name in ("bos", "eos")}
    ends = [pieces.index(piece) for name in ENDS if (piece := found[name]) is not None]
    types = field(values, "tokenizer.ggml.token_type", list, None) or []
    known = {piece: token for token, piece in enumerate(pieces[: len(types)])}
    ends += [known[name] for name in NAMED_ENDS if name in known and types[known[name]] == CONTROL]
    template = field(values, "tokenizer.chat_template", str, None)
    tokens = {name: piece for name, piece in named.items() if piece is not None}
    return Beside(tokens, {"eos_token_id": tuple(dict.fromkeys(ends))}, template)
