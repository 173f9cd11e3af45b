"""The console at ``/``: files of this folder, read once, with the headers that keep the page to this server.

The page and what it is made of hold no secret and need no key; what it asks the API for does. Nothing is built: the
browser gets the files as they are. Names are looked up among those that were read, so no path leads anywhere else.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

INDEX = "index.html"

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".sse": "text/plain; charset=utf-8",  # an example of a stream, to be read, not to be followed
}
"""Of the files that are served, by suffix; what has another one is not."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Text that reaches a sink which parses HTML is an error, not a page: the console has no such sink.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "cache-control": "no-cache",  # kept, but asked for again: after an upgrade nobody has half of an old page
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
}


class Asset:
    """One file and the answer to a request for it."""

    def __init__(self, name: str, body: bytes) -> None:
        self._body = body
        self._type = CONTENT_TYPES[PurePosixPath(name).suffix]
        self._tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        self.path = "/" if name == INDEX else f"/console/{name}"

    async def answer(self, request: Request) -> Response:
        """The file, or 304 where the browser has it already."""
        headers = HEADERS | {"etag": self._tag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if known & {self._tag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(self._body, media_type=self._type, headers=headers)


def routes() -> list[Route]:
    """A route for each file of the page."""
    files = sorted(resources.files(__name__).iterdir(), key=lambda file: file.name)
    assets = [Asset(file.name, file.read_bytes()) for file in files if PurePosixPath(file.name).suffix in CONTENT_TYPES]
    return [Route(asset.path, asset.answer) for asset in assets]
