"""Errors that a caller can act on. Each names the field it is about, as the HTTP front end must."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that this engine cannot run; the message names the key and its value."""


class RequestError(ValueError):
    """A request that is refused at the boundary; nothing was admitted.

    ``param`` is the field at fault (None if it is no single one), ``code`` a short machine-readable reason.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """Picklable, for those who cross processes."""
        return _restore, (type(self), self.args, self.__dict__)


class ContextExceeded(RequestError):
    """The prompt alone leaves no room for a single token.

    ``prompt_tokens`` is the least it can have where ``at_least`` is set: text so long is not turned into tokens.
    """

    def __init__(
        self, prompt_tokens: int, max_context: int, param: str = "messages", *, at_least: bool = False
    ) -> None:
        super().__init__(
            f"the prompt has {'at least ' if at_least else ''}{prompt_tokens} tokens; with at least one to generate, "
            f"at most {max_context - 1} fit (context {max_context})",
            param=param,
            code="context_length_exceeded",
        )
        self.prompt_tokens = prompt_tokens
        self.max_context = max_context


class QueueFull(RuntimeError):
    """Too many requests are waiting already; try again later. ``retry_after`` is in seconds."""

    def __init__(self, waiting: int, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{waiting} sequences are waiting, the limit (max_waiting) is {limit}")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Picklable, for those who cross processes."""
        return _restore, (type(self), self.args, self.__dict__)


class EngineClosed(RuntimeError):
    """The engine is closed or closing and takes no more requests."""


class EngineFailed(EngineClosed):
    """The engine's own thread failed; it answers nothing any more. The message says why."""


class GenerationError(RuntimeError):
    """A request was accepted and then failed: non-finite logits or its own mask (alone), or a failing step."""


def trace(error: BaseException) -> str:
    """Where an error came from, innermost call first, without its message: that may hold what a user wrote."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__} at {where}"


def _restore(kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
