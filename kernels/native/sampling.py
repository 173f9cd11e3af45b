"""Fused sampling in one call; see ``kernels/sampling.py`` for the contract."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from headrace.kernels.control import ControlIds
from headrace.kernels.native.library import Op, Pool
from headrace.kernels.sampling import Sampled, SamplerState

SAMPLE = Op("sample", "q" * 27)


@lru_cache(maxsize=64)
def control_ids(control: ControlIds) -> Tensor:
    """The ids in the order in which the kernel reads them, int64."""
    ids = (control.think, control.end_think, control.tool_call, *control.eos, *control.closing)
    return torch.tensor(ids, dtype=torch.int64)


def sample(
    logits: Tensor,
    slots: Tensor,
    state: SamplerState,
    control: ControlIds,
    *,
    mask: Tensor | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    pool: Pool,
) -> Sampled:
    """As the reference's. Scratch is 4 bytes per logit of the rows in work, which are at most four per thread."""
    rows, vocab = logits.shape
    k = min(top_logprobs, vocab)
    integers = pool.empty(3, rows, dtype=torch.int64)
    logp = pool.empty(rows) if logprobs or k else None
    top_ids = pool.empty(rows, k, dtype=torch.int64) if k else None
    top_logp = pool.empty(rows, k) if k else None
    tokens, phases, finish = integers.unbind()
    out = Sampled(integers, tokens, phases, finish, logp, top_ids, top_logp)
    if not rows:
        return out
    logits = logits if logits.stride(1) == 1 else pool.contiguous(logits)
    if mask is not None and mask.stride(1) != 1:
        mask = pool.contiguous(mask)
    slots, ids = pool.contiguous(slots), control_ids(control)
    SAMPLE(
        pool,
        pool.rows(logits),
        logits.stride(0),
        rows,
        vocab,
        0 if mask is None else mask.data_ptr(),
        0 if mask is None else mask.stride(0),
        slots.data_ptr(),
        state.last_token.data_ptr(),
        state.length.data_ptr(),
        state.tokens_left.data_ptr(),
        state.phase.data_ptr(),
        state.remaining.data_ptr(),
        state.cursor.data_ptr(),
        state.finish.data_ptr(),
        state.temperature.data_ptr(),
        state.top_p.data_ptr(),
        state.seed.data_ptr(),
        state.choice.data_ptr(),
        state.ignore_eos.data_ptr(),
        ids.data_ptr(),
        len(control.eos),
        len(control.closing),
        integers.data_ptr(),
        0 if logp is None else logp.data_ptr(),
        k,
        0 if top_ids is None else top_ids.data_ptr(),
        0 if top_logp is None else top_logp.data_ptr(),
    )
    return out
