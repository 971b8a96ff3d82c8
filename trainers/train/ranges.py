"""What a number of a configuration may be: said beside the field, enforced when one is made.

    @dataclass(kw_only=True)
    class SFTConfig(Options):
        batch: Annotated[int, AtLeast(1)] = 64

The command line, a recipe and Python all end in `Options.__post_init__`, so that nothing is read,
sampled or trained with a number that cannot be. A subclass that declares a field anew keeps the
field's ranges unless it states others. `Rate | None` and `list[Rate]` are what they look like.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from tyro import MISSING

from puna.trainers.train.paths import as_paths, refuse_own_input
from puna.trainers.train.values import convert


@dataclass(frozen=True)
class Range:
    """A condition on a number; as text, how to say it. NaN is in none of them."""

    limit: float

    def holds(self, value: float) -> bool:
        raise NotImplementedError


class AtLeast(Range):
    def holds(self, value: float) -> bool:
        return value >= self.limit

    def __str__(self) -> str:
        return f"it must be at least {self.limit}" if self.limit else "it cannot be negative"


class Above(Range):
    def holds(self, value: float) -> bool:
        return value > self.limit

    def __str__(self) -> str:
        return f"it must be above {self.limit}"


class AtMost(Range):
    def holds(self, value: float) -> bool:
        return value <= self.limit

    def __str__(self) -> str:
        return f"it must be at most {self.limit}"


class Below(Range):
    def holds(self, value: float) -> bool:
        return value < self.limit

    def __str__(self) -> str:
        return f"it must be below {self.limit}"


class ZeroOrAtLeast(AtLeast):
    def holds(self, value: float) -> bool:
        return value == 0 or super().holds(value)

    def __str__(self) -> str:
        return f"it must be 0 or at least {self.limit}"


@dataclass(frozen=True)
class ShareOf(Below):
    """From 0 to below 1, of `whole`."""

    limit: float = 1.0
    whole: str = "the data"

    def holds(self, value: float) -> bool:
        return 0 <= value < self.limit

    def __str__(self) -> str:
        return f"it is a share of {self.whole}, from 0 to below {self.limit:g}"


LARGEST = AtMost(2**31 - 1)  # of every number whose own ranges have no upper end

Count = Annotated[int, AtLeast(1)]
Batch = Annotated[int, AtLeast(1), AtMost(2**20)]  # of what is in memory at once
CountOrZero = Annotated[int, AtLeast(0)]  # where 0 has a meaning of its own
Seed = Annotated[int, AtLeast(0), AtMost(2**63 - 1)]
Rate = Annotated[float, Above(0)]
Weight = Annotated[float, AtLeast(0)]
Share = Annotated[float, AtLeast(0), AtMost(1)]
# Outside of these bounds the tempered logits leave fp32, or every token is as likely as another.
Temperature = Annotated[float, Above(0), AtLeast(0.01), AtMost(1000)]
TemperatureOrGreedy = Annotated[float, AtLeast(0), ZeroOrAtLeast(0.01), AtMost(1000)]


_drafting: ContextVar[bool] = ContextVar("drafting", default=False)


@contextmanager
def drafts() -> Iterator[None]:
    """Options made inside are not checked yet: a flag may still replace what a recipe says."""
    token = _drafting.set(True)
    try:
        yield
    finally:
        _drafting.reset(token)


class Options:
    """The base of every configuration: values are of their fields' types (paths may be given as
    text), choices are among those that there are, and numbers are in range.

    Raises ValueError, one sentence, for what cannot be.
    """

    def __post_init__(self) -> None:
        as_typed(self)
        if not _drafting.get():
            enforce(self)

    def check(self) -> None:
        """ValueError where options do not fit each other: what no range can say. Called after the
        ranges were found to hold, once every option has a value."""


def as_typed(options: Options) -> None:
    """Every field as its type says; one that still has no value is passed over."""
    as_paths(options)
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name, MISSING)
        if value is not MISSING:
            setattr(options, name, convert(hint, value, name))


def enforce(options: Options) -> None:
    """The types and ranges of all fields, then the class's own `check`: when one is made, and again
    when it is used, since attributes can be set."""
    as_typed(options)
    check_ranges(options)
    if all(value is not MISSING for value in vars(options).values()):
        refuse_own_input(options)
        options.check()


def check_ranges(options: Options) -> None:
    """ValueError for the first number that its field's ranges do not allow; a field that still
    has no value is passed over."""
    cls: type = type(options)
    stated = ranges_of(cls)
    for name, value in vars(options).items():
        if isinstance(value, Options):
            enforce(value)
        for number in numbers_in(value):
            if (reason := problem(number, stated.get(name, ()))) is not None:
                raise ValueError(f"{name} is {number}; {reason}")


def problem(number: float, stated: tuple[Range, ...]) -> str | None:
    """Why a number cannot be, as the second half of a sentence."""
    if not math.isfinite(number):
        return "it must be a finite number"
    has_end = any(isinstance(each, (AtMost, Below)) for each in stated)
    ranges = stated if has_end else (*stated, LARGEST)
    return next((str(each) for each in ranges if not each.holds(number)), None)


@cache
def ranges_of(cls: type) -> dict[str, tuple[Range, ...]]:
    """The ranges stated beside the fields of `cls` and of its bases, the nearest ones first."""
    found: dict[str, tuple[Range, ...]] = {}
    for base in reversed(cls.__mro__):
        for name, hint in inspect.get_annotations(base).items():
            if stated := stated_in(hint):
                found[name] = stated
    return found


def stated_in(hint: Any) -> tuple[Range, ...]:
    """The ranges in a field's type, be they of the whole, of what may be None, or of a list's."""
    metadata = getattr(hint, "__metadata__", ())
    own = tuple(each for each in metadata if isinstance(each, Range))
    return own or tuple(each for part in get_args(hint) for each in stated_in(part))


def numbers_in(value: Any) -> list[float]:
    """The numbers of a field's value: itself, or those of a list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
