"""The published model's Mamba-2 mixer between its projections: the step of 1 and of 4 rows, and a prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headrace.kernels.lab.cases import Case
from headrace.kernels.mamba import MambaWeights
from headrace.kernels.triton import mamba

HEADS, HEAD_DIM, GROUPS, STATE, TAPS, CHUNK = 128, 64, 8, 128, 4, 128
INNER = HEADS * HEAD_DIM
CHANNELS = INNER + 2 * GROUPS * STATE
BF16, FP32, INT64 = 2, 4, 8  # bytes
POSITION = 1001  # of the first row: past the start, anywhere in the ring
# Zeros are as cheap as empty memory and have one representation, unlike the NaN that may stand there: the laboratory
# takes lanes that store different bits to one shared address for a race.


def weights() -> MambaWeights:
    a, d, dt_bias = torch.ones(3, HEADS)
    return MambaWeights(torch.ones(CHANNELS, TAPS), torch.ones(CHANNELS), a, d, dt_bias, HEAD_DIM, GROUPS, STATE)


def caches(slots: int, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(slots, ring, CHANNELS, dtype=torch.bfloat16), torch.zeros(slots, HEADS, HEAD_DIM, STATE)


def update_case(batch: int, rows: int) -> Case:
    def make() -> Callable[[], object]:
        conv, ssm = caches(batch, TAPS - 1 + rows)
        projected = torch.zeros(batch * rows, INNER + CHANNELS + HEADS)
        slots, positions, constant = torch.arange(batch), torch.full((batch,), POSITION), weights()
        return lambda: mamba.mamba_update(projected, conv, ssm, slots, positions, constant, rows)

    states = 2 * FP32 * HEADS * HEAD_DIM * STATE
    ring = BF16 * CHANNELS * (TAPS - 1 + rows)
    row = FP32 * (INNER + CHANNELS + HEADS + INNER)
    return Case(
        name=f"mamba_update, rows {rows}, batch {batch}",
        op="mamba_update",
        make=make,
        minimum_bytes=batch * (states + ring + rows * row + 2 * INT64) + FP32 * (CHANNELS * (TAPS + 1) + 3 * HEADS),
        most_bytes=1.02,
        streamed=("ssm",),
        steps=("BLOCK_P", "SEGMENTS", "SEGMENT"),
        least_in_flight=20_000,
    )


def prefill_case(length: int) -> Case:
    def make() -> Callable[[], object]:
        conv, ssm = caches(1, TAPS)
        projected, constant = torch.zeros(length, INNER + CHANNELS + HEADS), weights()
        return lambda: mamba.mamba_prefill(projected, conv, ssm, 0, CHUNK, constant, CHUNK)

    return Case(
        name=f"mamba_prefill, {length} tokens",
        op="mamba_prefill",
        make=make,
        steps=("LENGTH", "BLOCK_T", "BLOCK_N", "BLOCK_K"),
    )


CASES = (
    *(update_case(batch, 1) for batch in (1, 8, 32, 128)),
    update_case(8, 4),
    *(prefill_case(length) for length in (100, 2048)),
)
