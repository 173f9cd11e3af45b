"""The HTTP application: request ids, keys, safe headers, the log, and one error body for everything that goes wrong."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.engine.serve.access import Access
from headrace.engine.serve.endpoints import Endpoints
from headrace.engine.serve.errors import ApiError, internal, trace
from headrace.engine.serve.history import MAX_AGENT, MAX_PATH, Record, access_log
from headrace.engine.serve.profiles import NIM, Profile
from headrace.engine.serve.service import MAX_BODY_BYTES, Service

if TYPE_CHECKING:
    from headrace.engine import Engine

SAFE_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""On every response that does not set its own: nothing here is a page, and nothing is for another site's."""

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine | None,
    *,
    profile: Profile = NIM,
    keys: Iterable[str] = (),
    served_name: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Starlette:
    """The application around an engine; ``app.state.service`` is its Service.

    With engine None the server answers 503 until ``service.attach(engine)``. The caller closes the engine.
    """
    service = Service(engine, profile, Access(keys), served_name, max_body_bytes)
    routes = Endpoints(service).routes()
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error}
    paths = frozenset(route.path for route in routes)
    front = Middleware(FrontDoor, service=service, paths=paths)
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=[front])
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class FrontDoor:
    """Around every request: its id, the keys, the record of it, and an answer even to a bug."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app = app
        self._service = service
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (or pass lifespan events on)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record(scope)
        scope.setdefault("state", {})["record"] = record

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.id
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._answer(record, scope, receive, send_with_headers)
        finally:
            self._close(record)

    async def _answer(self, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            record.key = self._service.access.check(scope["path"], dict(scope["headers"]))
            await self._app(scope, receive, send)
        except ApiError as error:
            await _respond(error, record)(scope, receive, send)
        except ClientDisconnect:
            record.client_left()
        except Exception as error:
            logger.error("request %s failed: %s", record.id, trace(error))
            record.error = "internal_error"
            if not record.status:
                await _respond(internal(), record)(scope, receive, send)

    def _close(self, record: Record) -> None:
        record.close()
        access_log.info("%s", record.line())
        if record.generates:
            self._service.history.add(record)
        if self._service.loaded:
            path = record.path if record.path in self._paths else "other"
            self._service.metrics.answered(path, record.status)


def _record(scope: Scope) -> Record:
    agent = dict(scope["headers"]).get(b"user-agent", b"").decode("latin-1")
    client = scope.get("client")
    return Record(
        id=f"req-{uuid.uuid4().hex}",
        method=scope["method"],
        path=scope["path"][:MAX_PATH],
        agent=agent[:MAX_AGENT],
        client=client[0] if client else None,
    )


def _respond(error: ApiError, record: Record) -> Response:
    record.error = record.error or error.code or "invalid_request"
    return JSONResponse(error.body(), error.status, error.headers)


async def _api_error(request: Request, error: ApiError) -> Response:
    return _respond(error, request.scope["state"]["record"])


async def _http_error(request: Request, error: HTTPException) -> Response:
    """What the router raises: an unknown path, or a known one with another method."""
    path, method = request.scope["path"], request.scope["method"]
    message = f"unknown path {path}" if error.status_code == 404 else f"{method} is not allowed for {path}"
    code = "unknown_path" if error.status_code == 404 else "method_not_allowed"
    refusal = ApiError(error.status_code, message, code=code, headers=error.headers)
    return _respond(refusal, request.scope["state"]["record"])
