"""Norms, embeddings and routes: the same bits on every path and any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_same_bits, scattered, seeded

from headrace.kernels.moe import Routing
from headrace.kernels.native.library import Pool
from headrace.kernels.native.linear import embed, linear, pack_linear
from headrace.kernels.native.moe import route
from headrace.kernels.native.norm import rms_norm
from headrace.kernels.norm import Norm


@pytest.mark.parametrize(("rows", "width", "groups"), [(1, 1, 1), (40, 1030, 1), (33, 48, 3), (17, 1023, 11)])
def test_a_norm_is_the_one_that_projections_apply(pools: list[Pool], rows: int, width: int, groups: int) -> None:
    x = torch.randn(rows, width, generator=seeded(rows))
    norm = Norm(torch.randn(width, generator=seeded(1)), 1e-5, groups)
    expected = rms_norm(x, norm, pool=pools[0])
    for pool in pools:
        assert_same_bits(rms_norm(scattered(x), norm, pool=pool), expected)
    same = pack_linear([torch.eye(width)], pool=pools[0])
    assert_same_bits(linear(x, same, norm=norm, pool=pools[0]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_of_every_number(pools: list[Pool], dtype: torch.dtype) -> None:
    words = torch.arange(1 << 16, dtype=torch.int32)
    values = (words << 16).view(torch.float32) if dtype != torch.float16 else words.to(torch.int16).view(dtype)
    table = values.to(dtype).view(64, 1024)[:, :1001]
    ids = torch.randint(0, 64, (100,), generator=seeded())
    for pool in pools:
        assert_same_bits(embed(table, ids, pool=pool), table[ids].float())
        assert_same_bits(embed(table.t().contiguous().t(), ids[:1], pool=pool), table[ids[:1]].float())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 90),
    groups=st.integers(1, 5),
    size=st.integers(2, 230),
    share=st.floats(0, 1),
    steps=st.sampled_from([2, 1000]),
    normalise=st.booleans(),
)
def test_routes(pools, rows, groups, size, share, steps, normalise) -> None:
    """Against a stable sort of the same choices; few steps make ties."""
    experts = groups * size
    generator = seeded(experts)
    logits = (torch.randn(rows, experts, generator=generator) * steps).round() / steps
    bias = (torch.randn(experts, generator=generator) * steps).round() / steps * 0.25
    kept = 1 + int(share * (groups - 1))
    routing = Routing(1 + int(share * (min(32, kept * size) - 1)), groups, kept, normalise, 2.5)
    first = route(logits, bias, routing, pool=pools[0])
    for pool in pools[1:]:
        routes = route(scattered(logits), bias, routing, pool=pool)
        assert_same_bits(routes.experts, first.experts)
        assert_same_bits(routes.weights, first.weights)
    # All scores, as the kernel has them, in the order of the experts: of single rows of one group.
    plain = route(logits, torch.zeros(experts), Routing(experts, 1, 1, False, 1.0), pool=pools[0])
    scores = torch.empty(rows, experts).scatter_(1, plain.experts, plain.weights)
    choice = scores + bias
    if groups > 1:
        best = choice.unflatten(1, (groups, size)).sort(dim=-1, descending=True).values
        order = (best[..., 0] + best[..., 1]).sort(dim=-1, descending=True, stable=True).indices
        dropped = torch.ones(rows, groups, dtype=torch.bool).scatter_(1, order[:, :kept], False)
        choice = choice.masked_fill(dropped.repeat_interleave(size, 1), -torch.inf)
    expected = choice.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    assert_same_bits(first.experts, expected)
    weights = scores.gather(1, expected)
    if normalise:
        total = torch.zeros(rows, 1)
        for j in range(routing.top_k):
            total = total + weights[:, j : j + 1]
        weights = weights / (total + 1e-20)
    assert_same_bits(first.weights, weights * 2.5)
