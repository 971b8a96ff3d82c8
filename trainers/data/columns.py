"""How a user's files are read: a recipe's `[columns]`, `[roles]` and `[ratings]`.

Every configuration that names such files has these options, and is handed to the readers.
"""

from dataclasses import dataclass, field
from typing import Literal

from puna.trainers.train.ranges import Options


@dataclass(frozen=True)
class Columns:
    """The names that the file gives to each column; an empty name: the file has no such column."""

    text: str = "text"
    """Text files: the text."""
    messages: str = "messages"
    """A list of messages."""
    prompt: str = "prompt"
    """One user message, or a list of messages."""
    system: str = ""
    """A system message, where a row's messages have none of their own."""
    input: str = ""
    """A text that follows the prompt after an empty line (Alpaca's input, Dolly's context)."""
    response: str = "response"
    """SFT: the answer to `prompt`."""
    chosen: str = "chosen"
    """The preferred answer, or the whole dialogue with it."""
    rejected: str = "rejected"
    """The other answer, or the whole dialogue with it."""
    a: str = ""
    """First of two answers; `rating` then says which of them is better."""
    b: str = ""
    """Second of two answers."""
    a_safe: str = ""
    """Whether answer a is safe."""
    b_safe: str = ""
    """Whether answer b is safe."""
    rating: str = "rating"
    """How much better the chosen answer is."""
    safety: str = "safety"
    """Preferences: which answers are safe. Prompts: whether it asks for something unsafe."""
    batch: str = "batch"
    """The week or round of a preference."""
    turns: str = "turns"
    """Ghost Attention: what the user says, a list of texts."""
    instruction: str = "instruction"
    """Ghost Attention: what is to be kept."""
    short: str = "short"
    """Ghost Attention: the instruction's short form."""
    preprompt: str = "preprompt"
    """Safety distillation: a text to stand before prompts."""
    category: str = "category"
    """Safety distillation: the kind of risk of a prompt or a pre-prompt."""


Roles = dict[str, str]  # the file's names -> ours
Ratings = dict[str, str]  # the file's values -> ours


@dataclass(kw_only=True)
class Reading(Options):
    """How rows are read."""

    columns: Columns = field(default_factory=Columns)
    """names of the files' columns; left out: ours, or those of a layout known by its columns"""
    on_error: Literal["stop", "skip"] = "stop"
    """a row that cannot be read: stop with its place, or count it among those that are skipped"""


@dataclass(kw_only=True)
class ReadingMessages(Reading):
    """How rows with messages are read."""

    roles: Roles = field(default_factory=dict)
    """what the files call a message's role: `"speaker 1" = "user"`"""


@dataclass(kw_only=True)
class ReadingComparisons(ReadingMessages):
    """How comparisons are read."""

    ratings: Ratings = field(default_factory=dict)
    """what the files' ratings and safety labels are called"""
