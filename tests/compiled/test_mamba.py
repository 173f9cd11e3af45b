"""Compiled Mamba-2, executed from its PTX, against the references; neither batch, rows nor cuts change a bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from headrace.kernels import mamba as reference
from headrace.kernels.lab.cases import ARCHITECTURES, Case
from headrace.kernels.lab.cases.mamba import CASES
from headrace.kernels.lab.launches import Launch, capture, execute
from headrace.kernels.lab.numerics import same_numerics
from headrace.kernels.mamba import MambaWeights
from headrace.kernels.triton import mamba

HEADS, WIDTH, GROUPS, STATE, TAPS, CHUNK, RING = 2, 24, 1, 40, 4, 32, 8
CHANNELS = HEADS * WIDTH + 2 * GROUPS * STATE
STEP = tuple[Tensor, Tensor, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> MambaWeights:
    a, d, dt_bias = random(3, HEADS, seed=1)
    taps, bias = random(CHANNELS, TAPS, seed=2) / 2, random(CHANNELS, seed=3)
    return MambaWeights(taps, bias, -torch.exp(a), d, dt_bias - 1, WIDTH, GROUPS, STATE)


def caches(slots: int) -> tuple[Tensor, Tensor]:
    return random(slots, RING, CHANNELS, seed=4).bfloat16(), random(slots, HEADS, WIDTH, STATE, seed=5)


def assert_like(actual: STEP, expected: STEP, tolerance: float) -> None:
    """Relative to an element, or to the root mean square where the element is smaller."""
    for one, other in zip(actual, expected, strict=True):
        one, other = one.float(), other.float()
        scale = torch.maximum(other.abs(), other.square().mean().sqrt())
        assert float(((one - other).abs() / scale).max()) <= tolerance


def update(op: Callable[..., Tensor], sequences: list[int], rows: int) -> STEP:
    """The op on some of four sequences, at positions around the start and the ring's end, in slots 3, 0, 2, 1."""
    conv, ssm = caches(4)
    projected = random(4, rows, HEADS * WIDTH + CHANNELS + HEADS, seed=6)[sequences].flatten(0, 1)
    slots, positions = torch.tensor([3, 0, 2, 1])[sequences], torch.tensor([0, 7, 1, 1000])[sequences]
    y = op(projected, conv, ssm, slots, positions, weights(), rows)
    return y, conv[slots], ssm[slots]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_update(arch):
    """Four sequences at once against the reference; alone and in single steps to the bit."""
    with execute(arch):
        together = update(mamba.mamba_update, [0, 1, 2, 3], 3)
        alone = update(mamba.mamba_update, [1], 3)
    # Exponentials are right within some 2^-22 of their value; 2^-18 of the results' size is beyond their sums.
    assert_like(together, update(reference.mamba_update, [0, 1, 2, 3], 3), 2**-18)
    for one, all_ in zip(alone, together, strict=True):
        assert torch.equal(one.flatten(), all_.unflatten(0, (4, -1))[1].flatten()), "a sequence's bits follow the batch"


@pytest.mark.parametrize("arch", [90])
def test_rows_are_single_steps(arch):
    projected = random(4, HEADS * WIDTH + CHANNELS + HEADS, seed=7)
    slots, position = torch.tensor([1]), torch.tensor([6])
    (conv, ssm), (conv_single, ssm_single) = caches(2), caches(2)
    with execute(arch):
        together = mamba.mamba_update(projected, conv, ssm, slots, position, weights(), 4)
        single = [
            mamba.mamba_update(projected[j : j + 1], conv_single, ssm_single, slots, position + j, weights())
            for j in range(4)
        ]
    assert torch.equal(together, torch.cat(single))
    assert torch.equal(ssm, ssm_single)
    assert torch.equal(conv, conv_single)


def prefill(op: Callable[..., Tensor], cuts: list[int]) -> STEP:
    """70 tokens that continue a sequence of one chunk, in runs between the cuts."""
    conv, ssm = caches(2)
    projected = random(70, HEADS * WIDTH + CHANNELS + HEADS, seed=8)
    ends = [*cuts, 70]
    parts = [
        op(projected[first:end], conv, ssm, 1, CHUNK + first, weights(), CHUNK)
        for first, end in zip([0, *cuts], ends, strict=True)
    ]
    return torch.cat(parts), conv, ssm


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prefill(arch):
    with execute(arch) as executions:
        whole = prefill(mamba.mamba_prefill, [])
        cut = prefill(mamba.mamba_prefill, [CHUNK])
    assert all(set(one.compiled.report().mma) <= {"HMMA.16816.F32.BF16"} for one in executions)
    # Products of pairs of bf16 are right within 2^-16, evenly to both sides (kernels/triton/mamba_prefill.py).
    assert_like(whole, prefill(reference.mamba_prefill, []), 2**-15)
    for one, other in zip(cut, whole, strict=True):
        assert torch.equal(one, other), "a prompt's bits follow its cuts"


def launches_of(case: Case, arch: int) -> list[Launch]:
    with capture(arch) as launches:
        case.make()()
    return launches


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_no_size_has_another_numerics(op):
    cases = [case for case in CASES if case.op == op]
    same_numerics({case.name: launches_of(case, 90) for case in cases}, cases[0].steps)
