"""Headrace's engine: everything between a request and its tokens. The names below are the public API.

They are imported on first use, so that ``import headrace.engine`` (a command line's help, say) costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.engine.engine import Engine
    from headrace.engine.errors import (
        ContextExceeded,
        EngineClosed,
        EngineFailed,
        GenerationError,
        QueueFull,
        RequestError,
    )
    from headrace.engine.options import EngineConfig
    from headrace.engine.request import (
        ChatOptions,
        Choice,
        Completion,
        Delta,
        Finished,
        SamplingParams,
        TokenLogprob,
        Usage,
    )
    from headrace.engine.stream import Stream

_HOMES = {
    "engine": ("Engine",),
    "errors": ("ContextExceeded", "EngineClosed", "EngineFailed", "GenerationError", "QueueFull", "RequestError"),
    "options": ("EngineConfig",),
    "request": (
        "ChatOptions",
        "Choice",
        "Completion",
        "Delta",
        "Finished",
        "SamplingParams",
        "TokenLogprob",
        "Usage",
    ),
    "stream": ("Stream",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ChatOptions",
    "Choice",
    "Completion",
    "ContextExceeded",
    "Delta",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineFailed",
    "Finished",
    "GenerationError",
    "QueueFull",
    "RequestError",
    "SamplingParams",
    "Stream",
    "TokenLogprob",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
