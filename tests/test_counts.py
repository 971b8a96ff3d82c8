"""A count of one has its noun in the singular, wherever a number stands before a noun.
Run: python -m pytest tests/test_counts.py -q"""

import ast
import re
from pathlib import Path

from test_layers import ROOT, parsed, sources

from puna.core.documents import count_of

ROOMS = ("core", "trainers", "demo", "annotate", "cli")
# Limits and sizes that are never one, and what is no number.
NEVER_ONE = {
    "LARGEST_POST", "LONGEST", "PROMPT", "context", "given.context", "k.shape[1]", "layout.tp",
    "len(found)", "len(prompt)", "len(text)", "length", "longest", "many", "most",
    "parallel.world_size()", "ranks", "row_tokens", "self._context", "self.config.context",
    "self.context", "size", "last[-1]['answer_tokens']",
    "TOKEN", "as_name(name)", "kinds[1]", "path", "self.url", "wins",
}  # fmt: skip


def test_one_and_many():
    assert count_of(1, "own row") == "1 own row"
    assert count_of(0, "row") == "0 rows" and count_of(2000, "row") == "2,000 rows"


def nouns() -> set[str]:
    """Every noun that is counted somewhere by `count_of`."""
    calls = (
        node
        for room in ROOMS
        for path in sources(room)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "count_of"
    )
    named = (call.args[1] for call in calls)
    return {n.value.split()[-1] for n in named if isinstance(n, ast.Constant)}


def bare(path: Path, known: str) -> list[str]:
    """Numbers in f-strings before the plural of a known noun, at most one word between."""
    pattern = re.compile(rf" (?:[a-z-]+ )?(?:{known})s\b")
    texts = (n for n in ast.walk(parsed(path)) if isinstance(n, ast.JoinedStr))
    return [
        f"{path.relative_to(ROOT)}:{number.lineno}: {{{ast.unparse(number.value)}}}{after.value}"
        for text in texts
        for number, after in zip(text.values, text.values[1:], strict=False)
        if isinstance(number, ast.FormattedValue) and isinstance(after, ast.Constant)
        if pattern.match(str(after.value)) and ast.unparse(number.value) not in NEVER_ONE
    ]


def test_every_noun_that_is_counted_is_counted_so_everywhere():
    known = "|".join(sorted(nouns()))
    assert {"row", "dialogue", "prompt", "pair", "token"} <= nouns()
    assert not [each for room in ROOMS for path in sources(room) for each in bare(path, known)]
