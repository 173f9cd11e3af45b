"""The HTTP application: routes, request ids, keys, and one error body for everything that goes wrong."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.engine import Finished
from headrace.engine.serve.access import Access
from headrace.engine.serve.bodies import Answer, Chunks, Envelope, check_finished
from headrace.engine.serve.errors import ApiError, failed, from_engine, internal, unavailable
from headrace.engine.serve.profiles import EVENTS, NIM, Profile
from headrace.engine.serve.protocol import ChatCall, check_model, parse_chat
from headrace.engine.serve.service import MAX_BODY_BYTES, Service
from headrace.engine.serve.stream import HEADERS, abort_on_disconnect, events_of

if TYPE_CHECKING:
    from headrace.engine import Engine, Stream

DISCARD_FACTOR = 4
"""A body over the limit is read and dropped up to this many times the limit, so that the client sees the answer."""

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
    routes = [
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/models", partial(_models, service)),
        Route("/v1/models/{model_id:path}", partial(_model, service)),
        Route("/health/live", partial(_live, service)),
        Route("/health/ready", partial(_ready, service)),
    ]
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error}
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(FrontDoor, service=service)])
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class FrontDoor:
    """Around every request: its id, the keys, and an answer even to a bug."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (or pass lifespan events on)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_access(scope)
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            await _respond(error)(scope, receive, send_with_id)
        except ClientDisconnect:
            return
        except Exception:
            logger.exception("request %s failed", request_id)
            if not started:
                await _respond(internal())(scope, receive, send_with_id)

    def _check_access(self, scope: Scope) -> None:
        if not scope["path"].startswith("/health/"):
            headers = dict(scope["headers"])
            self._service.access.check(headers.get(b"authorization"), headers.get(b"origin"))


class ChatCompletions:
    """``POST /v1/chat/completions``, streaming or not."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. A client that goes away, streaming or not, frees what it held within a step."""
        request = Request(scope, receive)
        service = self._service
        body = await read_body(request, service.max_body_bytes)
        engine = service.admit()
        with service.request():
            # A long prompt must not hold up the other streams: parsing, rendering and encoding go to a worker thread.
            call, stream, prompt_ids = await to_thread.run_sync(
                _submit, engine, body, request.headers.get("accept"), service.profile, service.name_of(engine)
            )
            with service.hold(stream):
                async with abort_on_disconnect(receive, stream):
                    envelope = self._envelope(engine, prompt_ids, call, scope["state"]["request_id"])
                    response = await _response(envelope, stream, call)
                    await response(scope, receive, send)

    def _envelope(self, engine: Engine, prompt_ids: Sequence[int] | None, call: ChatCall, request_id: str) -> Envelope:
        return Envelope(
            id=request_id.replace("req-", "chatcmpl-"),
            created=int(time.time()),
            model=self._service.name_of(engine),
            fingerprint=self._service.fingerprint,
            tokenizer=engine.tokenizer,
            prompt_ids=prompt_ids,
            logprobs=call.params.logprobs,
            include_usage=call.include_usage,
        )


def _submit(
    engine: Engine, body: bytes, accept: str | None, profile: Profile, served: str
) -> tuple[ChatCall, Stream, list[int] | None]:
    """Hand a request to the engine; the prompt's ids too if they were asked for. Raises ApiError."""
    try:
        call = parse_chat(body, accept, profile, served)
        prompt_ids = engine.prompt_ids(call.messages, call.options).ids if call.return_token_ids else None
        return call, engine.chat_stream(call.messages, call.params, call.options), prompt_ids
    except Exception as error:
        refusal = from_engine(error)
        if refusal is None:
            raise
        raise refusal from None


async def _response(envelope: Envelope, stream: Stream, call: ChatCall) -> Response:
    """The answer's first byte waits for the first event, so that what fails before it is an HTTP error."""
    events = aiter(stream)
    if not call.stream:
        answer = Answer(envelope, call.params.n)
        async for event in events:
            answer.add(event)
        return JSONResponse(answer.body())
    first = await anext(events)
    if isinstance(first, Finished):
        check_finished(first)
    return StreamingResponse(events_of(Chunks(envelope), first, events), headers=HEADERS, media_type=EVENTS)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; ApiError 413 if it is larger than ``limit`` bytes."""
    too_large = ApiError(
        413, f"the body is larger than {limit} bytes", code="body_too_large", headers={"connection": "close"}
    )
    if int(request.headers.get("content-length", "0")) > limit * DISCARD_FACTOR:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > limit * DISCARD_FACTOR:
            break
    if size > limit:
        raise too_large
    return b"".join(chunks)


def _card(service: Service) -> dict[str, Any]:
    engine = service.admit()
    return {
        "id": service.name_of(engine),
        "object": "model",
        "created": service.created,
        "owned_by": "headrace",
        "max_model_len": engine.max_context,
    }


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(service)]})


async def _model(service: Service, request: Request) -> Response:
    card = _card(service)
    check_model(request.path_params["model_id"], card["id"])
    return JSONResponse(card)


async def _live(service: Service, request: Request) -> Response:
    """Live until only a restart would help."""
    if service.fault is not None:
        raise failed(service.fault)
    return JSONResponse({"status": "live"})


async def _ready(service: Service, request: Request) -> Response:
    engine = service.admit()
    if not engine.accepting:
        raise unavailable("the engine has stopped", "stopped")
    return JSONResponse({"status": "ready", "model": service.name_of(engine)})


def _respond(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _api_error(request: Request, error: ApiError) -> Response:
    return _respond(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """What the router raises: an unknown path, or a known one with another method."""
    path, method = request.scope["path"], request.scope["method"]
    message = f"unknown path {path}" if error.status_code == 404 else f"{method} is not allowed for {path}"
    code = "unknown_path" if error.status_code == 404 else "method_not_allowed"
    return _respond(ApiError(error.status_code, message, code=code, headers=error.headers))
