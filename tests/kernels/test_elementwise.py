"""The elementwise functions: values, extremes, and bits that do not depend on an element's place in memory."""

import pytest
import torch
from kernel_checks import assert_same_bits, same_for_all_threads, seeded

from headrace.kernels import activation

FUNCTIONS = {
    "sigmoid": (activation.sigmoid, lambda x: 1 / (1 + torch.exp(-x))),
    "silu": (activation.silu, lambda x: x / (1 + torch.exp(-x))),
    "softplus": (activation.softplus, lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    "relu2": (activation.relu2, lambda x: x.clamp(min=0).square()),
}
PRIMITIVES = {"exp": torch.exp, "log1p": lambda x: torch.log1p(x.abs()), "rsqrt": lambda x: torch.rsqrt(x.abs() + 1e-5)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name):
    function, exact = FUNCTIONS[name]
    x = torch.cat([torch.linspace(-30, 30, 5001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0])])
    torch.testing.assert_close(function(x).double(), exact(x.double()), rtol=1e-6, atol=1e-37)


def test_extremes():
    """Nothing overflows into NaN on the way."""
    x = torch.tensor([-torch.inf, -1e30, -200.0, 200.0, 1e18, torch.inf])
    assert_same_bits(activation.sigmoid(x), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    assert_same_bits(activation.softplus(x), torch.tensor([0.0, 0.0, 0.0, 200.0, 1e18, torch.inf]))
    assert_same_bits(activation.silu(x[1:]), torch.tensor([0.0, 0.0, 200.0, 1e18, torch.inf]))
    for name, (function, _) in FUNCTIONS.items():
        assert function(torch.tensor([torch.nan])).isnan().all(), name


@pytest.mark.parametrize("name", [*PRIMITIVES, *FUNCTIONS])
def test_place_does_not_matter(name):
    """Offsets, lengths around the vector width, strides, threads: torch's own silu and softplus fail here."""
    function = PRIMITIVES[name] if name in PRIMITIVES else FUNCTIONS[name][0]
    x = torch.randn(40_001, generator=seeded()) * 8
    expected = same_for_all_threads(lambda: function(x))
    for start, length in [(0, 1), (1, 1), (0, 7), (3, 9), (5, 16), (7, 33), (11, 257), (1, 40_000)]:
        part = slice(start, start + length)
        assert_same_bits(function(x[part].clone()), expected[part])
        assert_same_bits(function(x[part]), expected[part])
    assert_same_bits(function(x[::3]), expected[::3])
    table = x[:40_000].view(200, 200)
    assert_same_bits(function(table.t()).t().reshape(-1), expected[:40_000])
    assert_same_bits(function(table[:, 3:20]), expected[:40_000].view(200, 200)[:, 3:20])
