"""Paged attention against float64, with NaN in every row of the pages that no token holds and absurd page ids."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded
from torch import Tensor

from headrace.kernels.attention import Pages

GARBAGE_PAGE = -(10**9)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
HALF_ULP = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float8_e4m3fn: 2**-9}  # of what P is rounded to


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  # tokens of each sequence
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    k_scale: float = 1.0
    v_scale: float = 1.0


CASES = [
    Case((1,)),
    Case((2, 1, 5), heads=1, kv_heads=1, width=1, page_size=1),
    Case((127, 128, 129, 1), heads=8, kv_heads=2, width=32),
    Case((300, 17, 256), heads=6, kv_heads=3, width=7, page_size=7),
    Case((131, 40), heads=32, kv_heads=2, width=24, page_size=128),
    Case((5, 270), heads=4, kv_heads=4, width=16, page_size=300),
    Case((700, 255), heads=4, kv_heads=1, page_size=64),
    Case((560, 3), dtype=torch.bfloat16),
    Case((70, 33), heads=16, kv_heads=1, width=128, dtype=torch.bfloat16),
    Case((90, 5), heads=3, kv_heads=1, width=20, page_size=5, dtype=torch.float16),
    Case((261, 17), heads=8, dtype=torch.float8_e4m3fn, k_scale=0.03, v_scale=0.0125),
]
SMALL = Case((300, 257, 40), heads=8, kv_heads=2, width=32)
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


class Paged:
    """Sequences in pages handed out in a shuffled order; what belongs to nobody is NaN."""

    def __init__(self, case: Case, kernels, seed: int = 0) -> None:
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
        keys, values = (torch.full(shape, torch.nan).to(case.dtype) for _ in range(2))
        self.pages = Pages(keys, values, case.k_scale, case.v_scale)
        self.starts = [sum(case.lengths[:i]) for i in range(len(counts))]

    def rows(self, sequence: int, start: int, end: int) -> slice:
        return slice(self.starts[sequence] + start, self.starts[sequence] + end)

    def stored(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values as the pages hold them."""
        case = self.case
        scaled = (self.k[rows] / case.k_scale, self.v[rows] / case.v_scale)
        if case.dtype == torch.float8_e4m3fn:
            scaled = tuple(t.clamp(-448, 448) for t in scaled)
        return tuple(t.to(case.dtype) for t in scaled)

    def fill(self, sequence: int, end: int) -> None:
        """Tokens 0..end - 1 of the sequence, written by other means than the ops'."""
        tokens = torch.arange(end)
        pages = self.table[self.slots[sequence]][tokens // self.case.page_size].long()
        new = self.stored(self.rows(sequence, 0, end))
        for memory, rows in zip((self.pages.keys, self.pages.values), new, strict=True):
            bits = BITS[memory.element_size()]
            memory.view(bits)[pages, tokens % self.case.page_size] = rows.view(bits)

    def prefill(self, sequence: int, start: int, end: int) -> Tensor:
        rows = self.rows(sequence, start, end)
        new = (self.q[rows], self.k[rows], self.v[rows])
        return self.kernels.prefill_attention(*new, self.pages, self.table, self.slots[sequence], start, self.scale)

    def decode(self, sequences: list[int], positions: list[int], rows: int = 1) -> Tensor:
        """The rows from each position on; what comes before them has to be in the pages."""
        at = torch.tensor(positions, dtype=torch.int64)
        starts = torch.tensor([self.starts[s] for s in sequences], dtype=torch.int64) + at
        index = (starts[:, None] + torch.arange(rows)).flatten()
        slots = torch.tensor([self.slots[s] for s in sequences], dtype=torch.int64)
        new = (self.q[index], self.k[index], self.v[index])
        return self.kernels.decode_attention(*new, self.pages, self.table, slots, at, self.scale, rows)

    def check(self, actual: Tensor, sequence: int, first: int, larger: float = 1) -> None:
        """Rows at first, first + 1, ... against float64 from the values as the pages hold them."""
        case = self.case
        end = first + actual.shape[0]
        k, v = (t.double() for t in self.stored(self.rows(sequence, 0, end)))
        shared = case.heads // case.kv_heads
        k, v = ((k * case.k_scale).repeat_interleave(shared, 1), (v * case.v_scale).repeat_interleave(shared, 1))
        q = self.q[self.rows(sequence, first, end)]
        rounds = self.kernels.backend == "triton" and case.dtype in HALF_ULP
        if rounds:
            q = q.to(torch.bfloat16 if case.dtype == torch.float8_e4m3fn else case.dtype)
        scores = torch.einsum("lhd,thd->lht", q.double(), k) * self.scale
        hidden = torch.arange(end) > torch.arange(first, end)[:, None, None]
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected = torch.einsum("lht,thd->lhd", p, v)
        terms = int((case.width + end) * larger**2)
        if not rounds:
            return assert_close(actual, expected, terms)
        # Rounding P moves the mean of v by sum p d (v - mean), where d is uniform within half an ulp: 6 deviations of
        # the worst d, which grows with the spread of v and vanishes for a single token; and fp32 as above.
        none, one, two = (torch.einsum("lht,thd->lhd", p**2, v**power) for power in (0, 1, 2))
        spread = (two - 2 * one * expected + none * expected**2).clamp(min=0).sqrt()
        bound = 6 * HALF_ULP[case.dtype] * spread + 2**-19 * terms**0.5 * expected.abs().amax()
        assert actual.dtype == torch.float32
        excess = ((actual.double() - expected).abs() / bound).max()
        assert excess <= 1, f"{float(excess):.2f} times the bound"


def last(case: Case) -> tuple[list[int], list[int]]:
    return list(range(len(case.lengths))), [length - 1 for length in case.lengths]


def filled(case: Case, kernels, seed: int = 0, rows: int = 1) -> Paged:
    """Every sequence but for its last ``rows`` tokens."""
    paged = Paged(case, kernels, seed)
    for sequence, length in enumerate(case.lengths):
        paged.fill(sequence, length - rows)
    return paged


def twice_the_same(kernels, compute: Callable[[], Tensor]) -> Tensor:
    """The result, the same for every number of threads where there are threads, else for two calls."""
    if kernels.backend != "triton":
        return same_for_all_threads(compute)
    expected = compute()
    assert_same_bits(compute(), expected)
    return expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(kernels, case):
    paged = filled(case, kernels)
    actual = paged.decode(*last(case))
    for sequence, position in zip(*last(case), strict=True):
        paged.check(actual[sequence : sequence + 1], sequence, position)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill(kernels, case):
    paged = Paged(case, kernels)
    for sequence, length in enumerate(case.lengths):
        paged.check(paged.prefill(sequence, 0, length), sequence, 0)


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_tokens_are_written_and_nothing_else(kernels, case, op):
    """To the bit: what the op leaves in the pages is what the tests' own writing leaves."""
    new = min(3, *case.lengths)
    paged, expected = filled(case, kernels, rows=new), filled(case, kernels, rows=0)
    if op == "decode":
        paged.decode(last(case)[0], [length - new for length in case.lengths], new)
    else:
        for sequence, length in enumerate(case.lengths):
            paged.prefill(sequence, length - new, length)
    bits = BITS[case.dtype.itemsize]
    assert torch.equal(paged.pages.keys.view(bits), expected.pages.keys.view(bits))
    assert torch.equal(paged.pages.values.view(bits), expected.pages.values.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_decode_row_does_not_see_the_batch(kernels, dtype, rows):
    case = replace(SMALL, dtype=dtype)
    paged = filled(case, kernels, 1, rows)
    sequences, positions = list(range(3)), [length - rows for length in case.lengths]
    expected = twice_the_same(kernels, lambda: paged.decode(sequences, positions, rows)).unflatten(0, (-1, rows))
    for sequence, position in zip(sequences, positions, strict=True):
        assert_same_bits(paged.decode([sequence], [position], rows), expected[sequence])
    assert_same_bits(paged.decode(sequences[::-1], positions[::-1], rows), expected.flip(0).flatten(0, 1))
    # A neighbour that is NaN in what it brings and in what it has.
    paged.q[paged.rows(1, 0, 257)], paged.k[paged.rows(1, 0, 257)], paged.v[paged.rows(1, 0, 257)] = (torch.nan,) * 3
    paged.fill(1, positions[1])
    beside = paged.decode(sequences, positions, rows).unflatten(0, (-1, rows))
    assert beside[1].isnan().all()
    assert_same_bits(beside[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("dtype", "first"),
    [
        *((dtype, first) for dtype in DTYPES for first in (0, 30, 62, 125)),
        *((torch.float32, 254), (torch.bfloat16, 510), (torch.float8_e4m3fn, 1022)),
    ],
    ids=str,
)
def test_rows_that_are_verified_together_are_the_rows_alone(kernels, dtype, first):
    """Bits, also across the end of a page, a tile of keys and a segment. Triton launches 5 rows as 4 and 1."""
    case = Case((first + 8, first + 5), heads=16, kv_heads=1, page_size=32, dtype=dtype)
    alone = filled(case, kernels, 2, 5)
    positions = [first + 3, first]
    steps = [alone.decode([0, 1], [p + j for p in positions]) for j in range(5)]
    expected = torch.stack(steps, 1)
    for rows in (2, 5):
        together = filled(case, kernels, 2, 5)
        assert_same_bits(together.decode([0, 1], positions, rows).unflatten(0, (-1, rows)), expected[:, :rows])
        together = filled(case, kernels, 2, 5)
        assert_same_bits(together.decode([1], positions[1:], rows), expected[1, :rows])


def test_a_context_of_more_segments_than_parts(kernels):
    """Triton deals 256 tokens of fp32 at a time to 64 programs: two get a second turn, the last one's is not full."""
    case = Case((16384 + 300,), heads=2, kv_heads=1, width=4, page_size=64)
    paged = filled(case, kernels, rows=2)
    paged.check(paged.decode([0], [16384 + 298], 2), 0, 16384 + 298)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", [7, 16, 64, 128])
def test_a_prompt_does_not_see_its_cuts(kernels, dtype, cut):
    """Chunks of any size, with later tokens' pages still NaN."""
    length = 140 if cut < 64 else 200
    case = Case((length, 30), heads=6, kv_heads=1, width=32, dtype=dtype)
    expected = twice_the_same(kernels, lambda: Paged(case, kernels, 2).prefill(0, 0, length))
    chunked = Paged(case, kernels, 2)
    for start in range(0, length, cut):
        end = min(length, start + cut)
        assert_same_bits(chunked.prefill(0, start, end), expected[start:end])


def test_strided_rows(kernels):
    case = Case((140, 20), width=24)
    paged = Paged(case, kernels, 3)
    expected = paged.prefill(0, 0, 140), paged.prefill(1, 0, 20), paged.decode(*last(case))
    strided = Paged(case, kernels, 3)
    strided.q, strided.k, strided.v = scattered(strided.q), scattered(strided.k), scattered(strided.v)
    assert_same_bits(strided.prefill(0, 0, 140), expected[0])
    assert_same_bits(strided.prefill(1, 0, 20), expected[1])
    assert_same_bits(strided.decode(*last(case)), expected[2])
    # As they come out of one projection of all three.
    joined = torch.cat([t[139:140].flatten(1) for t in (strided.q, strided.k, strided.v)], 1)
    new = (t.unflatten(1, (-1, 24)) for t in torch.split(joined, [96, 48, 48], 1))
    at, slots = torch.tensor([139]), torch.tensor([strided.slots[0]])
    out = kernels.decode_attention(*new, strided.pages, strided.table, slots, at, strided.scale)
    assert_same_bits(out[0], expected[2][0])


def test_large_scores_do_not_overflow(kernels):
    case = Case((260,), heads=2, kv_heads=1, width=8)
    paged = Paged(case, kernels, 4)
    paged.q *= 200
    # A score's rounding is relative to its size, and the result follows it.
    paged.check(paged.prefill(0, 0, 260), 0, 0, larger=200)
    paged.check(paged.decode([0], [259]), 0, 259, larger=200)


def test_zero_sizes(kernels):
    paged = filled(Case((5,)), kernels)
    assert paged.decode([], []).shape == (0, 4, 16)
    assert paged.prefill(0, 3, 3).shape == (0, 4, 16)
    assert paged.decode([], [], 4).shape == (0, 4, 16)
