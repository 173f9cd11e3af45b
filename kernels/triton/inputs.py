"""What opens a step, in one launch: page table writes, the rows' token ids, the decode rows' positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.inputs import NO_WRITE
from headrace.kernels.triton.common import cdiv

BLOCK = 128
_NO_WRITE = tl.constexpr(NO_WRITE)


def step_inputs(
    last_token: Tensor, length: Tensor, slots: Tensor, prompt_ids: Tensor, page_table: Tensor, page_writes: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract is ``headrace.kernels.inputs.step_inputs``."""
    decodes, prompts, writes = slots.shape[0], prompt_ids.shape[0], page_writes.shape[0]
    token_ids = torch.empty(decodes + prompts, dtype=torch.int64, device=slots.device)
    positions = torch.empty(decodes, dtype=torch.int64, device=slots.device)
    if not decodes + prompts + writes:
        return token_ids, positions
    _step_inputs[(cdiv(max(decodes + prompts, writes), BLOCK),)](
        token_ids,
        positions,
        last_token,
        length,
        slots,
        prompt_ids,
        page_table,
        page_writes,
        decodes,
        prompts,
        writes,
        last_token.stride(0),
        length.stride(0),
        slots.stride(0),
        prompt_ids.stride(0),
        page_table.stride(0),
        page_table.stride(1),
        page_writes.stride(0),
        page_writes.stride(1),
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return token_ids, positions


@triton.jit(do_not_specialize=["decodes", "prompts", "writes"])
def _step_inputs(
    token_ids,
    positions,
    last_token,
    length,
    slots,
    prompt_ids,
    page_table,
    page_writes,
    decodes,
    prompts,
    writes,
    last_token_stride,
    length_stride,
    slots_stride,
    prompt_stride,
    table_stride,
    page_stride,
    writes_stride,
    field_stride,
    BLOCK: tl.constexpr,
):
    """Nobody here reads the page table, so each program does its share of all three."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)

    write = row < writes
    fields = page_writes + row * writes_stride
    slot = tl.load(fields, mask=write, other=0)
    write &= slot != _NO_WRITE
    index = tl.load(fields + field_stride, mask=write, other=0)
    page = tl.load(fields + 2 * field_stride, mask=write, other=0)
    tl.store(page_table + slot * table_stride + index * page_stride, page.to(tl.int32), mask=write)

    decode = row < decodes
    prompt = (row >= decodes) & (row < decodes + prompts)
    slot = tl.load(slots + row * slots_stride, mask=decode, other=0)
    newest = tl.load(last_token + slot * last_token_stride, mask=decode, other=0)
    tokens = tl.load(length + slot * length_stride, mask=decode, other=0)
    given = tl.load(prompt_ids + (row - decodes) * prompt_stride, mask=prompt, other=0)
    tl.store(token_ids + row, tl.where(decode, newest, given), mask=decode | prompt)
    tl.store(positions + row, tokens - 1, mask=decode)
