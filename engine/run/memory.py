"""How many pages and slots fit, the caches themselves, and copies of single sequences in host memory."""

from __future__ import annotations

from dataclasses import dataclass, fields

import psutil
import torch
from torch import Tensor

from headrace.engine.model.batch import Caches
from headrace.kernels.sampling import SamplerState


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Layout of the caches. Bytes are what one page, or one slot's states, take over all layers."""

    num_slots: int
    num_pages: int
    page_size: int  # tokens
    max_context: int  # tokens
    page_bytes: int
    slot_bytes: int


def unit_bytes(one: Caches) -> tuple[int, int]:
    """(bytes of a page, bytes of a slot), from caches of one page and one slot (device "meta" will do)."""

    def size(tensors: tuple[Tensor, ...]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    return size(one.keys) + size(one.values), size(one.conv) + size(one.ssm)


def plan_caches(
    one: Caches,
    *,
    num_slots: int,
    page_size: int,
    model_context: int,
    max_context: int | None = None,
    num_pages: int | None = None,
    cache_bytes: int | None = None,
) -> CacheSizes:
    """Sizes for caches like ``one`` (one page, one slot). Raises ValueError naming the option that cannot be met.

    Without ``num_pages`` the pages take at most ``cache_bytes`` (default: a quarter of the available memory) and
    never more than all slots could fill.
    """
    page_bytes, slot_bytes = unit_bytes(one)
    available = psutil.virtual_memory().available
    if num_slots * slot_bytes > available // 2:
        raise ValueError(
            f"max_sequences {num_slots} needs {num_slots * slot_bytes:,} bytes of state; half of the available memory "
            f"holds {available // 2 // slot_bytes}"
        )
    if max_context is not None and max_context > model_context:
        raise ValueError(f"max_context {max_context} is more than the model's {model_context}")
    context = max_context or model_context
    if num_pages is None:
        useful = num_slots * -(-context // page_size)
        budget = available // 4 if cache_bytes is None else cache_bytes
        num_pages = min(useful, budget // page_bytes) if page_bytes else useful
        if num_pages * page_size < 2:
            raise ValueError(f"cache_bytes {budget:,} holds no page: one of {page_size} tokens takes {page_bytes:,}")
    elif num_pages * page_bytes > available:
        raise ValueError(f"num_pages {num_pages} needs {num_pages * page_bytes:,} bytes; {available:,} are available")
    capacity = num_pages * page_size
    if capacity < (max_context or 2):
        raise ValueError(f"{num_pages} pages of {page_size} tokens hold {capacity}, less than max_context {context}")
    return CacheSizes(num_slots, num_pages, page_size, min(context, capacity), page_bytes, slot_bytes)


@dataclass(frozen=True, slots=True)
class SavedSequence:
    """One sequence's pages, states and sampler row in host memory."""

    pages: list[Tensor]
    states: list[Tensor]
    sampler: dict[str, Tensor]


def save_sequence(caches: Caches, sampler: SamplerState, slot: int, pages: tuple[int, ...]) -> SavedSequence:
    """Copy a sequence out. ``pages`` are those that hold its cached tokens, in order."""
    index = torch.tensor(pages, dtype=torch.int64, device=sampler.length.device)
    return SavedSequence(
        [layer[index].cpu() for layer in (*caches.keys, *caches.values)],
        [layer[slot].to("cpu", copy=True) for layer in (*caches.conv, *caches.ssm)],
        {f.name: getattr(sampler, f.name)[slot].to("cpu", copy=True) for f in fields(sampler)},
    )


def restore_sequence(
    saved: SavedSequence, caches: Caches, sampler: SamplerState, slot: int, pages: tuple[int, ...]
) -> None:
    """Copy a sequence back, bit for bit, into another slot and other pages."""
    device = sampler.length.device
    index = torch.tensor(pages, dtype=torch.int64, device=device)
    for layer, content in zip((*caches.keys, *caches.values), saved.pages, strict=True):
        layer[index] = content.to(device)
    for layer, content in zip((*caches.conv, *caches.ssm), saved.states, strict=True):
        layer[slot] = content.to(device)
    for name, value in saved.sampler.items():
        getattr(sampler, name)[slot] = value.to(device)
