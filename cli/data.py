"""`puna data FILE`: what would be read of it, and one row as a model sees it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from puna.core.checkpoint.folder import open_source, tokenizer_path
from puna.core.documents import count_of
from puna.core.terminal import say, say_table
from puna.core.text.chat import encode_answer, encode_dialogue, encode_prompt, spelled
from puna.core.text.tokenizer import Tokenizer, stream_text
from puna.trainers.data.columns import ReadingComparisons
from puna.trainers.data.files import each_row, is_text, sources
from puna.trainers.data.layouts import KINDS, Kind, kind_of, layout_of
from puna.trainers.data.readers import (
    Skipped,
    read_dialogues,
    read_ghosts,
    read_preferences,
    read_preprompts,
    read_prompts,
    read_texts,
)
from puna.trainers.train.ranges import Count

LAID_OUT: dict[str, Kind] = {kind: kind for kind in KINDS}  # kinds that have layouts
MOST_SHOWN = 4000  # characters of one part of a row
WIDTH = 40  # of the longest bar
STYLES = {"context": "dim", "prompt": "dim", "rejected": "red"}  # of all else LEARNED
LEARNED = "green"
READERS: dict[str, Callable[..., tuple[list[Any], Skipped]]] = {
    "dialogues": read_dialogues,
    "preferences": read_preferences,
    "prompts": read_prompts,
    "texts": read_texts,
    "instructed": read_ghosts,
    "preprompts": read_preprompts,
}


@dataclass(kw_only=True)
class DataConfig(ReadingComparisons):
    """Show what would be read of data: its layout, rows and lengths, what is skipped and why, and
    one row as a model sees it, with its loss mask."""

    file: Path
    """file, folder, pattern or pipe (-)"""
    kind: Literal[
        "auto", "dialogues", "preferences", "prompts", "texts", "instructed", "preprompts"
    ] = "auto"
    """what it is read as, the last two by `puna gatt` and `puna distill`; auto: what the columns of
    its first row are"""
    model: Path | None = None
    """model folder, or a tokenizer.model: lengths are in its tokens, and rows that exceed a model's
    context are counted; left out: lengths are in characters"""
    row: Count = 1
    """which of the rows that can be used is shown"""


class Part(NamedTuple):
    """A stretch of a row: what it is there for, its text and its length."""

    label: str
    text: str
    size: int


def run(config: DataConfig) -> None:
    """Print it. Raises ValueError where nothing can be read, or there are fewer rows than `row`."""
    kind, layout = kind_and_layout(config)
    rows, skipped = READERS[kind](config.file, config)
    if config.row > len(rows):
        raise ValueError(f"row is {config.row} and there are {len(rows):,}; name one of them")
    tokenizer = None if config.model is None else Tokenizer(vocabulary_of(config.model))
    parts = parts_of if tokenizer is None else encoded_parts(tokenizer)
    unit = "characters" if tokenizer is None else "tokens"
    sizes = [length(kind, parts(kind, row)) for row in rows]
    too_long = count_too_long(config, rows, sizes, skipped)
    say_table(
        [
            ("data", str(config.file)),
            ("read as", f"{kind}: {layout}"),
            ("rows", f"{len(rows) - too_long:,}"),
            ("skipped", f"{sum(skipped.values()):,}"),
            (f"{unit} in all", f"{sum(sizes):,}"),
        ]
    )
    if skipped:
        say(str(skipped))
    say_table(histogram(sizes), (unit, "rows", ""), "How long the rows are")
    show(kind, parts(kind, rows[config.row - 1]), rows[config.row - 1], config.row)


def kind_and_layout(config: DataConfig) -> tuple[str, str]:
    """What the data is, and the name of its layout, by its first file's first row."""
    first = sources(config.file)[0]
    if is_text(first):
        if config.kind == "prompts":
            return "prompts", "one a line"
        if config.kind not in ("auto", "texts"):
            raise ValueError(f"{first.name} is one text, and no rows of {config.kind}")
        return "texts", "one document a file"
    wrong: ValueError | None = None
    for where, row in each_row(first):
        if isinstance(row, dict):
            kind = config.kind if config.kind != "auto" else kind_at(where, row, config)
            return kind, str(layout_of(LAID_OUT.get(kind, "others"), row, config))
        wrong = wrong or row
    raise wrong or ValueError(f"{first.name}: there is no row in it")


def kind_at(where: str, row: dict[str, Any], config: DataConfig) -> str:
    """What the row there is. Raises ValueError where it is nothing known."""
    if isinstance(row.get(config.columns.turns), list) and config.columns.messages not in row:
        return "instructed"
    if config.columns.preprompt in row:
        return "preprompts"
    try:
        return kind_of(row, config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def vocabulary_of(model: Path) -> Path:
    """The tokenizer of a model folder, or the file itself."""
    return tokenizer_path(model) if model.is_dir() else model


def parts_of(kind: str, row: Any) -> list[Part]:
    """A row in characters; of a comparison the prompt and both answers."""
    if kind == "texts":
        return [Part("learned", row, len(row))]
    if kind in ("instructed", "preprompts"):
        return [Part(name, text, len(text)) for name, text in told(kind, row)]
    sides = spelled(row.messages)
    if kind == "dialogues":
        return [Part(label(weight), text, len(text)) for text, weight in sides]
    prompt = "".join(text for text, _ in sides)
    found = [Part("prompt", prompt, len(prompt))]
    if kind == "preferences":
        answers = (("chosen", f" {row.chosen} </s>"), ("rejected", f" {row.rejected} </s>"))
        found += [Part(name, text, len(text)) for name, text in answers]
    return found


def told(kind: str, row: Any) -> list[tuple[str, str]]:
    """What a row of instructed dialogues or of pre-prompts says, each part by its name."""
    if kind == "preprompts":
        return [("preprompt", row.text), *([("category", row.category)] if row.category else [])]
    given = [("instruction", row.instruction), ("short", row.short)]
    return [(name, text) for name, text in given if text] + [("user", turn) for turn in row.turns]


def encoded_parts(tokenizer: Tokenizer) -> Callable[[str, Any], list[Part]]:
    """`parts_of` in a model's tokens: the text is that of the ids."""

    def part(name: str, ids: Sequence[int]) -> Part:
        return Part(name, written(tokenizer, ids), len(ids))

    def parts(kind: str, row: Any) -> list[Part]:
        if kind == "texts":
            return [part("learned", tokenizer.encode(row, bos=True, eos=True))]
        if kind in ("instructed", "preprompts"):
            return [part(name, tokenizer.encode(text)) for name, text in told(kind, row)]
        if kind == "dialogues":
            pairs = zip(*encode_dialogue(tokenizer, row.messages), strict=True)
            return [
                part(label(weight), [token for token, _ in some])
                for weight, some in groupby(pairs, key=lambda pair: pair[1])
            ]
        found = [part("prompt", encode_prompt(tokenizer, row.messages))]
        if kind == "preferences":
            found.append(part("chosen", encode_answer(tokenizer, row.chosen)))
            found.append(part("rejected", encode_answer(tokenizer, row.rejected)))
        return found

    return parts


def written(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, with BOS and EOS as they are called."""
    text = ""
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    for is_end, group in groupby(ids, key=lambda token: token in ends):
        some = list(group)
        spell = (
            map(tokenizer.piece, some) if is_end else stream_text(tokenizer, some, continued=True)
        )
        text += "".join(spell)
    return text


def label(weight: float) -> str:
    """What a message's weight in the loss means."""
    if weight in (0.0, 1.0):
        return "learned" if weight else "context"
    return f"learned, weight {weight:g}"


def length(kind: str, parts: Sequence[Part]) -> int:
    """Of a whole row; of a comparison that of the longer answer with its prompt."""
    sizes = [part.size for part in parts]
    return sizes[0] + max(sizes[1:]) if kind == "preferences" else sum(sizes)


def count_too_long(
    config: DataConfig, rows: Sequence[Any], sizes: Sequence[int], skipped: Skipped
) -> int:
    """Adds the rows that a model has no room for; returns how many they are."""
    if config.model is None or not config.model.is_dir():
        return 0
    context = open_source(config.model).config.context
    long = [
        row.where
        for row, size in zip(rows, sizes, strict=True)
        if size > context and hasattr(row, "where")  # texts are cut into rows
    ]
    if long:
        skipped.add(f"longer than the context of {context:,} tokens", long[0], len(long))
    return len(long)


def histogram(sizes: Sequence[int]) -> list[tuple[str, str, str]]:
    """(from and to, how many, a bar) for each doubling of the length."""
    counts: dict[int, int] = {}
    for size in sizes:
        counts[size.bit_length()] = counts.get(size.bit_length(), 0) + 1
    most = max(counts.values())
    return [
        (
            f"{(1 << bits) >> 1:,} to {(1 << bits) - 1:,}",
            f"{counts.get(bits, 0):,}",
            "█" * -(-WIDTH * counts.get(bits, 0) // most),
        )
        for bits in range(min(counts), max(counts) + 1)
    ]


def show(kind: str, parts: Sequence[Part], row: Any, number: int) -> None:
    """One row, part by part, what is learned in green."""
    where = f" ({row.where})" if getattr(row, "where", "") else ""
    cells = [(part.label, cut(part.text)) for part in parts]
    styles = [STYLES.get(part.label, LEARNED) for part in parts]
    say_table(cells, (kind, "text"), f"Row {number:,} as a model sees it{where}", styles)


def cut(text: str) -> str:
    """As much of a text as is shown."""
    more = len(text) - MOST_SHOWN
    return text if more <= 0 else f"{text[:MOST_SHOWN]}... and {count_of(more, 'character')} more"
