"""Flags that are given more than once."""

import dataclasses
import typing
from collections.abc import Sequence

SEVERAL = (list, tuple, dict)


def joined(cls: type, arguments: Sequence[str]) -> list[str]:
    """`--data a --data b` as `--data a b`: a list takes all that its flag is given, wherever.

    A command line's parser would take the last and drop the others without a word.
    """
    several = several_valued(cls)
    groups: list[list[str]] = []  # each a flag with its values, in order
    place: dict[str, list[str]] = {}
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not argument.startswith("--"):
            groups = groups or [[]]
            groups[-1].append(argument)
        elif name not in several:
            groups.append([argument])
        else:
            group = place.setdefault(name, [flag])
            groups = [each for each in groups if each is not group] + [group]
            group += [value] if equals else []
    return [argument for group in groups for argument in group]


def in_front(flag: str, arguments: Sequence[str]) -> list[str]:
    """The value that follows `flag`, where it is given, before all others: `--gpus 8 --recipe r`
    as `r --gpus 8`."""
    split = [part for each in arguments for part in parted(flag, each)]
    if flag not in split[:-1]:
        return list(arguments)
    place = split.index(flag)
    return [split[place + 1], *split[:place], *split[place + 2 :]]


def parted(flag: str, argument: str) -> list[str]:
    """`flag=value` as two arguments."""
    return [flag, argument[len(flag) + 1 :]] if argument.startswith(f"{flag}=") else [argument]


def several_valued(cls: type, prefix: str = "") -> set[str]:
    """The flags of a dataclass, without dashes, that take any number of values."""
    found = set()
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= several_valued(typing.cast(type, hint), f"{prefix}{name}.")
        elif any(typing.get_origin(each) in SEVERAL for each in (hint, *typing.get_args(hint))):
            found.add(prefix + name)
    return found
