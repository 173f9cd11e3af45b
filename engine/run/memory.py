"""How many pages and slots fit, the caches themselves, and copies of single sequences in host memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.engine.model.batch import Caches
from headrace.engine.run.device import Device
from headrace.kernels.sampling import SamplerState


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Layout of the caches. Bytes are what one page, or one slot's states, take over all layers.

    Slots and pages are the scheduler's. Behind them lie ``padding`` more of each, one for every padding row that a
    step may need (``run.padding``); 0: steps are not padded.
    """

    num_slots: int
    num_pages: int
    page_size: int  # tokens
    max_context: int  # tokens
    page_bytes: int
    slot_bytes: int
    padding: int = 0


def unit_bytes(one: Caches) -> tuple[int, int]:
    """(bytes of a page, bytes of a slot), from caches of one page and one slot (device "meta" will do)."""

    def size(tensors: tuple[Tensor, ...]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    return size(one.keys) + size(one.values), size(one.conv) + size(one.ssm)


CACHE_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""Of the available memory, what the pages may take unless told: a CPU's is shared with all else, a GPU's is ours."""


class Memory(Protocol):
    """What sizing asks of a ``Device``, or of one that is only planned for."""

    @property
    def cuda(self) -> bool: ...

    @property
    def torch(self) -> torch.device: ...

    def available_bytes(self) -> int: ...


def plan_caches(
    one: Caches,
    device: Memory,
    *,
    num_slots: int,
    page_size: int,
    model_context: int,
    max_context: int | None = None,
    num_pages: int | None = None,
    cache_bytes: int | None = None,
    step_bytes: int = 0,
    padding: int = 0,
) -> CacheSizes:
    """Sizes for caches like ``one`` (one page, one slot). Raises ValueError naming the option that cannot be met.

    Without ``num_pages`` the pages take at most ``cache_bytes`` (default: CACHE_SHARE of the available memory) and
    never more than all slots could fill. ``step_bytes`` is what a step takes beside the caches, at most. The slots and
    pages of ``padding`` rows come on top of what is asked for, and out of the same memory.
    """
    page_bytes, slot_bytes = unit_bytes(one)
    available = device.available_bytes()
    state_bytes = (num_slots + padding) * slot_bytes
    beside = f" with {padding} for padding rows" if padding else ""
    # A CPU's memory is shared with all else. Of a GPU's, the states may have what a step and the pages leave.
    share, room = ("what a step leaves", available - step_bytes) if device.cuda else ("half", available // 2)
    if state_bytes > room:
        raise ValueError(
            f"max_sequences {num_slots} needs {state_bytes:,} bytes of state{beside}; {share} of the available memory "
            f"holds {max(0, room // slot_bytes - padding)}"
        )
    if max_context is not None and max_context > model_context:
        raise ValueError(f"max_context {max_context} is more than the model's {model_context}")
    context = max_context or model_context
    rest = available - state_bytes - step_bytes if device.cuda else available
    if num_pages is None:
        useful = num_slots * -(-context // page_size)
        budget = int(rest * CACHE_SHARE[device.torch.type]) if cache_bytes is None else cache_bytes
        num_pages = min(useful, budget // page_bytes - padding) if page_bytes else useful
        if num_pages * page_size < 2:
            raise ValueError(
                f"cache_bytes {budget:,} holds no page{beside}: one of {page_size} tokens takes {page_bytes:,}"
            )
    elif (needed := (num_pages + padding) * page_bytes) > rest:
        raise ValueError(f"num_pages {num_pages} needs {needed:,} bytes{beside}; {rest:,} are available")
    capacity = num_pages * page_size
    if capacity < (max_context or 2):
        raise ValueError(f"{num_pages} pages of {page_size} tokens hold {capacity}, less than max_context {context}")
    return CacheSizes(num_slots, num_pages, page_size, min(context, capacity), page_bytes, slot_bytes, padding)


@dataclass(frozen=True, slots=True)
class SavedSequence:
    """One sequence's pages, states and sampler row in host memory."""

    pages: list[Tensor]
    states: list[Tensor]
    sampler: dict[str, Tensor]


def save_sequence(
    device: Device, caches: Caches, sampler: SamplerState, slot: int, pages: tuple[int, ...]
) -> SavedSequence:
    """Copy a sequence out. ``pages`` are those that hold its cached tokens, in order."""
    [index] = device.upload([np.array(pages, np.int64)])
    return SavedSequence(
        [device.download(layer[index]) for layer in (*caches.keys, *caches.values)],
        [device.download(layer[slot]) for layer in (*caches.conv, *caches.ssm)],
        {f.name: device.download(getattr(sampler, f.name)[slot]) for f in fields(sampler)},
    )


def restore_sequence(
    device: Device, saved: SavedSequence, caches: Caches, sampler: SamplerState, slot: int, pages: tuple[int, ...]
) -> None:
    """Copy a sequence back, bit for bit, into another slot and other pages.

    What the copy out left in host memory is read in the stream that wrote it, so nobody has to wait for it.
    """
    [index] = device.upload([np.array(pages, np.int64)])
    for layer, content in zip((*caches.keys, *caches.values), saved.pages, strict=True):
        layer[index] = content.to(device.torch, non_blocking=True)
    for layer, content in zip((*caches.conv, *caches.ssm), saved.states, strict=True):
        layer[slot] = content.to(device.torch, non_blocking=True)
    for name, value in saved.sampler.items():
        getattr(sampler, name)[slot] = value.to(device.torch, non_blocking=True)
