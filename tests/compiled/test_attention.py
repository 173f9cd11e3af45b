"""Attention's compiled PTX, executed on the CPU: equal to the reference, and in bits to itself for every batch."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from headrace.kernels import attention as reference
from headrace.kernels.attention import Pages
from headrace.kernels.lab.cases import ARCHITECTURES
from headrace.kernels.lab.cases.attention import CASES, FP8, architectures, decode_case
from headrace.kernels.lab.launches import Launch, capture, execute
from headrace.kernels.lab.numerics import fingerprint
from headrace.kernels.triton import attention

BF16 = torch.bfloat16
PAGE = 16
SUPPORTED = [(arch, dtype) for dtype in (BF16, FP8) for arch in architectures(dtype)]


@dataclass
class Example:
    """Sequences whose pages alternate; what lies beyond their tokens is NaN. Queries are bf16 numbers in fp32."""

    dtype: torch.dtype
    positions: tuple[int, ...]  # of the first new row
    rows: int = 1
    heads: int = 8
    kv_heads: int = 2
    width: int = 32

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        count = (max(self.positions) + self.rows - 1) // PAGE + 1
        sequences = len(self.positions)
        shape = (sequences, count * PAGE, self.kv_heads, self.width)
        keys, values = torch.randn(2, *shape, generator=generator)
        for sequence, position in enumerate(self.positions):
            keys[sequence, position:] = values[sequence, position:] = torch.nan
        self.table = torch.arange(sequences * count, dtype=torch.int32).view(sequences, count).flip(0)
        pages = (t.to(self.dtype).flip(0).reshape(-1, PAGE, *shape[2:]) for t in (keys, values))
        self.pages = Pages(*pages, 0.5, 2.0)
        new = sequences * self.rows
        self.q = torch.randn(new, self.heads, self.width, generator=generator).to(BF16).float()
        self.k, self.v = torch.randn(2, new, self.kv_heads, self.width, generator=generator)

    def copied(self) -> Pages:
        return replace(self.pages, keys=self.pages.keys.clone(), values=self.pages.values.clone())

    def decode(self, op, chosen: list[int], pages: Pages | None = None) -> Tensor:
        slots, positions = torch.tensor(chosen), torch.tensor(self.positions)
        index = (slots[:, None] * self.rows + torch.arange(self.rows)).flatten()
        new = self.q[index], self.k[index], self.v[index]
        pages = pages or self.copied()
        return op(*new, pages, self.table, slots, positions[slots], self.width**-0.5, self.rows)

    def decode_row(self, op, row: int, pages: Pages) -> Tensor:
        """One row of every sequence alone; those before it have to be in the pages."""
        index = torch.arange(len(self.positions)) * self.rows + row
        new = self.q[index], self.k[index], self.v[index]
        slots, positions = torch.arange(len(self.positions)), torch.tensor(self.positions) + row
        return op(*new, pages, self.table, slots, positions, self.width**-0.5)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """P is rounded to bf16 or fp16, at most 2^-9 of each, to both sides."""
    assert (actual - expected).abs().max() <= 2**-8 * expected.abs().max()


def assert_same_bits(actual: Pages, expected: Pages) -> None:
    assert torch.equal(actual.keys.view(torch.uint8), expected.keys.view(torch.uint8))
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize(("arch", "dtype"), SUPPORTED, ids=str)
def test_decode(arch, dtype):
    example = Example(dtype, positions=(520, 3, 255))
    expected_pages, pages = example.copied(), example.copied()
    expected = example.decode(reference.decode_attention, [0, 1, 2], expected_pages)
    with execute(arch) as executions:
        actual = example.decode(attention.decode_attention, [0, 1, 2], pages)
        alone = example.decode(attention.decode_attention, [2])
    assert len(executions) == 2
    assert_near(actual, expected)
    assert_same_bits(pages, expected_pages)
    assert torch.equal(alone[0], actual[2])


@pytest.mark.parametrize(("arch", "dtype"), SUPPORTED, ids=str)
def test_rows_together_are_rows_alone(arch, dtype):
    """A tile of 4 warps with 16 queries each against one of 16 that the warps share, over the end of a tile of keys."""
    example = Example(dtype, positions=(62,), rows=4, heads=16, kv_heads=1)
    with execute(arch):
        together = example.decode(attention.decode_attention, [0])
        pages = example.copied()
        alone = torch.cat([example.decode_row(attention.decode_attention, row, pages) for row in range(4)])
    assert_near(together, example.decode(reference.decode_attention, [0]))
    assert torch.equal(together, alone)


def test_sums_are_added_in_two_levels():
    """Nine parts are two groups; the counters they leave behind serve a second launch."""
    example = Example(BF16, positions=(8 * 512 + 10,), heads=2, kv_heads=1, width=16)
    expected = example.decode(reference.decode_attention, [0])
    with execute(90):
        actual = example.decode(attention.decode_attention, [0])
        again = example.decode(attention.decode_attention, [0])
    assert_near(actual, expected)
    assert torch.equal(again, actual)


@pytest.mark.parametrize(("arch", "dtype"), SUPPORTED, ids=str)
def test_prefill(arch, dtype):
    """Whole, and cut off any tile's boundary: the same bits."""
    example = Example(dtype, positions=(0,), rows=41)
    new, scale = (example.q, example.k, example.v), example.width**-0.5
    expected_pages, pages, cut_pages = (example.copied() for _ in range(3))
    expected = reference.prefill_attention(*new, expected_pages, example.table, 0, 0, scale)
    with execute(arch):
        actual = attention.prefill_attention(*new, pages, example.table, 0, 0, scale)
        parts = [(0, 7), (7, 41)]
        cut = [
            attention.prefill_attention(*(t[a:b] for t in new), cut_pages, example.table, 0, a, scale) for a, b in parts
        ]
    assert_near(actual, expected)
    assert_same_bits(pages, expected_pages)
    assert torch.equal(torch.cat(cut), actual)


def launches_of(case, arch: int) -> list[Launch]:
    with capture(arch) as launches:
        case.make()()
    return launches


@pytest.mark.parametrize(("arch", "dtype"), SUPPORTED, ids=str)
def test_neither_batch_nor_rows_nor_pages_have_another_numerics(arch, dtype):
    """More rows than a tile holds are launched again, by the same numerics."""
    shapes = ((1, 16, 1), (128, 16, 1), (8, 64, 1), (8, 16, 4), (8, 16, 5))
    cases = [decode_case(batch, page, dtype, rows) for batch, page, rows in shapes]
    prints = [fingerprint(launch, case.steps) for case in cases for launch in launches_of(case, arch)]
    assert len(prints) == len(shapes) + 1
    assert all(print_ == prints[0] for print_ in prints)
    assert {"KEYS", "SEGMENT", "PARTS", "FAN"} < prints[0].keys()


def test_fp8_pages_are_refused_where_there_are_no_conversions():
    example = Example(FP8, positions=(3,))
    with capture(80) as launches, pytest.raises(ValueError, match="sm_89"):
        example.decode(attention.decode_attention, [0])
    assert not launches


def test_fp8_heads_of_odd_widths_are_refused():
    example = Example(FP8, positions=(3,), width=24)
    with capture(90) as launches, pytest.raises(ValueError, match="multiple of 16"):
        example.decode(attention.decode_attention, [0])
    assert not launches


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
    assert {arch for case in CASES for arch in case.architectures} == set(ARCHITECTURES)
