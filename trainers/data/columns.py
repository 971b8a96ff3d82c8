"""What the columns of a user's file are called: a recipe's `[columns]`."""

from dataclasses import dataclass


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
    """A system message, where the rows have no messages of their own."""
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
