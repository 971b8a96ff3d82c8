"""The ids of a long text, encoded piece by piece: in one call SentencePiece and Python's numbers
take some forty bytes for each byte of it.

A text can be cut where no entry of the vocabulary reaches across: before a space or a line feed.
SentencePiece sets a space before whatever it encodes, so at a space that one is left out, and at a
line feed the id that comes of it. Not every vocabulary is so (there are some that join spaces, or
have entries of several words): whether one is, its entries and a few probes tell; where not, the
text is encoded whole.
"""

import re
from collections.abc import Iterator

import numpy as np

from puna.core.text.tokenizer import Tokenizer

PIECE = 1 << 18  # characters
AT_ONCE = 8  # pieces, on all threads
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes one
ACROSS = {" ": re.compile(f"[^{SPACE}]{SPACE}"), "\n": re.compile("(?s).\n|\n.")}
PROBES = (
    ("a", "b"), ("a b.", " c"), ("x\n", "y"), ("\u65e5\u672c", "\u8a9e"), ("1", "2 3"),
    ("a\n\n", "  b"), ("\t", "\u00e9"), ("A", "\n b"), ("\ufb01", "\uff41"), ("<s>", "</s>"),
)  # fmt: skip


def ids_in_pieces(
    tokenizer: Tokenizer, text: str, dtype: type[np.unsignedinteger]
) -> Iterator[np.ndarray]:
    """The ids of `text`, in order, in arrays of one dimension: those of `tokenizer.encode`."""
    pieces = cut(text, signs(tokenizer))
    while some := [piece for _, piece in zip(range(AT_ONCE), pieces, strict=False)]:
        for ids, (_, left_out) in zip(
            tokenizer.encode_all([piece for piece, _ in some]), some, strict=True
        ):
            yield np.asarray(ids[left_out:], dtype)


def cut(text: str, at: str) -> Iterator[tuple[str, int]]:
    """(a piece, how many of its first ids are none of the text's), end to end."""
    begin, left_out = 0, 0
    while at:
        found = [place for sign in at if (place := text.find(sign, begin + PIECE)) >= 0]
        place = min(found, default=len(text))
        while text[place - 1 : place] == " " and place < len(text):  # not inside of spaces
            place -= 1
        if place <= begin or place + 1 >= len(text):
            break
        yield text[begin:place], left_out
        is_space = text[place] == " "
        begin, left_out = place + is_space, int(not is_space)
    yield text[begin:], left_out


def signs(tokenizer: Tokenizer) -> str:
    """The signs, of space and line feed, before which a text can be cut."""
    entries = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    return "".join(
        sign
        for sign, across in ACROSS.items()
        if not any(across.search(entry) for entry in entries) and holds(tokenizer, sign)
    )


def holds(tokenizer: Tokenizer, sign: str) -> bool:
    """Whether the probes, cut before `sign`, have the ids that they have whole."""
    after, left_out = ("", 0) if sign == " " else (sign, 1)
    return all(
        tokenizer.encode(left + sign + right)
        == tokenizer.encode(left) + tokenizer.encode(after + right)[left_out:]
        for left, right in PROBES
    )
