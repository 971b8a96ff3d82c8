"""What a conversation's earlier calls have computed, so that each call runs its new tokens only."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from puna.core.config import ModelConfig
from puna.core.native.engine import Engine
from puna.core.native.session import Session

Name = tuple[int, int]
"""A conversation: its number among the prompts, and among the samples of one prompt"""


class Memory:
    """Keys and values of conversations, kept by whoever calls `generate` or `stream` again.

    A conversation is known by the numbers of its prompt and sample. Of its next prompt what stands
    in the cache is not run again, up to the first token that differs; the answers are those
    without a memory, but for the rounding of last bits. It is the native engine's: elsewhere the
    whole prompt is run. For one call at a time: a call that goes on after another has begun, in
    another thread or as a stream that is half read, raises RuntimeError.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turn = 0  # of the call that began last
        self._engine: Engine | None = None
        self._session: Session | None = None
        self._room = 0
        self._slots: dict[Name, int] = {}
        self._held: list[list[int]] = []  # by slot: the tokens that stand in it
        self._asked: list[list[int]] = []  # by slot: the prompt that was given to it last
        self._names: list[Name | None] = []  # by slot: whose they are

    @property
    def slots(self) -> int:
        return len(self._held)

    def begin(self) -> int:
        """The turn of a call that begins now; those before it are over."""
        with self._lock:
            self._turn += 1
            return self._turn

    @contextmanager
    def during(self, turn: int) -> Iterator[None]:
        """A step of the call whose `turn` it is; RuntimeError where another has begun since."""
        with self._lock:
            if turn != self._turn:
                raise RuntimeError(
                    "another call has taken this memory before the call was done; read a stream "
                    "to its end first, and give each thread a Memory of its own"
                )
            yield

    def session(self, engine: Engine, slots: int, longest: int) -> Session:
        """A session with room for `slots` rows of `longest` tokens. It forgets what it held where
        that is more than it has, or the weights are others; so it makes room for twice the tokens.
        """
        kept = self._session
        if kept is None or engine is not self._engine:
            kept, self._session, self._room = engine.new_session(), None, 0
        if slots > self.slots or longest > self._room:
            slots, room = max(slots, self.slots), ample(engine.config, longest)
            kept.reserve(slots, room)
            self._room, self._slots = room, {}
            self._held, self._names = [[] for _ in range(slots)], [None] * slots
            self._asked = [[] for _ in range(slots)]
        self._engine, self._session = engine, kept
        return kept

    def place(self, name: Name, prompt: list[int], free: list[int]) -> tuple[int, int]:
        """Take one of the `free` slots for a conversation, its own where it has one: (slot, how
        many of the prompt's tokens stand in it, its last one never)."""
        own = self._slots.get(name)
        if own not in free:
            own = next((slot for slot in free if self._names[slot] is None), free[-1])
            former = self._names[own]
            if former is not None and self._slots.get(former) == own:  # else it is named twice
                del self._slots[former]
            self._held[own] = []
        free.remove(own)
        self._slots[name], self._names[own] = own, name
        self._asked[own] = prompt
        known = shared(self._held[own], prompt[:-1])
        del self._held[own][known:]
        return own, known

    def keep(self, name: Name, tokens: Sequence[int]) -> None:
        """Note the tokens of a conversation that have been run, from its beginning. Of two prompts
        of one name only the one whose slot it is counts."""
        slot = self._slots.get(name)
        if slot is not None and shared(self._asked[slot], tokens) == len(self._asked[slot]):
            self._held[slot] = list(tokens)


def ample(config: ModelConfig, longest: int) -> int:
    """Tokens to make room for, of a conversation that has come to `longest` and goes on."""
    return min(config.context, 2 * longest)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
