"""Which GPU architecture a launch is for: the device's own, or the one the kernel laboratory is looking at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

INTERPRETER_ARCHITECTURE = 90  # what launch parameters are chosen for where there is neither a GPU nor an override

_override: ContextVar[int | None] = ContextVar("architecture override", default=None)


def architecture(device: torch.device) -> int:
    """Compute capability as 10 * major + minor (90 is Hopper): the override, else the CUDA device's, else 90."""
    overridden = _override.get()
    if overridden is not None:
        return overridden
    if device.type == "cuda":
        return _of_device(torch.cuda.current_device() if device.index is None else device.index)
    return INTERPRETER_ARCHITECTURE


@contextmanager
def override(arch: int) -> Iterator[None]:
    """Inside, every op chooses its launch parameters for ``arch``, whatever device its tensors are on."""
    token = _override.set(arch)
    try:
        yield
    finally:
        _override.reset(token)


@cache
def _of_device(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
