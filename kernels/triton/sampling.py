"""Fused sampling in three launches, four with top log-probabilities; the contract is ``headrace.kernels.sampling``."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.control import ControlIds
from headrace.kernels.sampling import Sampled, SamplerState
from headrace.kernels.triton.common import cdiv, next_power_of_2
from headrace.kernels.triton.sampling_nucleus import BUCKETS
from headrace.kernels.triton.sampling_passes import RECORD, decide_kernel, extremes_kernel, masses_kernel, top_kernel
from headrace.kernels.triton.scratch import counters

FIELDS = [field.name for field in fields(SamplerState)]
State = namedtuple("State", FIELDS)  # type: ignore[misc]  # SamplerState in the form that kernels take


@dataclass(frozen=True, slots=True)
class Parameters:
    """How the vocabulary is split over programs; nothing here depends on the number of rows."""

    tile: int  # tokens of a program
    tiles: int  # programs of a row
    num_warps: int
    num_stages: int


@cache
def parameters(vocab: int) -> Parameters:
    """At 131072 tokens 128 programs a row: one row nearly fills an H200 (132 SMs), many rows are 4 KB a program.

    4 warps load such a tile by two 128-bit loads a thread, and 28 or more warps fit an SM in every pass; tiles of 2048
    would double the registers and halve that. Small vocabularies (tests, tiny models) get fewer, smaller tiles. No loop
    runs over the logits, so there is nothing to pipeline: one stage.
    """
    tile = min(max(next_power_of_2(cdiv(vocab, 128)), 512), 1024)
    return Parameters(tile=tile, tiles=cdiv(vocab, tile), num_warps=4, num_stages=1)


def sample(
    logits: Tensor,
    slots: Tensor,
    state: SamplerState,
    control: ControlIds,
    *,
    mask: Tensor | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
) -> Sampled:
    """Decide one token per row and advance the rows' slots. See ``headrace.kernels.sampling.sample``.

    Scratch is 8 bytes per logit: were all tokens equally likely, all would be in the list of undecided ones.
    """
    rows, vocab = logits.shape
    k = min(top_logprobs, vocab)
    out = _outputs(rows, k, logprobs or k > 0, logits.device)
    if rows == 0:
        return out
    chosen = parameters(vocab)
    scratch = Scratch.allocate(rows, vocab, chosen.tiles, logits.device)
    every = _arguments_of_every_kernel(logits, scratch, chosen)
    drawing = every | {
        "mask": mask,
        "mask_strides": (0, 0) if mask is None else mask.stride(),
        "slots": slots,
        "state": State(*(getattr(state, name) for name in FIELDS)),
    }
    closing_count = len(control.closing)
    grid = (chosen.tiles, rows)
    extremes_kernel[grid](
        tile_raw=scratch.tile_raw,
        tile_best=scratch.tile_best,
        histograms=scratch.histograms,
        closing_count=closing_count,
        TILES=next_power_of_2(chosen.tiles),
        **drawing,
    )
    masses_kernel[grid](histograms=scratch.histograms, LOGPROBS=out.logprobs is not None, **drawing)
    decide_kernel[grid](
        control=control_ids(control, logits.device),
        tile_best=scratch.tile_best,
        list_index=scratch.list_index,
        list_scaled=scratch.list_scaled,
        tokens=out.tokens,
        phases=out.phases,
        finish=out.finish,
        logprobs=out.logprobs,
        eos_count=len(control.eos),
        closing_count=closing_count,
        **drawing,
    )
    if k:
        _find_most_likely(out, k, chosen.tiles, every)
    return out


def _find_most_likely(out: Sampled, k: int, tiles: int, every: dict[str, Any]) -> None:
    rows, device = out.tokens.shape[0], out.tokens.device
    top_kernel[tiles, rows](
        tile_ranks=torch.empty(rows, tiles * k, dtype=torch.int64, device=device),
        top_ids=out.top_ids,
        top_logprobs=out.top_logprobs,
        k=k,
        RANKS=next_power_of_2(tiles * k),
        **every,
    )


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the three passes hand on; nothing in it outlives the call, nothing needs clearing before it."""

    records: Tensor  # int64 [rows, RECORD], see sampling_passes
    tile_raw: Tensor  # fp32 [rows, tiles], the largest raw logits
    tile_best: Tensor  # int64 [rows, tiles], ranks of the largest allowed logits
    histograms: Tensor  # int64 [rows, BUCKETS]
    list_index: Tensor  # int32 [rows, vocab], tokens whose place is undecided until the last pass
    list_scaled: Tensor  # fp32 [rows, vocab], their scaled logits

    @classmethod
    def allocate(cls, rows: int, vocab: int, tiles: int, device: torch.device) -> Scratch:
        return cls(
            torch.empty(rows, RECORD.value, dtype=torch.int64, device=device),
            torch.empty(rows, tiles, dtype=torch.float32, device=device),
            torch.empty(rows, tiles, dtype=torch.int64, device=device),
            torch.empty(rows, BUCKETS.value, dtype=torch.int64, device=device),
            torch.empty(rows, vocab, dtype=torch.int32, device=device),
            torch.empty(rows, vocab, dtype=torch.float32, device=device),
        )


def _arguments_of_every_kernel(logits: Tensor, scratch: Scratch, chosen: Parameters) -> dict[str, Any]:
    rows, vocab = logits.shape
    return {
        "logits": logits,
        "logits_strides": logits.stride(),
        "records": scratch.records,
        "arrived": counters(logits.device, rows),
        "vocab": vocab,
        "TILE": chosen.tile,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": False,
    }


@cache
def control_ids(control: ControlIds, device: torch.device) -> Tensor:
    """The ids as ``budget`` reads them, int64; copied to the device once."""
    ids = (control.think, control.end_think, control.tool_call, *control.eos, *control.closing)
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _outputs(rows: int, k: int, logprobs: bool, device: torch.device) -> Sampled:
    """Tensors for what the step decides."""
    # Rows of whole 16 bytes, so that kernels are compiled for one alignment.
    integers = torch.empty(3, rows + rows % 2, dtype=torch.int64, device=device)
    tokens, phases, finish = integers[:, :rows].unbind()
    return Sampled(
        integers,
        tokens,
        phases,
        finish,
        torch.empty(rows, dtype=torch.float32, device=device) if logprobs else None,
        torch.empty(rows, k, dtype=torch.int64, device=device) if k else None,
        torch.empty(rows, k, dtype=torch.float32, device=device) if k else None,
    )
