"""Compiled routing and experts, executed from their PTX, against the references; one numerics for every batch."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from headrace.kernels import moe as reference
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


def run(arch: int, x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int) -> tuple[Tensor, Routes, list[str]]:
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
