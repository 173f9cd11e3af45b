"""Paged attention against float64, with NaN in every page that is not the sequence's and absurd page ids."""

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded
from torch import Tensor

from headrace.kernels import Kernels

GARBAGE_PAGE = -(10**9)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  # tokens of each sequence
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    page_size: int = 16
    dtype: torch.dtype = torch.float32


CASES = [
    Case((1,)),
    Case((2, 1, 5), heads=1, kv_heads=1, width=1, page_size=1),
    Case((127, 128, 129, 1), heads=8, kv_heads=2, width=32),
    Case((300, 17, 256), heads=6, kv_heads=3, width=7, page_size=7),
    Case((131, 40), heads=32, kv_heads=2, width=24, page_size=128),
    Case((5, 270), heads=4, kv_heads=4, width=16, page_size=300),
    Case((1300, 40, 700, 5), heads=4, kv_heads=1),
    Case((200, 3), dtype=torch.bfloat16),
]


class Paged:
    """Sequences in pages handed out in a shuffled order; what belongs to nobody is NaN."""

    def __init__(self, case: Case, kernels: Kernels, seed: int = 0) -> None:
        generator = seeded(seed)
        self.case, self.kernels, self.scale = case, kernels, case.width**-0.5
        total = sum(case.lengths)
        self.q = torch.randn(total, case.heads, case.width, generator=generator)
        self.k, self.v = torch.randn(2, total, case.kv_heads, case.width, generator=generator)
        counts = [-(-length // case.page_size) for length in case.lengths]
        free = torch.randperm(sum(counts) + 2, generator=generator).tolist()
        # Slots in reverse order of the sequences, and one that nobody holds.
        self.slots = list(range(len(counts), 0, -1))
        self.table = torch.full((len(counts) + 1, max(counts) + 1), GARBAGE_PAGE, dtype=torch.int32)
        for slot, count in zip(self.slots, counts, strict=True):
            self.table[slot, :count] = torch.tensor([free.pop() for _ in range(count)])
        shape = (sum(counts) + 2, case.page_size, case.kv_heads, case.width)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=case.dtype) for _ in range(2))
        self.starts = [sum(case.lengths[:i]) for i in range(len(counts))]

    def append(self, sequence: int, start: int, end: int) -> None:
        rows = slice(self.starts[sequence] + start, self.starts[sequence] + end)
        positions = torch.arange(start, end)
        slots = torch.full_like(positions, self.slots[sequence])
        self.kernels.append(self.keys, self.values, self.k[rows], self.v[rows], self.table, slots, positions)

    def fill(self) -> "Paged":
        for sequence, length in enumerate(self.case.lengths):
            self.append(sequence, 0, length)
        return self

    def prefill(self, sequence: int, start: int, end: int, q: Tensor | None = None) -> Tensor:
        q = self.q[self.starts[sequence] + start : self.starts[sequence] + end] if q is None else q
        slot = self.slots[sequence]
        return self.kernels.prefill_attention(q, self.keys, self.values, self.table, slot, start, self.scale)

    def decode(self, sequences: list[int], positions: list[int]) -> Tensor:
        at = torch.tensor(positions, dtype=torch.int64)
        rows = at + torch.tensor([self.starts[s] for s in sequences], dtype=torch.int64)
        slots = torch.tensor([self.slots[s] for s in sequences], dtype=torch.int64)
        return self.kernels.decode_attention(self.q[rows], self.keys, self.values, self.table, slots, at, self.scale)

    def exact(self, sequence: int, position: int) -> Tensor:
        """float64, from the values as the pages store them."""
        start, shared = self.starts[sequence], self.case.heads // self.case.kv_heads
        rows = slice(start, start + position + 1)
        k, v = (t[rows].to(self.case.dtype).double().repeat_interleave(shared, 1) for t in (self.k, self.v))
        scores = torch.einsum("hd,thd->ht", self.q[start + position].double(), k) * self.scale
        return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def last(case: Case) -> tuple[list[int], list[int]]:
    return list(range(len(case.lengths))), [length - 1 for length in case.lengths]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(kernels, case):
    paged = Paged(case, kernels).fill()
    actual = paged.decode(*last(case))
    expected = torch.stack([paged.exact(*pair) for pair in zip(*last(case), strict=True)])
    assert_close(actual, expected, case.width + max(case.lengths))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill(kernels, case):
    paged = Paged(case, kernels).fill()
    for sequence, length in enumerate(case.lengths):
        expected = torch.stack([paged.exact(sequence, position) for position in range(length)])
        assert_close(paged.prefill(sequence, 0, length), expected, case.width + length)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_decode_row_does_not_see_the_batch(kernels, case):
    paged = Paged(case, kernels, 1).fill()
    sequences, positions = last(case)
    expected = same_for_all_threads(lambda: paged.decode(sequences, positions))
    for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        assert_same_bits(paged.decode([sequence], [position])[0], expected[row])
        beside = paged.decode([*sequences, sequence], [*(p // 2 for p in positions), position])
        assert_same_bits(beside[-1], expected[row])
    assert_same_bits(paged.decode(sequences[::-1], positions[::-1]), expected.flip(0))


@pytest.mark.parametrize("cut", [1, 16, 37, 64, 128])
def test_a_prompt_does_not_see_its_cuts(kernels, cut):
    """Chunks of any size, each appended just before it attends, with later tokens' pages still NaN."""
    case = Case((300, 290), heads=8, kv_heads=2, width=32)
    whole = Paged(case, kernels, 2).fill()
    expected = same_for_all_threads(lambda: whole.prefill(0, 0, 300))
    chunked = Paged(case, kernels, 2)
    for start in range(0, 300, cut):
        end = min(300, start + cut)
        chunked.append(0, start, end)
        assert_same_bits(chunked.prefill(0, start, end), expected[start:end])


def test_strided_queries(kernels):
    case = Case((140, 20), width=24)
    paged = Paged(case, kernels, 3).fill()
    q = paged.q[:140]
    assert_same_bits(paged.prefill(0, 0, 140, scattered(q)), paged.prefill(0, 0, 140))
    expected = paged.decode(*last(case))
    paged.q = scattered(paged.q)
    assert_same_bits(paged.decode(*last(case)), expected)


def test_large_scores_do_not_overflow(kernels):
    case = Case((260,), heads=2, kv_heads=1, width=8)
    paged = Paged(case, kernels, 4)
    paged.q *= 200
    paged.fill()
    expected = torch.stack([paged.exact(0, position) for position in range(260)])
    assert_close(paged.prefill(0, 0, 260), expected, 200 * 260)
    assert_close(paged.decode([0], [259])[0], expected[-1], 200 * 260)


def test_append_writes_its_rows_only(kernels):
    case = Case((40, 9), page_size=7)
    paged = Paged(case, kernels, 5)
    paged.append(1, 0, 9)
    written = ~paged.keys.isnan().flatten(2).any(-1)
    assert int(written.sum()) == 9
    pages = paged.table[paged.slots[1], :2].long()
    assert_same_bits(paged.values[pages].flatten(0, 1)[:9], paged.v[40:49])


def test_zero_sizes(kernels):
    paged = Paged(Case((5,)), kernels).fill()
    assert paged.decode([], []).shape == (0, 4, 16)
    assert paged.prefill(0, 3, 3).shape == (0, 4, 16)
    paged.append(0, 2, 2)
