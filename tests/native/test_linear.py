"""Projections and experts: the same bits on every path, on any number of threads, for any batch."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_same_bits, scattered, seeded
from torch import Tensor

from headrace.kernels import linear as reference
from headrace.kernels.moe import Routes
from headrace.kernels.native.library import Pool
from headrace.kernels.native.linear import PANEL, linear, pack_linear
from headrace.kernels.native.moe import experts, pack_experts
from headrace.kernels.norm import Norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same_everywhere(pools: list[Pool], compute: Callable[[Pool], Tensor]) -> Tensor:
    expected = compute(pools[0])
    for pool in pools[1:]:
        assert_same_bits(compute(pool), expected)
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "width"), [(1, 1, 1), (5, 31, 33), (12, 64, 128), (13, 97, 257), (241, 40, 300)]
)
def test_projections(pools: list[Pool], rows: int, outputs: int, width: int, dtype: torch.dtype) -> None:
    generator = seeded(rows)
    weight = torch.randn(outputs, width, generator=generator).to(dtype)
    x, residual = (torch.randn(rows, n, generator=generator) for n in (width, outputs))
    norm = Norm(torch.randn(width, generator=generator), 1e-5, 1)
    whole = same_everywhere(
        pools,
        lambda pool: linear(
            scattered(x), pack_linear([weight], pool=pool), norm=norm, residual=scattered(residual), pool=pool
        ),
    )
    packed = pack_linear([weight], pool=pools[0])
    alone = [linear(x[i : i + 1], packed, norm=norm, residual=residual[i : i + 1], pool=pools[0]) for i in range(rows)]
    assert_same_bits(torch.cat(alone), whole)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    parts=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    other=st.integers(1, 70),
    dim=st.sampled_from([0, 1]),
    dtype=st.sampled_from(DTYPES),
)
def test_weights_side_by_side_are_one_projection(
    pools: list[Pool], rows: int, parts: list[int], other: int, dim: int, dtype: torch.dtype
) -> None:
    generator = seeded(rows + other)
    shapes = [(n, other) if dim == 0 else (other, n) for n in parts]
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    joined = torch.cat(weights, dim)
    x = torch.randn(rows, joined.shape[1], generator=generator)
    apart = same_everywhere(pools, lambda pool: linear(x, pack_linear(weights, dim=dim, pool=pool), pool=pool))
    assert_same_bits(apart, linear(x, pack_linear([joined], pool=pools[0]), pool=pools[0]))
    torch.testing.assert_close(apart, reference.linear(x, reference.pack_linear([joined])), rtol=1e-4, atol=1e-4)


def test_an_element_is_one_chain_over_k(pools: list[Pool]) -> None:
    # 2^24 + 1 - 2^24 is 0 in fp32 when the sum runs in order, and 1 in any order that adds the large ones first.
    weight = torch.tensor([[2.0**24, 1.0, -(2.0**24)]]).expand(PANEL, 3).contiguous()
    for pool in pools:
        y = linear(torch.ones(7, 3), pack_linear([weight], pool=pool), pool=pool)
        assert_same_bits(y, torch.zeros(7, PANEL))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "count", "top_k", "inner", "width"), [(1, 3, 3, 33, 17), (40, 5, 2, 64, 33), (600, 4, 1, 40, 16)]
)
def test_experts(
    pools: list[Pool], rows: int, count: int, top_k: int, inner: int, width: int, dtype: torch.dtype
) -> None:
    generator = seeded(rows)
    up = torch.randn(count, inner, width, generator=generator).to(dtype)
    down = torch.randn(count, width, inner, generator=generator).to(dtype)
    x = torch.randn(rows, width, generator=generator)
    picked = torch.rand(rows, count, generator=generator).argsort(1)[:, :top_k].contiguous()
    routes = Routes(picked, torch.rand(rows, top_k, generator=generator))
    whole = same_everywhere(
        pools, lambda pool: experts(scattered(x), pack_experts(up, down, pool=pool), routes, pool=pool)
    )
    packed = pack_experts(up, down, pool=pools[0])
    for i in range(0, rows, max(rows // 5, 1)):
        alone = Routes(picked[i : i + 1], routes.weights[i : i + 1])
        assert_same_bits(experts(x[i : i + 1], packed, alone, pool=pools[0]), whole[i : i + 1])
