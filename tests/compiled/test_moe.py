"""Compiled routing and experts, executed from their PTX, against the references; one numerics for every batch."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from headrace.kernels import moe as reference
from headrace.kernels.formats import Fp8, Nvfp4, Weight
from headrace.kernels.lab.cases import ARCHITECTURES, Case
from headrace.kernels.lab.cases.moe import CASES
from headrace.kernels.lab.launches import Launch, capture, execute
from headrace.kernels.lab.numerics import same_numerics
from headrace.kernels.moe import Routes, Routing
from headrace.kernels.triton import moe


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("experts", "routing"), [(70, Routing(7, 1, 1, True, 5.0)), (24, Routing(5, 4, 2, False, 1.0))]
)
def test_route_picks_and_groups_as_the_reference(arch, experts, routing):
    logits, bias = random(19, experts), random(experts, seed=1) / 10
    with execute(arch):
        routes = moe.route(logits, bias, routing)
        alone = moe.route(logits[3:4], bias, routing)
    expected = reference.route(logits, bias, routing)
    assert routes.experts.tolist() == expected.experts.tolist()
    torch.testing.assert_close(routes.weights, expected.weights, rtol=1e-5, atol=0)
    assert routes.plan.order.tolist() == expected.experts.flatten().argsort(stable=True).tolist()
    assert torch.equal(alone.experts[0], routes.experts[3])
    assert torch.equal(alone.weights[0], routes.weights[3])


def run(arch: int, x: Tensor, logits: Tensor, up: Weight, down: Weight, top_k: int) -> tuple[Tensor, Routes, list[str]]:
    """The experts' result, the routes, the names of what was launched."""
    packed = moe.pack_experts(up, down)
    with execute(arch) as executions:
        routes = moe.route(logits, torch.zeros(logits.shape[1]), Routing(top_k, 1, 1, True, 5.0))
        y = moe.experts(x, packed, routes)
    return y, routes, [execution.launch.name for execution in executions]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("width", "inner", "kernels"),
    [(128, 72, ["_route", "_fused", "_combine"]), (1056, 24, ["_route", "_up", "_down", "_combine"])],
)
def test_experts_are_the_references_whatever_the_batch(arch, width, inner, kernels):
    """17 rows need a second tile for the expert they share, and make a program add up several slices."""
    experts, top_k, rows = 5, 3, 17
    x, logits = random(rows, width), random(rows, experts, seed=1)
    logits[:, 2] = 9.0
    up = (random(experts, inner, width, seed=2) * width**-0.5).bfloat16()
    down = (random(experts, width, inner, seed=3) * inner**-0.5).bfloat16()
    y, routes, launched = run(arch, x, logits, up, down, top_k)
    assert launched == kernels
    expected = reference.experts(x.bfloat16().float(), reference.pack_experts(up, down), routes)
    # The squares are rounded to bf16, 2^-9 of each and evenly to both sides: 2^-6 of the mean is far beyond that.
    assert (y - expected).abs().max() <= 2**-6 * expected.square().mean().sqrt()
    for row in (0, 16):
        alone, _, _ = run(arch, x[row : row + 1], logits[row : row + 1], up, down, top_k)
        assert torch.equal(alone[0], y[row]), "a row's bits follow the batch"


def any_bits(form: str, experts: int, outputs: int, width: int, seed: int) -> Weight:
    """Experts of all codes there are but NaN, products about 1."""
    generator = torch.Generator().manual_seed(seed)

    def stored(*shape: int) -> Tensor:
        bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return torch.where(bits & 0x7F == 0x7F, 0, bits).view(torch.float8_e4m3fn)

    scale = torch.linspace(1, 2, experts) / (100 if form == "fp8" else 300) / width**0.5
    if form == "fp8":
        return Fp8(stored(experts, outputs, width), scale)
    codes = torch.randint(0, 256, (experts, outputs, width // 2), generator=generator, dtype=torch.uint8)
    return Nvfp4(codes, stored(experts, outputs, width // 16), scale)


QUANTISED = [("fp8", 144, 72), ("nvfp4", 144, 80), ("fp8", 1040, 40), ("nvfp4", 1040, 80)]
QUANTISED_RUNS = [(arch, *run) for arch in ARCHITECTURES for run in (QUANTISED if arch == 90 else QUANTISED[:2])]


@pytest.mark.parametrize(("arch", "form", "width", "inner"), QUANTISED_RUNS)
def test_quantised_experts_are_the_references_whatever_the_batch(arch, form, width, inner):
    """Sizes that are no whole units; several slices a program; of 1040 columns in two launches.

    Bits at random are large numbers and small ones: a square may be most of a sum, so twice what normal ones may err.
    """
    experts, top_k, rows = 4, 3, 17
    x, logits = random(rows, width), random(rows, experts, seed=1)
    logits[:, 2] = 9.0
    up, down = any_bits(form, experts, inner, width, 2), any_bits(form, experts, width, inner, 3)
    y, routes, launched = run(arch, x, logits, up, down, top_k)
    assert ("_fused" in launched) == (width == 144 and arch != 120)
    expected = reference.experts(x.bfloat16().float(), reference.pack_experts(up, down), routes)
    assert (y - expected).abs().max() <= 2**-5 * expected.square().mean().sqrt()
    for row in (0, 16):
        alone, _, _ = run(arch, x[row : row + 1], logits[row : row + 1], up, down, top_k)
        assert torch.equal(alone[0], y[row]), "a row's bits follow the batch"


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_experts_stay_as_they_are_stored(form):
    """Of whole units not a byte more than their weights have."""
    up, down = any_bits(form, 3, 128, 192, 1), any_bits(form, 3, 192, 128, 2)
    packed = moe.pack_experts(up, down)
    kept = [t for t in (packed.tiles, packed.block_scales, packed.up_scale, packed.down_scale) if t is not None]
    assert sum(t.nbytes for t in kept) == up.nbytes + down.nbytes


@pytest.mark.parametrize(("width", "inner"), [(128, 72), (1056, 24)])
def test_a_few_rows_more_compile_nothing(width, inner):
    """Neither the number of rows nor what it makes of other arguments is a reason for another variant."""
    packed = moe.pack_experts(torch.empty(512, inner, width), torch.empty(512, width, inner))

    def variants(rows: int) -> list[tuple[object, ...]]:
        x = torch.empty(rows, width, dtype=torch.float32)
        with capture(90) as launches:
            routes = moe.route(torch.empty(rows, 512), torch.empty(512), Routing(3, 1, 1, True, 5.0))
            moe.experts(x, packed, routes, residual=x)
        return [(launch.name, launch.signature, launch.constants, launch.attributes) for launch in launches]

    one = variants(1)
    for rows in (2, 3, 16, 17, 48):
        assert variants(rows) == one, rows


def launches_of(case: Case, arch: int) -> list[Launch]:
    with capture(arch) as launches:
        case.make()()
    return launches


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_no_batch_has_another_numerics(arch, op):
    cases = [case for case in CASES if case.op == op]
    same_numerics({case.name: launches_of(case, arch) for case in cases}, cases[0].steps)
