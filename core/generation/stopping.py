"""Strings that end a text, wherever in its tokens they stand.

What counts is text: of several strings the one that is complete first ends it, and nothing of that
string is kept. A stream is cut as its text comes. Answers that are drawn side by side are looked at
every few tokens, and those drawn beyond the string are dropped: the outcome is the same.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from puna.core.text.tokenizer import Tokenizer

SLACK = 32  # tokens looked at beyond those that a string can fill: drawn since the last look


class Stops(NamedTuple):
    """The strings, and what it takes to read the answers to some prompts."""

    strings: tuple[str, ...]
    tokenizer: Tokenizer
    known: Sequence[list[int]]  # of each prompt the ids whose text goes on; none for a chat

    def text(self, number: int, ids: list[int]) -> str:
        """What was drawn after prompt `number`, up to the first string; after a text with the space
        between them."""
        text = self._whole(number, ids)
        return text if (end := first(text, self.strings)) is None else text[: end[0]]

    def found(self, number: int, ids: list[int]) -> bool:
        """Whether one of the last ids completes one of the strings. Many in a row that spell
        nothing may hide it: what is drawn until it is found does not count in the end."""
        reach = SLACK + max(len(string.encode()) for string in self.strings)  # a byte each at most
        near = (self.known[number][-1:] + ids)[-reach:]
        seen = first(self.tokenizer.decode(near), self.strings)
        return seen is not None and first(self._whole(number, ids), self.strings) is not None

    def length(self, number: int, ids: list[int]) -> int | None:
        """How many of the ids complete the first string; None where there is none."""
        if first(self._whole(number, ids), self.strings) is None:
            return None
        counts = range(len(ids) + 1)
        return bisect_left(
            counts, True,
            key=lambda count: first(self._whole(number, ids[:count]), self.strings) is not None,
        )  # fmt: skip

    def _whole(self, number: int, ids: list[int]) -> str:
        known = self.known[number]
        return self.tokenizer.decode(known + ids)[len(self.tokenizer.decode(known)) :]


def as_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several. Raises ValueError for what is no text, and for an empty one."""
    strings = tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop holds {string!r}; it must be a text that is not empty")
    return strings


def first(text: str, strings: Sequence[str]) -> tuple[int, int] | None:
    """(begin, end) of the string that is complete first, of two the longer; None without one."""
    ends = [(at + len(each), at) for each in strings if (at := text.find(each)) >= 0]
    if not ends:
        return None
    end, begin = min(ends)
    return begin, end


def streamed(pieces: Iterable[str], strings: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first string; what may be the beginning of one waits."""
    held = ""
    for piece in pieces:
        held += piece
        if (place := first(held, strings)) is not None:
            if place[0]:
                yield held[: place[0]]
            return
        kept = max(_begun(held, string) for string in strings)
        if text := held[: len(held) - kept]:
            yield text
        held = held[len(held) - kept :]
    if held:
        yield held


def _begun(text: str, string: str) -> int:
    """How many characters at the end of `text` may be the beginning of `string`."""
    most = min(len(text), len(string) - 1)
    return next((n for n in range(most, 0, -1) if string.startswith(text[-n:])), 0)
