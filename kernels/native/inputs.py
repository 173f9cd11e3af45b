"""What opens a step; see ``kernels/inputs.py`` for the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.native.library import Op, Pool

STEP_INPUTS = Op("step_inputs", "q" * 19)


def step_inputs(
    last_token: Tensor,
    length: Tensor,
    slots: Tensor,
    prompt_ids: Tensor,
    page_table: Tensor,
    page_writes: Tensor,
    *,
    pool: Pool,
) -> tuple[Tensor, Tensor]:
    """As the reference's; so little that the caller's thread does it."""
    decodes, prompts = slots.shape[0], prompt_ids.shape[0]
    token_ids = pool.empty(decodes + prompts, dtype=torch.int64)
    positions = pool.empty(decodes, dtype=torch.int64)
    STEP_INPUTS(
        pool,
        last_token.data_ptr(),
        length.data_ptr(),
        slots.data_ptr(),
        decodes,
        prompt_ids.data_ptr(),
        prompts,
        page_table.data_ptr(),
        page_table.stride(0),
        page_writes.data_ptr(),
        page_writes.shape[0],
        last_token.stride(0),
        length.stride(0),
        slots.stride(0),
        prompt_ids.stride(0),
        page_table.stride(1),
        page_writes.stride(0),
        page_writes.stride(1),
        token_ids.data_ptr(),
        positions.data_ptr(),
    )
    return token_ids, positions
