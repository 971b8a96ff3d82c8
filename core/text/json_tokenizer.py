"""A Hugging Face tokenizer.json, read through the `tokenizers` library.

It stands in the place of SentencePiece's processor in `puna.core.text.tokenizer`. Control tokens
that a text spells are text: only a template or `bos=True` puts the ids of control tokens.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.core.documents import field, typed

LARGEST_ID = 1 << 22  # Llama 3's highest is 128,255
_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Control:
    """A token that stands for no text, and whether it takes the spaces beside it away."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class JsonPieces:
    """The tokenizer that `document`, the contents of a tokenizer.json, describes.

    `special` are pieces that are control tokens whatever the document says of them. Raises
    ValueError, which does not name the file, where the document is damaged or the `tokenizers`
    package is not installed.
    """

    def __init__(self, document: Mapping[str, Any], special: Sequence[str] = ()) -> None:
        self.controls = _controls(document, special)
        added = [dict(each) for each in field(dict(document), "added_tokens", list, [])]
        for each in added:
            each["special"] = each["content"] in self.controls
        whole = {**document, "added_tokens": added, "truncation": None, "padding": None}
        self._begin = _built(whole)
        # Of some tokenizers the first word of a text gets a space that the others do not get.
        self._later = _built(_never_first(whole)) if _first_only(whole) else self._begin
        vocabulary = self._begin.get_vocab(with_added_tokens=True)
        if not vocabulary or max(vocabulary.values()) >= LARGEST_ID:
            raise ValueError("it has no vocabulary, or ids that no model has")
        self._size = max(vocabulary.values()) + 1
        self._ids: dict[str, int] = vocabulary

    def vocab_size(self) -> int:
        return self._size

    def id_of(self, piece: str) -> int:
        """-1 where there is none."""
        return self._ids.get(piece, -1)

    def puts_first(self, token: int) -> bool:
        """Whether the tokenizer begins every text with this control token."""
        return list(self._begin.encode("a").ids[:1]) == [token]

    def encode(self, texts: str | list[str]) -> Any:
        """Ids of a text, or of each of several; RuntimeError for a lone surrogate."""
        try:
            if isinstance(texts, str):
                return list(self._begin.encode(texts, add_special_tokens=False).ids)
            many = self._begin.encode_batch_fast(texts, add_special_tokens=False)
            return [list(one.ids) for one in many]
        except (UnicodeEncodeError, TypeError) as error:
            raise RuntimeError(str(error)) from error

    def encode_later(self, text: str) -> list[int]:
        """Ids of a text that stands behind a control token."""
        try:
            return list(self._later.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise RuntimeError(str(error)) from error

    def decode(self, ids: list[int]) -> str:
        text: str = self._begin.decode(ids, skip_special_tokens=True)
        return text

    def id_to_piece(self, token: int) -> str:
        return self._begin.id_to_token(token) or ""

    def is_byte(self, token: int) -> bool:
        return bool(_BYTE.fullmatch(self.id_to_piece(token)))

    def is_control(self, token: int) -> bool:
        return self.id_to_piece(token) in self.controls

    def is_unknown(self, token: int) -> bool:
        return not self.id_to_piece(token)

    def get_score(self, token: int) -> float:
        """Earlier ids stand for more frequent pieces."""
        return -float(token)


def spelled(document: Mapping[str, Any], ids: Sequence[int]) -> list[str]:
    """The added tokens that have one of these ids."""
    added = field(dict(document), "added_tokens", list, [])
    return [
        each["content"]
        for each in added
        if isinstance(each, dict) and each.get("id") in ids and isinstance(each.get("content"), str)
    ]


def _controls(document: Mapping[str, Any], special: Sequence[str]) -> dict[str, Control]:
    """The control tokens by their spelling; ValueError where an added token is none."""
    found: dict[str, Control] = {}
    for each in field(dict(document), "added_tokens", list, []):
        entry = typed(each, dict, "an added token")
        content, token = field(entry, "content", str), field(entry, "id", int)
        if not 0 <= token < LARGEST_ID or not content:
            raise ValueError("an added token has no text or an id that no model has")
        if content in special or field(entry, "special", bool, False):
            sides = (field(entry, side, bool, False) for side in ("lstrip", "rstrip"))
            found[content] = Control(token, *sides)
    return found


def _built(document: Mapping[str, Any]) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "a tokenizer.json is read with the `tokenizers` package; install it "
            "(pip install 'puna[tokenizers]'), or put a tokenizer.model in its place"
        ) from None
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises nothing more exact
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"it is no tokenizer.json that `tokenizers` reads ({why})") from error
    built.encode_special_tokens = True
    return built


def _stages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps before the model, a sequence's one by one."""
    found = []
    for key, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        stage = field(dict(document), key, dict, {})
        for each in [stage, *field(stage, parts, list, [])]:
            found.append(typed(each, dict, key))
    return found


def _first_only(document: Mapping[str, Any]) -> bool:
    return any(stage.get("prepend_scheme") == "first" for stage in _stages(document))


def _never_first(document: Mapping[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(dict(document))
    for stage in _stages(found):
        if stage.get("prepend_scheme") == "first":
            stage["prepend_scheme"] = "never"
    return found
