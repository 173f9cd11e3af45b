"""RMS norms against float64, row by row the same bits."""

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    groups: int = 1


CASES = [
    Case(0, 16), Case(0, 12, 3), Case(1, 1), Case(1, 160), Case(2, 7), Case(5, 13, 13), Case(3, 4096), Case(17, 33, 3),
    Case(64, 176, 2), Case(1, 8192, 8), Case(130, 160, 4), Case(4, 20_000), Case(4, 65_536), Case(1, 65_536),
]  # fmt: skip


def exact(x: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    x = x.double().view(x.shape[0], groups, x.shape[1] // groups)
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(1) * weight.double()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rms_norm(kernels, case):
    generator = seeded()
    x = torch.randn(case.rows, case.width, generator=generator) * 3
    weight = torch.randn(case.width, generator=generator)
    expected = same_for_all_threads(lambda: kernels.rms_norm(x, weight, 1e-5))
    assert_close(expected, exact(x, weight, 1, 1e-5), case.width)
    assert_same_bits(kernels.rms_norm(scattered(x), weight, 1e-5), expected)
    assert_same_bits(kernels.rms_norm(x.t().contiguous().t(), weight, 1e-5), expected)
    for row in range(min(case.rows, 5)):
        assert_same_bits(kernels.rms_norm(x[row : row + 1], weight, 1e-5), expected[row : row + 1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gated_rms_norm(kernels, case):
    generator = seeded(1)
    y, gate = torch.randn(2, case.rows, case.width, generator=generator) * 3
    weight = torch.randn(case.width, generator=generator)
    expected = same_for_all_threads(lambda: kernels.gated_rms_norm(y, gate, weight, case.groups, 1e-5))
    gated = y.double() * gate.double() * torch.sigmoid(gate.double())
    assert_close(expected, exact(gated, weight, case.groups, 1e-5), case.width)
    assert_same_bits(kernels.gated_rms_norm(scattered(y), scattered(gate), weight, case.groups, 1e-5), expected)
    for row in range(min(case.rows, 5)):
        part = slice(row, row + 1)
        assert_same_bits(kernels.gated_rms_norm(y[part], gate[part], weight, case.groups, 1e-5), expected[part])


def test_eps_bounds_a_zero_row(kernels):
    assert_same_bits(kernels.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


def test_a_nan_row_stays_alone(kernels):
    x = torch.randn(3, 64, generator=seeded())
    expected = kernels.rms_norm(x, torch.ones(64), 1e-5)
    x[1, 5] = torch.nan
    actual = kernels.rms_norm(x, torch.ones(64), 1e-5)
    assert actual[1].isnan().all()
    assert_same_bits(actual[[0, 2]], expected[[0, 2]])
