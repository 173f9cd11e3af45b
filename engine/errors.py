"""Errors that a caller can act on. Each names the field it is about, as the HTTP front end must."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that is refused at the boundary; nothing was admitted.

    ``param`` is the field at fault (None if it is no single one), ``code`` a short machine-readable reason.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextExceeded(RequestError):
    """The prompt alone leaves no room for a single token."""

    def __init__(self, prompt_tokens: int, max_context: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens; with at least one to generate, at most {max_context - 1} fit "
            f"(context {max_context})",
            param="messages",
            code="context_length_exceeded",
        )
        self.prompt_tokens = prompt_tokens
        self.max_context = max_context


class QueueFull(RuntimeError):
    """Too many requests are waiting already; try again later. ``retry_after`` is in seconds."""

    def __init__(self, waiting: int, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{waiting} sequences are waiting, the limit (max_waiting) is {limit}")
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine is closed or closing and takes no more requests."""


class GenerationError(RuntimeError):
    """A request was accepted and then failed alone: non-finite logits, a failing mask, a failing step."""
