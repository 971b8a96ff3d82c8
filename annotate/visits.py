"""One request by one person, and the pages that answer it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from puna.annotate.supply import Supply
from puna.trainers.annotations.store import Store

HERE = Path(__file__).parent
Form = Mapping[str, str]


@dataclass(frozen=True)
class Desk:
    """What every request is answered with."""

    store: Store
    guidelines: Mapping[str, str]  # HTML by kind
    supply: Supply | None = None  # None: nothing is sampled, what waits in the file is served
    turns: int = 1
    named: bool = False  # people were named and come with a token each


@dataclass(frozen=True)
class Visit:
    """One request by one person."""

    desk: Desk
    request: Request
    form: Form
    who: int
    is_owner: bool

    def page(self, name: str, status: int = 200, **values: Any) -> Response:
        """A page from its template."""
        known = {"is_owner": self.is_owner, "can_ask": self.desk.supply is not None}
        return render(name, status, **known, **values)

    def prod(self) -> None:
        """The thread that samples looks at once whether more is needed."""
        if self.desk.supply is not None:
            self.desk.supply.background.wake.set()


def render(name: str, status: int = 200, **values: Any) -> Response:
    """A page from its template."""
    given = {"is_owner": False, "can_ask": False, **values}
    return HTMLResponse(pages().get_template(name).render(given), status)


@cache
def pages() -> Environment:
    """Templates in which every value is text: markup in it is shown and not obeyed."""
    found = Environment(
        loader=FileSystemLoader(HERE / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["static"] = static
    found.filters["spaced"] = lambda name: str(name).replace("_", " ")
    found.filters["percent"] = lambda share: f"{share:.0%}"
    return found


@cache
def static(name: str) -> str:
    """The address of a file beside the pages, another one when the file is another."""
    contents = (HERE / "static" / name).read_bytes()
    return f"/static/{name}?{hashlib.sha256(contents).hexdigest()[:12]}"


def to(place: str) -> RedirectResponse:
    """Go on with a GET, so that a reload sends nothing again."""
    return RedirectResponse(place, status_code=303)


def sentence(error: Exception) -> str:
    """An error's text as a sentence of a page."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
