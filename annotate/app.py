"""The page as a web application: every request is answered from the file of comparisons.

Nothing is kept in memory between two requests, so that a server that is killed and started again
goes on where it was.
"""

from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import parse_qsl

from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from puna.annotate import charts, dialogues, statistics
from puna.annotate.guard import App, guarded
from puna.annotate.visits import HERE, Desk, Form, Visit, render, sentence, to
from puna.core.errors import UserError
from puna.trainers.annotations.items import hand_out, is_awaited, progress_of
from puna.trainers.annotations.people import by_token, person
from puna.trainers.annotations.verdicts import SAFE, skip, submit, undo
from puna.trainers.data.formats import RATINGS

LARGEST_POST = 1 << 17  # bytes
COOKIE = "puna"
COOKIE_SECONDS = 90 * 24 * 3600
ALONE = "me"  # whoever compares on their own machine, where nobody was named

# (key, side, rating): from the left answer being far better to the right one being so.
SCALE = [
    *((key, "left", rating) for key, rating in zip("1234", RATINGS, strict=True)),
    *((key, "right", rating) for key, rating in zip("7890", reversed(RATINGS), strict=True)),
]
REASONS = (
    "both are equally good",
    "both are wrong or make no sense",
    "the better answer is unsafe",
    "the question makes no sense",
    "I do not know enough about this",
)
STATUS = {UserError: 409, ValueError: 400, OSError: 503}

Answer = Callable[[Visit], Response]


class Stranger(Exception):
    """Somebody without a token that is known."""


def application(desk: Desk, hosts: Collection[str]) -> App:
    """The ASGI application; `hosts` are the names that it answers to."""
    answers: list[tuple[str, str, Answer]] = [
        ("GET", "/", compare),
        ("POST", "/submit", submitted),
        ("POST", "/skip", skipped),
        ("POST", "/undo", undone),
        ("GET", "/continue", dialogues.ask_more),
        ("POST", "/continue", dialogues.go_on),
        ("GET", "/own", dialogues.ask_own),
        ("POST", "/own", dialogues.own),
        ("GET", "/dashboard", dashboard),
    ]
    routes: list[Any] = [
        Route(path, endpoint(desk, answer), methods=[method]) for method, path, answer in answers
    ]
    routes.append(Route("/enter/{token}", entering(desk), methods=["GET"]))
    routes.append(Mount("/static", StaticFiles(directory=HERE / "static")))
    return guarded(Starlette(routes=routes, exception_handlers={404: nowhere}), hosts)


def endpoint(desk: Desk, answer: Answer) -> Callable[[Request], Any]:
    """`answer` in a thread of its own; what went wrong becomes one sentence on a page."""

    async def found(request: Request) -> Response:
        try:
            form: Form = await form_of(request) if request.method == "POST" else {}
            return await run_in_threadpool(visited, desk, request, form, answer)
        except Stranger:
            return stranger("Open the address that you were given; it holds your token.")
        except (UserError, ValueError, OSError) as error:
            status = next(number for kind, number in STATUS.items() if isinstance(error, kind))
            return render("message.html", status, title="Not done", message=sentence(error))

    return found


def nowhere(request: Request, error: Exception) -> Response:
    return render("message.html", 404, title="Nothing here", message="There is no such page.")


def stranger(message: str) -> Response:
    return render("message.html", 401, title="Who are you?", message=message)


def visited(desk: Desk, request: Request, form: Form, answer: Answer) -> Response:
    who, is_owner = person_of(desk, request)
    return answer(Visit(desk, request, form, who, is_owner))


def person_of(desk: Desk, request: Request) -> tuple[int, bool]:
    """(id, is the owner) of who sends a request; raises Stranger."""
    if not desk.named:
        return person(desk.store, ALONE), True
    found = by_token(desk.store, request.cookies.get(COOKIE, ""))
    if found is None:
        raise Stranger
    return found


def entering(desk: Desk) -> Callable[[Request], Any]:
    """Somebody's own address: their token becomes a cookie and leaves the address bar."""

    async def enter(request: Request) -> Response:
        token = request.path_params["token"]
        if await run_in_threadpool(by_token, desk.store, token) is None:
            return stranger("This address is not known, or was replaced by a newer one.")
        response = to("/")
        response.set_cookie(
            COOKIE,
            token,
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return response

    return enter


async def form_of(request: Request) -> Form:
    """The fields of a post; ValueError where it is too large or no form."""
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > LARGEST_POST:
                raise ValueError(f"what you sent is longer than {LARGEST_POST:,} bytes; write less")
    except ClientDisconnect:
        raise ValueError("what was sent ends in the middle") from None
    try:
        fields = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise ValueError("what was sent is no form of this page") from None
    return {name: value.replace("\r\n", "\n") for name, value in fields}


def compare(visit: Visit, said: Form | None = None, problem: str = "") -> Response:
    """The item that lies before this person; with `said`, as they filled it in."""
    item = hand_out(visit.desk.store, visit.who)
    if item is None:
        return nothing_there(visit)
    return visit.page(
        "compare.html",
        422 if problem else 200,
        item=item,
        scale=SCALE,
        safe=SAFE,
        reasons=REASONS,
        said=said if said and said.get("key") == item.key else {},
        problem=problem,
        guidelines=Markup(visit.desk.guidelines.get(item.kind, "")),
        progress=progress_of(visit.desk.store, item.batch),
    )


def nothing_there(visit: Visit) -> Response:
    """Wait for answers, or all is done."""
    supply = visit.desk.supply
    waits = is_awaited(visit.desk.store, visit.who)
    if supply is not None and not waits:
        progress = progress_of(visit.desk.store, supply.batch)
        waits = progress.done < progress.total
    return visit.page("wait.html", waits=waits, problem=supply.background.problem if supply else "")


def submitted(visit: Visit) -> Response:
    """A verdict; what cannot be said is explained above the item, which stays as filled in."""
    form = visit.form
    side, _, rating = form.get("degree", "").partition(" ")
    store, who = visit.desk.store, visit.who
    try:
        with store.writing():  # the disk is waited for once
            submit(
                store,
                who,
                form.get("key", ""),
                chosen=side,
                rating=rating,
                safe=form.get("safe"),
                seconds=seconds_of(form),
            )
            goes_on = dialogues.may_go_on(visit)
            if not goes_on:
                hand_out(store, who)
    except ValueError as error:
        return compare(visit, form, sentence(error))
    visit.prod()
    return to("/continue" if goes_on else "/")


def skipped(visit: Visit) -> Response:
    """An item passed over, with the reason."""
    form = visit.form
    reason = form.get("other", "").strip() or form.get("reason", "")
    store, who = visit.desk.store, visit.who
    with store.writing():
        skip(store, who, form.get("key", ""), reason[:500], seconds_of(form))
        hand_out(store, who)
    visit.prod()
    return to("/")


def undone(visit: Visit) -> Response:
    """The last verdict taken back."""
    undo(visit.desk.store, visit.who)
    return to("/")


def seconds_of(form: Form) -> float | None:
    """How long an item was looked at, as the page measured it; None where it did not."""
    try:
        seconds = float(form.get("seconds", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 24 * 3600 else None


def dashboard(visit: Visit) -> Response:
    """What is seen of the comparisons so far; for whoever started the server."""
    if not visit.is_owner:
        raise UserError("the dashboard is for whoever started the server")
    return visit.page(
        "dashboard.html",
        seen=statistics.seen(visit.desk.store),
        shares=lambda found: [charts.of_share(*each) for each in found],
        degrees=list(zip(RATINGS, charts.COLOURS, strict=True)),
    )
