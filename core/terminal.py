"""All that Puna writes to a terminal, with what others wrote made visible.

A model's answer, a column's name, a file's name can hold sequences that a terminal obeys: they move
the cursor, rename the window, hide or turn around what stands there. Here they are shown as
escapes (`\\x1b`) and never sent. Nothing else prints; a test holds that.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

# C0 but for tab and line feed, DEL, C1, and what turns the direction of a text around or ends its
# line; and halves of characters, which no stream takes.
_OBEYED = [
    *(code for code in range(0x20) if code not in (0x09, 0x0A)),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)),
    *range(0xD800, 0xE000),
]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _OBEYED}


def shown(text: str) -> str:
    """`text` with everything that a terminal would obey as an escape."""
    return text.translate(_ESCAPES)


def say(text: object = "", *, end: str = "\n", error: bool = False) -> None:
    """Write `text`, shown, to stdout or stderr, at once; what the stream's encoding lacks becomes
    an escape, too."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    safe = shown(str(text)).encode(encoding, "backslashreplace").decode(encoding)
    print(safe, end=end, file=stream, flush=True)


def say_table(
    rows: Sequence[Sequence[str]],
    header: Sequence[str] = (),
    title: str | None = None,
    styles: Sequence[str] = (),
) -> None:
    """Write rows of cells as a table, each cell shown; `styles` has a colour for each row."""
    from rich.console import Console  # not before a table is wanted: it takes 0.1 s
    from rich.table import Table
    from rich.text import Text

    named = None if title is None else Text(shown(title))  # as text: brackets are no markup
    table = Table(*header, title=named) if header else Table(show_header=False, box=None)
    for number, row in enumerate(rows):
        style = styles[number] if styles else None
        table.add_row(*(Text(shown(cell)) for cell in row), style=style)
    Console().print(table)


class Outlasting:
    """A stream whose reader may go away (`| head`): what is written from then on is dropped."""

    def __init__(self, stream: TextIO | None):
        # Python has none where it was closed from the beginning (`>&-`)
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        """Also for what Python itself writes when it ends."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def outlasting() -> Iterator[None]:
    """Both streams outlast their readers until the block ends."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Outlasting(before[0]), Outlasting(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
