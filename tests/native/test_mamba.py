"""Mamba: the same bits on every path and any number of threads; rounding into the ring; softplus."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_same_bits, scattered, seeded
from torch import Tensor

from headrace.kernels.mamba import MambaWeights
from headrace.kernels.native.library import Pool
from headrace.kernels.native.mamba import mamba_prefill, mamba_update

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(groups: int, shared: int, width: int, state: int, taps: int, seed: int) -> MambaWeights:
    generator = seeded(seed)
    heads = groups * shared
    channels = heads * width + 2 * groups * state
    return MambaWeights(
        conv_weight=torch.randn(channels, taps, generator=generator) / taps**0.5,
        conv_bias=torch.randn(channels, generator=generator) if seed % 2 else None,
        a=-torch.exp(torch.randn(heads, generator=generator)),
        d=torch.randn(heads, generator=generator),
        dt_bias=torch.randn(heads, generator=generator) - 1,
        head_dim=width,
        groups=groups,
        state_size=state,
    )


def caches(weights: MambaWeights, slots: int, ring: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    channels, heads = weights.conv_weight.shape[0], weights.a.shape[0]
    conv = torch.randn(slots, ring, channels, generator=generator).to(dtype)
    return conv, torch.randn(slots, heads, weights.head_dim, weights.state_size, generator=generator)


def rows_for(weights: MambaWeights, rows: int, seed: int) -> Tensor:
    width = weights.inner + weights.conv_weight.shape[0] + weights.a.shape[0]
    return torch.randn(rows, width, generator=seeded(seed))


def assert_same_everywhere(pools: list[Pool], run) -> None:
    expected = run(pools[0])
    for pool in pools[1:]:
        for actual, wanted in zip(run(pool), expected, strict=True):
            assert_same_bits(actual, wanted)


SHAPES = {
    "groups": st.integers(1, 3),
    "shared": st.integers(1, 9),
    "width": st.integers(1, 40),
    "state": st.integers(1, 50),
    "taps": st.integers(1, 6),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 9),
}


@settings(max_examples=40, deadline=None)
@given(sequences=st.integers(1, 5), rows=st.integers(1, 40), **SHAPES)
def test_update(pools, sequences, rows, groups, shared, width, state, taps, dtype, seed) -> None:
    weights = make(groups, shared, width, state, taps, seed)
    conv, ssm = caches(weights, sequences, taps - 1 + rows + seed, dtype, seed)
    projected = scattered(rows_for(weights, sequences * rows, seed))
    slots = torch.randperm(sequences, generator=seeded(seed))
    positions = torch.randint(0, 50, (sequences,), generator=seeded(seed)) * (torch.arange(sequences) > 0)

    def run(pool: Pool) -> tuple[Tensor, ...]:
        rings, states = scattered(conv), scattered(ssm)
        return mamba_update(projected, rings, states, slots, positions, weights, rows, pool=pool), rings, states

    assert_same_everywhere(pools, run)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 300), chunk=st.integers(1, 100), before=st.integers(0, 2), **SHAPES)
def test_prefill(pools, length, chunk, before, groups, shared, width, state, taps, dtype, seed) -> None:
    weights = make(groups, shared, width, state, taps, seed)
    conv, ssm = caches(weights, 2, taps + seed, dtype, seed)
    projected = scattered(rows_for(weights, length, seed))

    def run(pool: Pool) -> tuple[Tensor, ...]:
        rings, states = scattered(conv), scattered(ssm)
        y = mamba_prefill(projected, rings, states, 1, before * chunk, weights, chunk, pool=pool)
        return y, rings, states

    assert_same_everywhere(pools, run)


def test_rings_round_as_torch_does(pools: list[Pool]) -> None:
    """Ties, subnormals, the edges of the range, infinities and NaN."""
    sixteenths = torch.arange(1 << 16, dtype=torch.int32)
    words = torch.cat([sixteenths << 16, sixteenths << 16 | 0x8000, sixteenths << 16 | 0x7FFF, sixteenths << 12])
    halves = torch.cat([sixteenths << 12 | 0x38000000, sixteenths << 12 | 0x33000000, sixteenths + 0x477F0000])
    values = torch.cat([words, halves]).view(torch.float32)
    channels = values.numel()
    weights = MambaWeights(
        conv_weight=torch.ones(channels, 1),
        conv_bias=None,
        a=torch.full((1,), -1.0),
        d=torch.zeros(1),
        dt_bias=torch.zeros(1),
        head_dim=channels - 2,
        groups=1,
        state_size=1,
    )
    projected = torch.cat([torch.zeros(channels - 2), values, torch.zeros(1)])[None]
    for dtype in DTYPES:
        for pool in pools:
            conv, ssm = caches(weights, 1, 2, dtype, 0)
            mamba_update(projected, conv, ssm, torch.tensor([0]), torch.tensor([7]), weights, pool=pool)
            assert_same_bits(conv[0, 1], values.to(dtype))


def test_steps_in_time_are_right_to_a_few_ulp(pools: list[Pool]) -> None:
    """softplus against float64, over all that a step in time can be: the state after one token is dt x B."""
    raw = torch.cat([torch.linspace(-85, 90, 100_000), torch.linspace(-2, 2, 50_000), torch.tensor([0.0, -0.0])])
    heads = raw.numel()
    weights = MambaWeights(
        conv_weight=torch.ones(heads + 2, 1),
        conv_bias=None,
        a=torch.full((heads,), -1.0),
        d=torch.zeros(heads),
        dt_bias=torch.zeros(heads),
        head_dim=1,
        groups=1,
        state_size=1,
    )
    # 40 is its own silu in fp32, so that x is 40 and B is 40.
    projected = torch.cat([torch.zeros(heads), torch.full((heads + 2,), 40.0), raw])[None]
    exact = torch.logaddexp(raw.double(), torch.zeros((), dtype=torch.float64)) * 1600
    for pool in pools:
        conv, ssm = caches(weights, 1, 2, torch.float32, 0)
        mamba_update(projected, conv, ssm, torch.tensor([0]), torch.tensor([0]), weights, pool=pool)
        error = (ssm.flatten().double() - exact).abs() / exact
        assert error.max() < 4 * 2**-23


@pytest.mark.parametrize("taps", [64, 300])
def test_a_long_convolution(pools: list[Pool], taps: int) -> None:
    weights = make(1, 2, 20, 17, taps, 1)
    conv, ssm = caches(weights, 1, taps + 2, torch.float32, 0)
    projected = rows_for(weights, 3, 0)
    inputs = weights.split(projected)[1]
    mixed = torch.cat([conv[0, 2 : taps + 1], inputs[:1]]).double()  # at position taps + 1, the ring's last entry
    total = (mixed * weights.conv_weight.t()).sum(0) + weights.conv_bias
    x, b, c = weights.heads((total * torch.sigmoid(total))[None])
    raw = (weights.split(projected)[2][0] + weights.dt_bias).double()
    dt = torch.logaddexp(raw, torch.zeros_like(raw))
    before = ssm[0].double()
    h = before * torch.exp(dt * weights.a)[:, None, None] + (x[0] * dt[:, None])[..., None] * b[0][:, None, :]
    for pool in pools:
        states = ssm.clone()
        slots, positions = torch.tensor([0]), torch.tensor([taps + 1])
        mamba_update(projected[:1], conv.clone(), states, slots, positions, weights, pool=pool)
        torch.testing.assert_close(states[0].double(), h, rtol=1e-4, atol=1e-4)
