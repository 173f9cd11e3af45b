"""The HTTP application: request ids, keys, safe headers, the log, and one error body for everything that goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.engine.errors import trace
from headrace.engine.serve import console
from headrace.engine.serve.access import PUBLIC_PATHS, SAFE_HEADERS, Access
from headrace.engine.serve.endpoints import Endpoints
from headrace.engine.serve.errors import ApiError, internal
from headrace.engine.serve.history import MAX_AGENT, MAX_PATH, Record, new_id
from headrace.engine.serve.incoming import MAX_BODY_BYTES
from headrace.engine.serve.profiles import NIM, Profile
from headrace.engine.serve.service import STALL_SECONDS, Service

if TYPE_CHECKING:
    from headrace.engine import Engine

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine | None,
    *,
    profile: Profile = NIM,
    keys: Iterable[str] = (),
    served_name: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    stall_seconds: float = STALL_SECONDS,
) -> Starlette:
    """The application around an engine; ``app.state.service`` is its Service.

    With engine None the server answers 503 until ``service.attach(engine)``. The caller closes the engine. A step that
    takes longer than ``stall_seconds`` makes ``/health/live`` say that only a restart would help.
    """
    pages = console.routes()
    access = Access(keys, PUBLIC_PATHS | {page.path for page in pages})
    service = Service(engine, profile, access, served_name, max_body_bytes, stall_seconds)
    routes = Endpoints(service).routes() + pages
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error}
    paths = {route.endpoint: route.path.replace(":path}", "}") for route in routes}
    front = Middleware(FrontDoor, service=service, paths=paths)
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=[front])
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class FrontDoor:
    """Around every request: its id, the keys, the record of it, and an answer even to a bug."""

    def __init__(self, app: ASGIApp, service: Service, paths: Mapping[Any, str]) -> None:
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
            # What the keys refuse has no endpoint yet; its path still counts if it is one of ours.
            endpoint, path = scope.get("endpoint"), record.path
            known = self._paths.get(endpoint) or (path if path in self._paths.values() else None)
            self._service.answered(record, known)

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


def _record(scope: Scope) -> Record:
    agent = dict(scope["headers"]).get(b"user-agent", b"").decode("latin-1")
    client = scope.get("client")
    return Record(
        id=new_id(),
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
