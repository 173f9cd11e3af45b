"""RMS norms against float64, row by row the same bits."""

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded

from headrace.kernels.norm import Norm


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    groups: int = 1


CASES = [
    Case(0, 16), Case(0, 12, 3), Case(1, 1), Case(1, 160), Case(2, 7), Case(5, 13, 13), Case(3, 4096), Case(17, 33, 3),
    Case(64, 176, 2), Case(1, 8192, 8), Case(130, 160, 4), Case(4, 20_000), Case(4, 65_536), Case(1, 65_536),
]  # fmt: skip


def exact(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    x = x.double().unflatten(1, (norm.groups, -1))
    return (x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()).flatten(1) * norm.weight.double()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rms_norm(kernels, case):
    generator = seeded()
    x = torch.randn(case.rows, case.width, generator=generator) * 3
    norm = Norm(torch.randn(case.width, generator=generator), 1e-5, case.groups)
    expected = kernels.rms_norm(x, norm)
    if kernels.backend == "reference":
        same_for_all_threads(lambda: kernels.rms_norm(x, norm))
    assert_close(expected, exact(x, norm), case.width // case.groups)
    assert_same_bits(kernels.rms_norm(scattered(x), norm), expected)
    assert_same_bits(kernels.rms_norm(x.t().contiguous().t(), norm), expected)
    for row in range(min(case.rows, 3)):
        assert_same_bits(kernels.rms_norm(x[row : row + 1], norm), expected[row : row + 1])


def test_eps_bounds_a_zero_row(kernels):
    assert_same_bits(kernels.rms_norm(torch.zeros(2, 8), Norm(torch.ones(8), 1e-5)), torch.zeros(2, 8))


def test_a_nan_stays_in_its_group(kernels):
    x = torch.randn(3, 64, generator=seeded())
    norm = Norm(torch.ones(64), 1e-5, groups=2)
    expected = kernels.rms_norm(x, norm)
    x[1, 5] = torch.nan
    actual = kernels.rms_norm(x, norm)
    assert actual[1, :32].isnan().all()
    assert_same_bits(actual[[0, 2]], expected[[0, 2]])
    assert_same_bits(actual[1, 32:], expected[1, 32:])
