"""Guidelines as a page: the part of Markdown that guidelines need, and nothing that could act.

Headings, lists, paragraphs, **bold**, *emphasis* and `code`. Everything is escaped first, so that
markup in the file is shown and not obeyed; links and pictures stay as they are written.
"""

import html
import re
from itertools import groupby
from pathlib import Path

LARGEST = 1 << 20  # characters

SPANS = (
    (re.compile(r"`([^`\n]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"\*([^*\n]+)\*"), r"<em>\1</em>"),
)
ITEM = re.compile(r"\s*(?:[-*+]|(\d+)[.)])\s+(.*)")
HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")


def read_guidelines(path: Path) -> str:
    """The file as HTML; ValueError where it is no text."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; guidelines are a Markdown file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8, expected UTF-8 text") from error
    if len(text) > LARGEST:
        raise ValueError(f"{path} has {len(text):,} characters; guidelines are shorter")
    return rendered(text)


def rendered(text: str) -> str:
    """HTML of a Markdown text; nothing of the text's own markup is left."""
    return "\n".join(
        block
        for kind, lines in groupby(text.split("\n"), key=kind_of)
        for block in blocks(kind, list(lines))
    )


def kind_of(line: str) -> str:
    if not line.strip():
        return "blank"
    if HEADING.match(line):
        return "heading"
    item = ITEM.match(line)
    return "text" if item is None else "ol" if item[1] else "ul"


def blocks(kind: str, lines: list[str]) -> list[str]:
    """The elements that lines of one kind become."""
    if kind == "heading":  # the page has an h1 and an h2 above them
        found = [HEADING.match(line) for line in lines]
        levels = [(min(6, 2 + len(each[1])), spans(each[2])) for each in found if each]
        return [f"<h{level}>{text}</h{level}>" for level, text in levels]
    if kind in ("ul", "ol"):
        matches = [ITEM.match(line) for line in lines]
        items = "".join(f"<li>{spans(each[2])}</li>" for each in matches if each)
        return [f"<{kind}>{items}</{kind}>"]
    return [f"<p>{spans(' '.join(line.strip() for line in lines))}</p>"] if kind == "text" else []


def spans(text: str) -> str:
    """A line's text, escaped, with its bold, emphasis and code."""
    escaped = html.escape(text)
    for pattern, tag in SPANS:
        escaped = pattern.sub(tag, escaped)
    return escaped
