"""A tokenizer.json from a vocabulary: byte-level byte pairs, and SentencePiece's."""

from collections.abc import Mapping, Sequence
from typing import Any

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# How a text is cut before anything is joined, by llama.cpp's names.
CUTS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTES,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": LLAMA3},
                "behavior": "Isolated",
                "invert": False,
            },
            {**BYTES, "use_regex": False},
        ],
    },
}
Added = Mapping[int, tuple[str, bool]]  # id -> (spelling, whether it stands for no text)


def byte_pair_json(
    pieces: Sequence[str], merges: Sequence[str], added: Added, cut: str, bos: str | None
) -> dict[str, Any]:
    """Of a byte-level vocabulary with its merges, most urgent first. `cut` is a key of `CUTS`;
    ValueError for another. `bos` begins every text."""
    if cut not in CUTS:
        raise ValueError(
            f"its texts are cut in the way {cut[:40]!r}; Puna knows {', '.join(CUTS)}: take the "
            "folder that the file was made from"
        )
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": cut == "llama-bpe",
        "vocab": {piece: token for token, piece in enumerate(pieces)},
        "merges": list(merges),
    }
    return _document(model, None, CUTS[cut], dict(BYTES), added, bos, pieces)


def sentencepiece_json(
    pieces: Sequence[str],
    scores: Sequence[float],
    texts: Sequence[bool],
    added: Added,
    bos: str | None,
) -> dict[str, Any]:
    """Of a SentencePiece byte-pair vocabulary with Llama 2's settings: every text gets a space at
    its head. `texts` says which pieces stand for text."""
    unknown = next((piece for piece, special in added.values() if special and "unk" in piece), None)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece: token for token, piece in enumerate(pieces)},
        "merges": merges_of(
            {piece: n for n, piece in enumerate(pieces) if texts[n]}, scores
        ),
    }  # fmt: skip
    normalizer = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    }
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return _document(model, normalizer, None, decoder, added, bos, pieces)


def merges_of(ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Pairs of pieces to join, most urgent first; `ids` are of pieces of text, `scores` by id.

    SentencePiece joins the two neighbours whose union has the highest score (the leftmost among
    equals, as the spaces are); so every way to cut a piece in two pieces is a merge of its rank.
    """
    merges = []
    for piece, token in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append(((-scores[token], ids[left], ids[right]), f"{left} {right}"))
    return [merge for _, merge in sorted(merges)]


def beginning(bos: str, token: int) -> dict[str, Any]:
    """The step that puts BOS before every text, and before the second of a pair."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, second, b],
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }


def added_json(content: str, special: bool = True) -> dict[str, Any]:
    """A token that is found in a text before all others."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": special}


def _document(
    model: dict[str, Any],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    added: Added,
    bos: str | None,
    pieces: Sequence[str],
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, **added_json(*said)} for n, said in added.items()],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos is None else beginning(bos, pieces.index(bos)),
        "decoder": decoder,
        "model": model,
    }
