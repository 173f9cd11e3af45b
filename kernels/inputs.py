"""What opens a step: the page table brought up to date, the rows' token ids, the decode rows' positions."""

from __future__ import annotations

import torch
from torch import Tensor

NO_WRITE = -1
"""Stands for the slot in a row of ``page_writes`` that only fills it up."""


def step_inputs(
    last_token: Tensor, length: Tensor, slots: Tensor, prompt_ids: Tensor, page_table: Tensor, page_writes: Tensor
) -> tuple[Tensor, Tensor]:
    """(token_ids [D + P], positions [D]) of D decode rows and P prompt tokens after them, all int64.

    last_token, length [num_slots] int64: a slot's newest token and its number of tokens, the newest one included;
    slots [D] int64; prompt_ids [P] int64; page_table [num_slots, max_pages] int32, in which page_writes [W, 3] int64
    (slot, index, page) are carried out, in place; those with slot NO_WRITE are none.
    """
    page_writes = page_writes[page_writes[:, 0] != NO_WRITE]
    page_table[page_writes[:, 0], page_writes[:, 1]] = page_writes[:, 2].int()
    return torch.cat([last_token[slots], prompt_ids]), length[slots] - 1
