"""One error shape for everything: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headrace.engine import EngineClosed, EngineFailed, QueueFull, RequestError
from headrace.engine.request import Failure

VALIDATION_STATUS = 422
RETRY_SECONDS = 2
ENGINE_FAILED = "the engine has failed, and the server has to be started anew; its log says where"

# Statuses without a word of their own are "invalid_request_error" below 500 and "server_error" above.
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal or failure as the client sees it. ``param`` is the field at fault, ``code`` a short reason."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body, also the payload of an error event inside a stream."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    """A field out of range or of the wrong type."""
    return ApiError(VALIDATION_STATUS, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after: float = RETRY_SECONDS) -> ApiError:
    """Starting or draining: the same request can succeed here or elsewhere a little later."""
    return ApiError(503, message, code=code, headers={"retry-after": _seconds(retry_after)})


# What clients are told of a failure: sentences of ours. What was raised may hold a user's text, or tell of the machine.
_FAILURES: Mapping[Failure, str] = {
    "logits": "the model's logits are not finite",
    "step": "the step that computed this request failed",
    "neighbours": "a step failed that computed this request and others; it may be tried again",
    "engine": "the engine has failed",
}


def generation_failed(failure: Failure | None) -> ApiError:
    """An accepted request that failed. The engine is deterministic: one that failed alone would fail again."""
    message = _FAILURES.get(failure or "text", "the request failed while generating")
    if failure == "neighbours":
        return ApiError(500, message, code="step_failed")
    return ApiError(500, message, code="generation_failed", headers={"x-should-retry": "false"})


def queue_full(message: str, retry_after: float) -> ApiError:
    """Too much is waiting already."""
    return ApiError(429, message, code="queue_full", headers={"retry-after": _seconds(retry_after)})


def failed(message: str) -> ApiError:
    """Nothing will be answered until the server is started again."""
    return ApiError(500, message, code="engine_failed", headers={"x-should-retry": "false"})


def internal() -> ApiError:
    """A bug of ours. The details are in the server's log, not in the answer."""
    return ApiError(500, "internal error", code="internal_error", headers={"x-should-retry": "false"})


def from_engine(error: Exception, retry_after: float) -> ApiError | None:
    """Translate what the engine raises when it refuses a request; None if it is not a refusal.

    ``retry_after`` is the server's own estimate, in seconds, of when a full queue will have emptied.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        status = 400 if error.code == "context_length_exceeded" else VALIDATION_STATUS
        return ApiError(status, str(error), param=error.param, code=error.code)
    if isinstance(error, QueueFull):
        return queue_full(str(error), max(retry_after, error.retry_after))
    if isinstance(error, EngineFailed):
        return failed(ENGINE_FAILED)
    if isinstance(error, EngineClosed):
        return unavailable("the engine is closing", "draining")
    return None


def _seconds(value: float) -> str:
    return str(max(1, math.ceil(value)))
