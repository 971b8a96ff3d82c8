"""Does a tokenizer.json give the ids of the SentencePiece model that it was made from?

What we write says byte pairs, a space before every text, nothing normalised. A model that was
trained otherwise (unigram, NFKC, spaces at the end of words, symbols of a user's own, ...) would
get other ids from it, and nothing would say so.
"""

from collections.abc import Iterator
from typing import Any

from puna.core.text.tokenizer import Tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# Each meets one way in which SentencePiece models differ.
TEXTS = (
    "",
    " ",
    "a",
    "  a  b ",
    "hello there, general",
    "tab\tand\nline\n\n end",
    "\N{LATIN SMALL LIGATURE FI} \N{CIRCLED DIGIT ONE} \N{FULLWIDTH LATIN CAPITAL LETTER A}",
    "e\N{COMBINING ACUTE ACCENT} Stra\N{LATIN SMALL LETTER SHARP S}e CASE",
    "\N{SLIGHTLY SMILING FACE} \N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587}",
    "\N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE}\N{IDEOGRAPHIC SPACE}x",
    "1234 5,678.90 00007",
    " " * 17 + "x" * 17 + "-" * 9,
    "[INST] <<SYS>>\nx\n<</SYS>>\n\ny [/INST]",
)
SPREAD = 400  # pieces of the vocabulary that are tried as texts, besides those that score 0


def difference(document: dict[str, Any], tokenizer: Tokenizer) -> str | None:
    """The first text that gets other ids from `document`, a tokenizer.json, than from the
    SentencePiece model; None where all of a probe set get the same."""
    model = document["model"]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(model["merges"])}
    for text in _probes(tokenizer):
        if _ids(text, model["vocab"], ranks) != tokenizer.encode(text):
            return text
    return None


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    yield from TEXTS
    step = max(1, tokenizer.pieces // SPREAD)
    for token in range(tokenizer.pieces):
        # A user's own symbols have a score of 0 and are taken before anything is joined.
        if tokenizer.is_text(token) and (token % step == 0 or tokenizer.piece_score(token) == 0):
            piece = tokenizer.piece(token).replace(SPACE, " ")
            yield f"a{piece}b {piece}"


def _ids(text: str, vocab: dict[str, int], ranks: dict[tuple[str, ...], int]) -> list[int]:
    """The ids of `text` by the vocabulary and the ranked merges: what readers of the tokenizer.json
    that we write do, as far as a probe needs it."""
    parts = list((SPACE + text if text else text).replace(" ", SPACE))
    while len(parts) > 1:
        pairs = zip(parts[:-1], parts[1:], strict=True)
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        found = [vocab.get(part) or 0]
        if part not in vocab:
            found = [vocab.get(f"<0x{byte:02X}>", 0) for byte in part.encode()]
        if not all(found):  # no bytes either: unknown, once for several in a row
            found = [0] if ids[-1:] != [0] else []
        ids += found
    return ids
