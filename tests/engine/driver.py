"""Runs a model step by step without an engine: shuffled pages, slots full of NaN, any mix of decodes and chunks."""

import torch
from torch import Tensor

from headrace.engine.model import Batch, Caches, NemotronH

GARBAGE_PAGE = 2**31 - 1
NONE = torch.empty(0, dtype=torch.int64)


class Driver:
    """Caches for ``num_slots`` sequences. Every sequence owns its slot and as many pages as it may need."""

    def __init__(
        self,
        model: NemotronH,
        num_slots: int,
        *,
        max_tokens: int = 512,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        per_slot = -(-max_tokens // page_size)
        pages = num_slots * per_slot
        self.caches = Caches.allocate(model.config, num_slots, pages, page_size, dtype=dtype, kv_dtype=kv_dtype)
        for tensor in (*self.caches.keys, *self.caches.values, *self.caches.conv, *self.caches.ssm):
            tensor.fill_(torch.nan)
        order = torch.randperm(num_slots * per_slot, generator=torch.Generator().manual_seed(seed))
        self.page_table = torch.full((num_slots, per_slot + 1), GARBAGE_PAGE, dtype=torch.int32)
        self.page_table[:, :per_slot] = order.view(num_slots, per_slot)
        self.lengths = [0] * num_slots

    def step(self, decodes: dict[int, int] | None = None, chunks: dict[int, list[int]] | None = None) -> Tensor:
        """One step: a token for each decoding slot, a run of prompt tokens for each prefilling one.

        Returns the logits of all rows: the decodes in the order given, then the chunks' tokens.
        """
        decodes, chunks = decodes or {}, chunks or {}
        token_ids = [*decodes.values(), *(token for ids in chunks.values() for token in ids)]
        batch = Batch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            decode_slots=torch.tensor(list(decodes), dtype=torch.int64),
            decode_positions=torch.tensor([self.lengths[slot] for slot in decodes], dtype=torch.int64),
            chunk_slots=tuple(chunks),
            chunk_starts=tuple(self.lengths[slot] for slot in chunks),
            chunk_lengths=tuple(len(ids) for ids in chunks.values()),
            page_table=self.page_table,
            sample_rows=torch.arange(len(token_ids)),
        )
        logits = self.model.logits(self.model.forward(batch, self.caches))
        for slot in decodes:
            self.lengths[slot] += 1
        for slot, ids in chunks.items():
            self.lengths[slot] += len(ids)
        return logits

    def greedy(self, slot: int, prompt: list[int], count: int) -> list[int]:
        """The prompt in one chunk, then ``count`` most likely tokens."""
        tokens = [int(self.step(chunks={slot: prompt})[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step({slot: tokens[-1]})[0].argmax()))
        return tokens


def random_prompt(length: int, vocab: int, seed: int) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
