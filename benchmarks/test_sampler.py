"""The reference sampler at the embedded model's vocabulary and at Super's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace.kernels.control import ControlIds
from headrace.kernels.sampling import SamplerState, sample

CASES = [(1, 640), (32, 640), (256, 640), (1024, 640), (1, 131072), (32, 131072)]


@pytest.mark.benchmark(group="sampler")
@pytest.mark.parametrize(("rows", "vocab"), CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampler(benchmark: Any, rows: int, vocab: int, temperature: float) -> None:
    """One token per row: top-p 0.95, seeds, budget machine off."""
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab) * 3
    state = SamplerState.allocate(rows, "cpu")
    state.temperature.fill_(temperature)
    state.top_p.fill_(0.95)
    state.tokens_left.fill_(1 << 30)
    slots, control = torch.arange(rows), ControlIds(eos=(2,))
    benchmark.extra_info.update(rows=rows, vocab=vocab, temperature=temperature)
    benchmark.pedantic(sample, args=(logits, slots, state, control), rounds=10, warmup_rounds=1)
    assert int(state.length.min()) > 0
