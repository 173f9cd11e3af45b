"""What one step feeds the model, and the caches it reads and advances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.engine.config import LayerKind, ModelConfig


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows: decode rows first (one token per sequence), then the prefill chunks' tokens, chunk after chunk.

    Every chunk starts at a multiple of the model's ``chunk_size``, and only a prompt's last one may end off it. A
    chunk that starts at 0 begins from zero states, whatever its slot's memory holds.
    """

    token_ids: Tensor  # [T] int64
    decode_slots: Tensor  # [D] int64
    decode_positions: Tensor  # [D] int64, index of the row's token in its sequence = tokens cached for it already
    chunk_slots: tuple[int, ...]  # [P]
    chunk_starts: tuple[int, ...]  # [P] index of the chunk's first token in its sequence
    chunk_lengths: tuple[int, ...]  # [P] tokens
    page_table: Tensor  # [num_slots, max_pages] int32, page ids by slot; garbage beyond a sequence's pages
    sample_rows: Tensor  # [R] int64, rows whose logits are wanted

    @property
    def num_decodes(self) -> int:
        return self.decode_slots.shape[0]

    def chunks(self) -> Iterator[tuple[slice, int, int]]:
        """(rows, slot, position of the first token) of each chunk."""
        end = self.num_decodes
        for slot, start, length in zip(self.chunk_slots, self.chunk_starts, self.chunk_lengths, strict=True):
            yield slice(end, end + length), slot, start
            end += length


@dataclass(frozen=True, slots=True)
class Caches:
    """What sequences leave behind between steps. Every layer of a kind has its own tensors, in layer order."""

    keys: tuple[Tensor, ...]  # per attention layer [num_pages, page_size, kv_heads, head_dim]
    values: tuple[Tensor, ...]
    conv: tuple[Tensor, ...]  # per Mamba layer [num_slots, ring, conv_dim]: the newest inputs, by position % ring
    ssm: tuple[Tensor, ...]  # per Mamba layer [num_slots, heads, head_dim, state] fp32

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_slots: int,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> Caches:
        """Zeroed caches. ``dtype`` is that of convolution inputs, and of keys and values but for ``kv_dtype``.

        States are always fp32.
        """
        pages: tuple[int, ...] = ()
        if config.attention:
            pages = (num_pages, page_size, config.attention.num_kv_heads, config.attention.head_dim)
        conv: tuple[int, ...] = ()
        ssm: tuple[int, ...] = ()
        if mamba := config.mamba:
            conv = (num_slots, mamba.conv_kernel, mamba.conv_dim)
            ssm = (num_slots, mamba.num_heads, mamba.head_dim, mamba.state_size)

        def layers(kind: LayerKind, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.count(kind)))

        return cls(
            keys=layers(LayerKind.ATTENTION, pages, kv_dtype or dtype),
            values=layers(LayerKind.ATTENTION, pages, kv_dtype or dtype),
            conv=layers(LayerKind.MAMBA, conv, dtype),
            ssm=layers(LayerKind.MAMBA, ssm, torch.float32),
        )
