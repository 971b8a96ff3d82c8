"""Which options may change when a run is continued: said beside the field.

Most options decide the numbers. A run is continued with the same ones, or `--amend` changes them
from there on. Two kinds are marked:

    save_every: Annotated[Count, FREE] = 500       decides no number: any value is taken
    size: Annotated[str, FIXED] = "mini"           decided how the run began: nothing can change it

Files are a kind of their own: they are compared by what is in them (`inputs`), not by their names;
one that grows while the run goes on is marked.
A subclass that declares a field anew keeps the field's kind.
"""

import inspect
from enum import Enum
from functools import cache
from typing import Any, get_args

from puna.trainers.train.paths import path_fields


class Kind(Enum):
    """What it means for a run that is continued that an option has another value."""

    FREE = "taken"
    AMENDED = "taken with --amend, from there on"
    FIXED = "refused"
    FILES = "compared by what is in them"


FREE, FIXED = Kind.FREE, Kind.FIXED


@cache
def kinds_of(cls: type) -> dict[str, Kind]:
    """Field name -> kind, for every field of `cls` and of its bases that is not AMENDED."""
    found: dict[str, Kind] = {}
    for base in reversed(cls.__mro__):
        for name, hint in inspect.get_annotations(base).items():
            if (kind := marked(hint)) is not None:
                found[name] = kind
    return dict.fromkeys(path_fields(cls), Kind.FILES) | found


def marked(hint: Any) -> Kind | None:
    """The kind in a field's type, be it of the whole or of what may be None."""
    own = (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Kind))
    inner = (marked(part) for part in get_args(hint))
    return next(own, None) or next((kind for kind in inner if kind), None)
