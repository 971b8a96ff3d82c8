"""All that Puna writes to a terminal, with what others wrote made visible.

A model's answer, a column's name, a file's name can hold sequences that a terminal obeys: they move
the cursor, rename the window, hide or turn around what stands there. Here they are shown as
escapes (`\\x1b`) and never sent. Nothing else prints; a test holds that.
"""

import sys
from collections.abc import Sequence

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
