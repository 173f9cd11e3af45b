"""Linear against float64, and the evidence for tiles of 16 rows: no row's bits depend on what is around it."""

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded

from headrace.kernels.linear import bmm


@dataclass(frozen=True)
class Case:
    rows: int
    inputs: int
    outputs: int
    bias: bool = False
    dtype: torch.dtype = torch.float32


CASES = [
    Case(0, 16, 16),
    Case(0, 7, 5, bias=True),
    Case(1, 1, 1),
    Case(1, 176, 704),
    Case(2, 7, 5, bias=True),
    Case(3, 13, 17, dtype=torch.bfloat16),
    Case(15, 64, 648, bias=True, dtype=torch.float16),
    Case(16, 160, 16),
    Case(17, 257, 33),
    Case(31, 4096, 1),
    Case(64, 160, 640),
    Case(131, 40, 8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(kernels, case):
    generator = seeded()
    x = torch.randn(case.rows, case.inputs, generator=generator)
    weight = torch.randn(case.outputs, case.inputs, generator=generator).to(case.dtype)
    bias = torch.randn(case.outputs, generator=generator).to(case.dtype) if case.bias else None
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    packed = kernels.pack_linear(weight, bias)
    assert_close(kernels.linear(x, packed), expected, case.inputs)
    assert_same_bits(kernels.linear(scattered(x), packed), kernels.linear(x, packed))


@pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=str)
def test_a_row_does_not_see_its_neighbours(kernels, case):
    """Alone, moved, beside NaN rows, in a larger batch, with other thread counts: the same bits."""
    generator = seeded(1)
    x = torch.randn(case.rows, case.inputs, generator=generator)
    packed = kernels.pack_linear(torch.randn(case.outputs, case.inputs, generator=generator))
    expected = same_for_all_threads(lambda: kernels.linear(x, packed))
    order = torch.randperm(case.rows, generator=generator)
    assert_same_bits(kernels.linear(x[order], packed), expected[order])
    assert_same_bits(kernels.linear(x.repeat(3, 1), packed), expected.repeat(3, 1))
    for row in {0, case.rows // 2, case.rows - 1}:
        assert_same_bits(kernels.linear(x[row : row + 1], packed), expected[row : row + 1])
        poisoned = torch.full_like(x, torch.nan)
        poisoned[row] = x[row]
        assert_same_bits(kernels.linear(poisoned, packed)[row], expected[row])


SIZES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 80, 129, 352)


def test_bmm_does_not_see_batch_or_threads():
    """The primitive under every reference, over a grid of shapes. torch.mm fails this from its first rows."""
    generator = seeded(2)
    for inner in SIZES:
        for columns in SIZES:
            a = torch.randn(5, 16, inner, generator=generator)
            b = torch.randn(5, inner, columns, generator=generator)
            expected = same_for_all_threads(lambda a=a, b=b: bmm(a, b))
            for tile in range(5):
                assert_same_bits(bmm(a[tile : tile + 1], b[tile : tile + 1])[0], expected[tile])
            order = torch.randperm(16, generator=generator)
            assert_same_bits(bmm(a[:, order], b), expected[:, order])
            assert_close(expected, a.double() @ b.double(), inner)


def test_zero_sizes():
    assert bmm(torch.ones(0, 16, 4), torch.ones(0, 4, 3)).shape == (0, 16, 3)
    assert bmm(torch.ones(2, 0, 4), torch.ones(2, 4, 3)).shape == (2, 0, 3)
    assert_same_bits(bmm(torch.ones(2, 5, 0), torch.ones(2, 0, 3)), torch.zeros(2, 5, 3))
