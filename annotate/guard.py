"""What stands before the page: who it answers to, which posts it takes, what a browser may do.

A page elsewhere on the web can have a browser send requests here. It reads nothing (the host name
must be one of ours, so that a foreign name that points here gets no answer) and changes nothing (a
post must come from a page of ours).
"""

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from puna.annotate.background import requests

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # a token in an address is told to nobody else
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
KEPT = "public, max-age=604800, immutable"  # by a browser: their addresses name their contents


def guarded(app: App, hosts: Collection[str]) -> App:
    """`app`, behind the checks and with the headers above."""

    async def checked(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                is_kept = scope["path"].startswith("/static/") and message["status"] == 200
                headers["cache-control"] = KEPT if is_kept else "no-store"
            await send(message)

        refused = refusal(scope["method"], Headers(scope=scope), hosts)
        with requests.one():
            await (refused or app)(scope, receive, with_headers)

    return checked


def refusal(method: str, headers: Headers, hosts: Collection[str]) -> PlainTextResponse | None:
    """The answer to a request that is not taken."""
    host = headers.get("host", "")
    if name_of(host) not in hosts:
        return PlainTextResponse(
            "This server does not answer to that name; it is started with --names NAME to do so.\n",
            status_code=421,
        )
    if method == "POST" and netloc_of(headers.get("origin", "")) != host.lower():
        return PlainTextResponse("A post must come from a page of this server.\n", status_code=403)
    return None


def name_of(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def netloc_of(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None
