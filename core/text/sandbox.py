"""jinja2's sandbox for the templates that others wrote, with bounds on what they may write.

jinja2 keeps a template from Python's insides; that it repeats or doubles a text until the memory
is full is refused here.
"""

from collections.abc import Iterable
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

LARGEST_TEXT = 1 << 24  # characters that a template may hold or write
LARGEST_RANGE = 10_000
# Filters and methods that make long texts of short ones.
WIDENING = {"center", "indent", "format", "xmlattr", "pprint", "urlize", "wordwrap"}
METHODS = {"center", "format", "format_map", "ljust", "rjust", "zfill", "expandtabs"}


def _fits(length: int) -> None:
    if length > LARGEST_TEXT:
        raise SecurityError("it writes too long a text")


def joined(parts: Iterable[str]) -> str:
    """The parts as one text; SecurityError where it is too long."""
    held, length = [], 0
    for part in parts:
        held.append(str(part))
        length += len(held[-1])
        _fits(length)
    return "".join(held)


def replaced(text: Any, old: str, new: str, count: int = -1) -> str:
    """`str.replace`, bounded."""
    text = str(text)
    _fits(len(text) + max(0, len(new) - len(old)) * text.count(old))
    return text.replace(old, new, count)


class _Generator(CodeGenerator):
    """Writes the operator `~` as a call of `joined`."""

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment as transformers' is, for chat templates."""

    code_generator_class = _Generator
    concat = staticmethod(joined)
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.globals |= {"raise_exception": _refuse, "range": _numbers}
        for name in WIDENING:
            self.filters.pop(name, None)
        self.filters["replace"] = replaced

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _fits(len(left) + len(right))
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if hasattr(some, "__len__") and isinstance(times, int):
                    _fits(len(some) * times)
        elif operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator}")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and getattr(__obj, "__name__", "") == "replace":
            return replaced(owner, *args)
        return super().call(__context, __obj, *args, **kwargs)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _numbers(*limits: int) -> range:
    found = range(*limits)
    if len(found) > LARGEST_RANGE:
        raise SecurityError("it counts too far")
    return found
