"""Layouts of public data sets, known by their columns and always said: "read as SHP".

Most are nothing but names, what a recipe's [columns] and [ratings] would say; the others are first
turned into rows of ours (`unfolding`). What a recipe maps comes first, then our own layout.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Literal, NamedTuple

from puna.core.documents import listed
from puna.trainers.data.cells import Row
from puna.trainers.data.columns import Columns, Ratings, Reading
from puna.trainers.data.files import Rows
from puna.trainers.data.mistaken import rows_inside
from puna.trainers.data.unfolding import (
    beginnings,
    common_beginning,
    compared_by_annotators,
    compared_neighbours,
    is_common_beginning,
    pairs_of_ranking,
    pairs_of_trees,
    prompts_of_ranking,
    threads,
    whole_trees,
)

Kind = Literal["texts", "dialogues", "answered", "preferences", "prompts", "others"]
KINDS: tuple[Kind, ...] = ("preferences", "dialogues", "prompts", "texts")
OURS = Columns()


class Layout(NamedTuple):
    """How rows with the columns `needs` are read."""

    name: str
    needs: tuple[str, ...] = ()
    columns: Columns = OURS
    ratings: Mapping[str, str] = {}
    unfold: Callable[[Rows], Rows] | None = None
    """our rows of the file's"""
    fits: Callable[[Row], bool] | None = None
    """what else a row must be"""

    def is_of(self, row: Row) -> bool:
        found = all(row.get(name) is not None for name in self.needs)
        return found and (self.fits is None or self.fits(row))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.needs)})" if self.needs else self.name


OWN = Layout("Puna's own layout")
MAPPED = "what [columns] says"

CONVERSATIONS = Layout(
    "ShareGPT", ("conversations",), Columns(messages="conversations", system="system")
)
ALPACA = Layout(
    "Alpaca",
    ("instruction", "output"),
    Columns(prompt="instruction", input="input", response="output", system="system"),
)
DOLLY = Layout("Dolly", ("instruction", "response"), Columns(prompt="instruction", input="context"))
COMPLETION = Layout("TRL's prompt and completion", ("prompt", "completion"),
                    Columns(response="completion"))  # fmt: skip
TREE_ROWS = ("message_id", "text", "role")
TREES = ("message_tree_id", "prompt")


def trees(turned: Callable[[Rows], Rows]) -> list[Layout]:
    """OASST, a message a row or a tree a row, and what it is turned into."""
    return [
        Layout("OASST trees", TREES, unfold=lambda rows: turned(whole_trees(rows)),
               fits=lambda row: isinstance(row["prompt"], dict)),
        Layout("OASST", TREE_ROWS, unfold=turned),
    ]  # fmt: skip


RANKING = ("prompt", "answers")
ULTRAFEEDBACK = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
STRENGTHS = {
    f"{sign}{strength}": f"{side} {level}"
    for sign, side in (("-", "a"), ("", "b"))
    for strength, level in ((1, "slightly_better"), (2, "better"), (3, "significantly_better"))
}

FIRST: dict[str, list[Layout]] = {  # looked for before our own, whose columns they have, too
    "preferences": [
        Layout("UltraFeedback, binarized", ULTRAFEEDBACK, Columns(messages="", prompt="")),
        Layout("TRL's chosen and rejected, whose common beginning is the prompt",
               ("chosen", "rejected"), unfold=common_beginning, fits=is_common_beginning),
    ],
    "prompts": [
        Layout("UltraFeedback, binarized", ULTRAFEEDBACK, Columns(messages="")),
        Layout("a ranking", RANKING, unfold=prompts_of_ranking),
        *trees(beginnings),
    ],
    "dialogues": trees(threads),
    "answered": trees(threads),
}  # fmt: skip
THEN: dict[str, list[Layout]] = {
    "dialogues": [CONVERSATIONS, ALPACA, DOLLY, COMPLETION],
    "answered": [CONVERSATIONS, ALPACA, DOLLY, COMPLETION],
    "prompts": [
        CONVERSATIONS,
        Layout("SHP", ("history",), Columns(prompt="history")),
        Layout("Alpaca", ("instruction", "input"), ALPACA.columns),
        Layout("Dolly", ("instruction",), DOLLY.columns),
    ],
    "preferences": [
        Layout(
            "SHP",
            ("history", "human_ref_A", "human_ref_B", "labels"),
            Columns(prompt="history", a="human_ref_A", b="human_ref_B", rating="labels"),
            {"1": "a", "0": "b"},
        ),
        Layout(
            "PKU-SafeRLHF",
            ("prompt", "response_0", "response_1", "better_response_id"),
            Columns(
                a="response_0", b="response_1", rating="better_response_id",
                a_safe="is_response_0_safe", b_safe="is_response_1_safe",
            ),
            {"0": "a", "1": "b"},
        ),
        Layout(
            "HelpSteer2's preferences",
            ("prompt", "response_1", "response_2", "preference_strength"),
            Columns(a="response_1", b="response_2", rating="preference_strength"),
            STRENGTHS | {"0": "tie"},
        ),
        Layout(
            "HelpSteer2, neighbours compared by helpfulness",
            ("prompt", "response", "helpfulness"),
            Columns(a="a", b="b", rating="verdict"),
            unfold=compared_neighbours,
        ),
        Layout(
            "PandaLM, by the majority of its annotators",
            ("instruction", "response1", "response2", "annotator1"),
            Columns(
                prompt="instruction", input="input", a="response1", b="response2", rating="verdict"
            ),
            unfold=compared_by_annotators,
        ),
        Layout("a ranking, every two answers compared", RANKING, unfold=pairs_of_ranking),
        *trees(pairs_of_trees),
    ],
}  # fmt: skip


def layout_of(kind: Kind, row: Row, how: Reading) -> Layout:
    """How the rows of a file are read, of which `row` is the first."""
    mapped = Layout(MAPPED, columns=how.columns)
    if how.columns != OURS and has_columns(kind, row, how.columns):
        return mapped
    named = [layout for layout in FIRST.get(kind, []) if layout.is_of(row)]
    own = [OWN] if has_columns(kind, row, OURS) else []
    others = [layout for layout in THEN.get(kind, []) if layout.is_of(row)]
    return [*named, *own, *others, mapped if how.columns != OURS else OWN][0]


def is_said(layout: Layout, how: Reading) -> bool:
    """Whether a layout is another one than is expected."""
    if layout is OWN:
        return how.columns != OURS
    return layout.name != MAPPED


def has_columns(kind: Kind, row: Row, columns: Columns) -> bool:
    """Whether a row has what a kind of row must have, under these names."""
    sets: dict[str, list[tuple[str, ...]]] = {
        "texts": [(columns.text,)],
        "dialogues": [(columns.messages,), (columns.prompt, columns.response)],
        "answered": [
            (columns.messages,), (columns.prompt, columns.response), ("tokens", "answer"),
        ],
        "preferences": [
            (columns.a, columns.b) if columns.a or columns.b else (columns.chosen, columns.rejected)
        ],
        "prompts": [(columns.messages,), (columns.prompt,)],
        "others": [()],
    }  # fmt: skip
    return any(all(name and row.get(name) is not None for name in names) for names in sets[kind])


def kind_of(row: Row, how: Reading) -> Kind:
    """What a row is most probably meant for. Raises ValueError where it is nothing known."""
    for kind in KINDS:
        layout = layout_of(kind, row, how)
        if layout.needs or has_columns(kind, row, layout.columns):
            messages = row.get(layout.columns.messages)
            is_open = isinstance(messages, list) and messages and _is_asked(messages[-1])
            return "prompts" if kind == "dialogues" and is_open else kind
    columns = listed(row) or "none"
    raise ValueError(
        f"the row has the columns {columns}, which no layout has; name the file's own in "
        "[columns], or say with --kind what it is" + rows_inside(row)
    )


def _is_asked(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"


def read_as(kind: Kind, rows: Rows, how: Reading) -> tuple[Layout, Ratings, Rows]:
    """(the layout of the first row, what its ratings are called, the rows in our terms)."""
    before: list[tuple[str, Any]] = []
    for each in rows:
        before.append(each)
        if isinstance(each[1], Mapping):
            break
    first = before[-1][1] if before and isinstance(before[-1][1], Mapping) else {}
    layout = layout_of(kind, first, how) if first else OWN
    whole: Iterable[tuple[str, Any]] = chain(before, rows)
    turned = layout.unfold(iter(whole)) if layout.unfold else iter(whole)
    return layout, {**layout.ratings, **getattr(how, "ratings", {})}, turned
