"""The paths beside generation: models, tokens, the caller's history, health, metrics, and the API's own description."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from anyio import to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from headrace.engine.serve.bodies import Json, dumped
from headrace.engine.serve.errors import failed, from_engine, invalid
from headrace.engine.serve.fields import check_model
from headrace.engine.serve.generation import ChatCompletions, Completions
from headrace.engine.serve.history import MAX_PAGE, PAGE
from headrace.engine.serve.openapi import document
from headrace.engine.serve.profiles import JSON
from headrace.engine.serve.prompts import detokenize, tokenize
from headrace.engine.serve.readiness import Readiness
from headrace.engine.serve.service import Service


class Endpoints:
    """The handlers; one instance for each server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._readiness = Readiness()
        self._documents: dict[str | None, bytes] = {}  # by the model's name, None while it is loading

    def routes(self) -> list[Route]:
        """Every path of the server."""
        return [
            Route("/v1/chat/completions", ChatCompletions(self._service), methods=["POST"]),
            Route("/v1/completions", Completions(self._service), methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/requests", self.requests),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
        ]

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{model}``."""
        card = self._card()
        check_model(request.path_params["model"], card["id"])
        return JSONResponse(card)

    def _card(self) -> dict[str, Any]:
        engine = self._service.admit()
        return {
            "id": self._service.name_of(engine),
            "object": "model",
            "created": self._service.created,
            "owned_by": "headrace",
            "max_model_len": engine.max_context,
        }

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        service, engine = self._service, self._service.admit()
        async with service.bodies.read(request) as body:
            work = partial(tokenize, body, service.profile, service.name_of(engine), engine)
            return await self._encoded(work, len(body))

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        service, engine = self._service, self._service.admit()
        async with service.bodies.read(request) as body:
            return await self._encoded(partial(detokenize, body, service.name_of(engine), engine), len(body))

    async def _encoded(self, work: Callable[[], Json], size: int) -> Response:
        try:
            body = await to_thread.run_sync(lambda: dumped(work()), limiter=self._service.encoders(size))
            return Response(body, media_type=JSON)
        except Exception as error:
            refusal = from_engine(error, self._service.retry_after())
            if refusal is None:
                raise
            raise refusal from None

    async def requests(self, request: Request) -> Response:
        """``GET /v1/requests``: the calling key's own."""
        limit = request.query_params.get("limit", str(PAGE))
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= MAX_PAGE):
            raise invalid(f"limit must be an integer from 1 to {MAX_PAGE}", "limit")
        key = request.scope["state"]["record"].key
        return JSONResponse(self._service.history.page(key, request.query_params.get("after"), int(limit)))

    async def live(self, request: Request) -> Response:
        """``GET /health/live``: live until only a restart would help."""
        if problem := self._service.fault or self._service.hangs:
            raise failed(problem)
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """``GET /health/ready``: the model answers, and new requests are taken."""
        engine = self._service.admit()
        await self._readiness.check(engine)
        return JSONResponse({"status": "ready", "model": self._service.name_of(engine)})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        service = self._service
        engine = service.engine if service.loaded else None
        model = None if engine is None else service.name_of(engine)
        body = self._documents.get(model)  # needs no key, and takes as long to make as a step of a small model
        if body is None:
            max_context = None if engine is None else engine.max_context
            made = document(service.profile, model, keys=service.access.has_keys, max_context=max_context)
            body = self._documents[model] = dumped(made)
        return Response(body, media_type=JSON)
