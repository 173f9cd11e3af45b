"""Attention of the published model: 32 query heads over 2 kv heads of 128, contexts of 8192 tokens.

Launch parameters follow neither the batch nor the page size, so not every pair of them is a case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from headrace.kernels.attention import Pages
from headrace.kernels.lab.cases import ARCHITECTURES, Case, Sample
from headrace.kernels.lab.launches import Launch
from headrace.kernels.triton.attention import decode_attention, prefill_attention
from headrace.kernels.triton.attention_decode import FAN
from headrace.kernels.triton.attention_softmax import MIN_FP8_ARCH

HEADS, KV_HEADS, WIDTH = 32, 2, 128
CONTEXT = 8192
FP32 = 4  # bytes
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def make_pages(batch: int, page: int, dtype: torch.dtype) -> tuple[Pages, torch.Tensor]:
    """Pages of ``batch`` contexts, and their table: every sequence's pages lie ``batch`` apart."""
    count = CONTEXT // page
    keys, values = (torch.empty(batch * count, page, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2))
    table = torch.arange(batch * count, dtype=torch.int32).view(count, batch).t().contiguous()
    return Pages(keys, values, 0.5, 0.5) if dtype == FP8 else Pages(keys, values), table


def last_group(launch: Launch) -> Sample:
    """The parts of one kv head that end with the new token: one of them adds up their sums."""
    parts, _, sequences = launch.grid
    return {(part, 0, sequences // 2): launch.ctas / FAN for part in range(parts - FAN, parts)}


def decode_case(batch: int, page: int, dtype: torch.dtype = BF16, rows: int = 1) -> Case:
    def make() -> Callable[[], object]:
        pages, table = make_pages(batch, page, dtype)
        # As one projection gives them, side by side.
        new = torch.randn(batch * rows, HEADS + 2 * KV_HEADS, WIDTH)
        q, k, v = torch.split(new, [HEADS, KV_HEADS, KV_HEADS], 1)
        slots = torch.arange(batch)
        positions = torch.full((batch,), CONTEXT - rows)
        return lambda: decode_attention(q, k, v, pages, table, slots, positions, WIDTH**-0.5, rows)

    op = f"decode attention {str(dtype).removeprefix('torch.')}, {rows} rows, pages of {page}"
    new_rows = batch * rows * (2 * HEADS + 2 * KV_HEADS) * WIDTH * FP32
    return Case(
        name=f"{op}, batch {batch}",
        op=op,
        make=make,
        minimum_bytes=batch * CONTEXT * KV_HEADS * 2 * WIDTH * dtype.itemsize + new_rows,
        most_bytes=1.10 if rows == 1 else 1.30,  # every row leaves its sums
        streamed=("keys", "values"),
        steps=("KEYS", "SEGMENT", "PARTS", "FAN"),
        sample=last_group,
        architectures=architectures(dtype),
    )


def prefill_case(length: int, dtype: torch.dtype) -> Case:
    def make() -> Callable[[], object]:
        pages, table = make_pages(1, 64, dtype)
        q = torch.empty(length, HEADS, WIDTH)
        k, v = torch.empty(2, length, KV_HEADS, WIDTH)
        return lambda: prefill_attention(q, k, v, pages, table, 0, CONTEXT - length, WIDTH**-0.5)

    op = f"prefill attention {str(dtype).removeprefix('torch.')}"
    return Case(
        name=f"{op}, chunk of {length}",
        op=op,
        make=make,
        wide=("keys", "values"),
        steps=("KEYS", "QUERIES"),
        architectures=architectures(dtype),
    )


def architectures(dtype: torch.dtype) -> tuple[int, ...]:
    return tuple(arch for arch in ARCHITECTURES if dtype != FP8 or arch >= MIN_FP8_ARCH)


CASES = (
    decode_case(1, 16),
    decode_case(128, 16),
    decode_case(32, 32),
    decode_case(8, 64),
    decode_case(8, 64, rows=2),
    decode_case(8, 64, rows=4),
    decode_case(32, 64, FP8),
    decode_case(8, 64, FP8, rows=4),
    prefill_case(128, BF16),
    prefill_case(2048, BF16),
    prefill_case(2048, FP8),
)
