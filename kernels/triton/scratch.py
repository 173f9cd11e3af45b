"""Counters that kernels find at zero and leave at zero, so that no launch is spent on clearing them.

Kernels of one stream run one after the other, so they share the memory; each stream has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` int32 zeros for launches in the device's current stream."""
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _counters.get(key)
    if held is None or held.numel() < count:
        held = _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return held
