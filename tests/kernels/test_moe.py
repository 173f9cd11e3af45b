"""Routing and experts against plain loops in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import (
    assert_close,
    assert_same_bits,
    exact_weight,
    same_for_all_threads,
    scattered,
    seeded,
    stored_as,
)
from torch import Tensor

from headrace.kernels.formats import Format, Weight
from headrace.kernels.moe import Routes, Routing


def exact_route(logits: Tensor, bias: Tensor, routing: Routing) -> tuple[list[list[int]], list[list[float]]]:
    """Row by row with Python's sort, which keeps ties in index order."""
    picks, weights = [], []
    for row in logits:
        scores = (1 / (1 + torch.exp(-row))).tolist()
        choice = (torch.tensor(scores) + bias).tolist()
        size = len(choice) // routing.groups
        allowed = range(len(choice))
        if routing.groups > 1:
            worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(routing.groups)]
            best = sorted(range(routing.groups), key=lambda g: -worth[g])[: routing.topk_groups]
            allowed = [e for e in allowed if e // size in best]
        picked = sorted(allowed, key=lambda e: -choice[e])[: routing.top_k]
        total = sum(scores[e] for e in picked) + 1e-20 if routing.normalise else 1.0
        picks.append(picked)
        weights.append([scores[e] / total * routing.scale for e in picked])
    return picks, weights


ROUTINGS = [
    (1, Routing(1, 1, 1, True, 1.0)),
    (16, Routing(4, 1, 1, True, 2.5)),
    (16, Routing(16, 1, 1, False, 1.0)),
    (13, Routing(3, 1, 1, False, 0.5)),
    (8, Routing(2, 4, 1, True, 1.0)),
    (24, Routing(5, 4, 2, True, 5.0)),
    (24, Routing(24, 3, 3, True, 5.0)),
    (512, Routing(22, 1, 1, True, 5.0)),
]


@pytest.mark.parametrize("rows", [0, 1, 5, 67])
@pytest.mark.parametrize(("experts", "routing"), ROUTINGS, ids=str)
def test_route(kernels, experts, routing, rows):
    generator = seeded()
    logits = torch.randn(rows, experts, generator=generator)
    bias = torch.randn(experts, generator=generator) * 0.1
    routes = kernels.route(logits, bias, routing)
    picked, weights = routes.experts, routes.weights
    expected_picks, expected_weights = exact_route(logits, bias, routing)
    assert picked.shape == weights.shape == (rows, routing.top_k)
    assert picked.dtype == torch.int64
    assert picked.tolist() == expected_picks
    assert_close(weights, torch.tensor(expected_weights, dtype=torch.float64).view(weights.shape), routing.top_k)


def test_ties_go_to_the_lowest_index(kernels):
    routes = kernels.route(torch.zeros(3, 16), torch.zeros(16), Routing(4, 1, 1, True, 1.0))
    assert routes.experts.tolist() == [[0, 1, 2, 3]] * 3
    assert routes.weights.tolist() == [[0.25] * 4] * 3
    routes = kernels.route(torch.zeros(1, 16), torch.zeros(16), Routing(4, 4, 2, True, 1.0))
    assert routes.experts.tolist() == [[0, 1, 2, 3]]
    routes = kernels.route(torch.zeros(1, 16), torch.eye(16)[9], Routing(4, 4, 2, True, 1.0))
    assert routes.experts.tolist() == [[9, 0, 1, 2]], "group 2 for its expert 9, group 0 for its index"


def test_scores_that_saturate_are_ties(kernels):
    """Past 17 the fp32 sigmoid is exactly 1, and far below zero exactly 0: then the bias and the index decide."""
    logits = torch.tensor([[20.0, 90.0, 30.0, -200.0, -120.0]])
    routes = kernels.route(logits, torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0]), Routing(5, 1, 1, False, 1.0))
    assert routes.experts.tolist() == [[2, 0, 1, 3, 4]]
    assert routes.weights.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]]


def test_the_bias_only_selects(kernels):
    """A bias that turns the choice round leaves the weights those of the scores."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    routes = kernels.route(logits, torch.tensor([-9.0, -9.0, 0.0, 0.5]), Routing(2, 1, 1, False, 1.0))
    assert routes.experts.tolist() == [[3, 2]]
    assert_close(routes.weights, torch.sigmoid(logits.double())[:, [3, 2]])


def test_routing_does_not_see_rows_or_threads(kernels):
    logits, bias = torch.randn(67, 24, generator=seeded(3)), torch.zeros(24)
    routing = Routing(5, 4, 2, True, 5.0)
    if kernels.backend == "reference":
        same_for_all_threads(lambda: kernels.route(logits, bias, routing).experts)
        same_for_all_threads(lambda: kernels.route(logits, bias, routing).weights)
    routes = kernels.route(scattered(logits), bias, routing)
    picked, weights = routes.experts, routes.weights
    for row in range(67):
        alone = kernels.route(logits[row : row + 1], bias, routing)
        assert_same_bits(alone.experts[0], picked[row])
        assert_same_bits(alone.weights[0], weights[row])


@pytest.mark.parametrize("routing", [Routing(5, 1, 1, True, 5.0), Routing(6, 4, 2, True, 5.0)], ids=str)
def test_a_row_of_nan_picks_real_experts_and_harms_no_other(kernels, routing):
    logits, bias = torch.randn(3, 24, generator=seeded(4)), torch.zeros(24)
    expected = kernels.route(logits, bias, routing)
    for poison in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        poisoned = logits.clone()
        poisoned[1] = poison
        routes = kernels.route(poisoned, bias, routing)
        assert len({expert for expert in routes.experts[1].tolist() if 0 <= expert < 24}) == routing.top_k
        for row in (0, 2):
            assert_same_bits(routes.experts[row], expected.experts[row])
            assert_same_bits(routes.weights[row], expected.weights[row])


@pytest.mark.parametrize(
    ("rows", "experts", "top_k"),
    [(1, 512, 22), (67, 24, 3), (40, 5, 5), (33, 600, 2), (5, 9, 1), (64, 16, 2), (150, 1024, 32), (3, 400, 300)],
)
def test_tiles_hold_every_pair_once(kernels, rows, experts, top_k):
    """The Triton backend's plan: pairs in order of expert, then row; tiles of at most 16; unused slots say so."""
    if kernels.backend != "triton":
        pytest.skip("the reference needs no plan")
    logits = torch.randn(rows, experts, generator=seeded(5))
    logits[:, [0, experts // 2]] = 9.0  # these have a pair of every row; pairs are grouped 128 at a time
    routes = kernels.route(logits, torch.zeros(experts), Routing(top_k, 1, 1, True, 1.0))
    pairs = routes.experts.flatten()
    assert routes.plan.order.tolist() == pairs.argsort(stable=True).tolist()
    expected, place = [], 0
    for expert, count in enumerate(torch.bincount(pairs, minlength=experts).tolist()):
        expected += [(expert, place + start, min(16, count - start)) for start in range(0, count, 16)]
        place += count
    slots = [tuple(slot) for slot in routes.plan.tiles.t().tolist()]
    assert slots[: len(expected)] == expected
    assert all(count == 0 for _, _, count in slots[len(expected) :])


def test_more_experts_than_fit_are_refused(kernels):
    if kernels.backend != "triton":
        pytest.skip("the reference takes any number")
    with pytest.raises(ValueError, match="1025 experts: at most 1024"):
        kernels.route(torch.zeros(1, 1025), torch.zeros(1025), Routing(1, 1, 1, True, 1.0))


@dataclass(frozen=True)
class Case:
    rows: int
    experts: int
    top_k: int
    width: int
    inner: int
    pick: str = "random"  # random | one: all rows on one expert | none_first: expert 0 has no row
    format: Format = "float"


CASES = [
    Case(0, 4, 2, 16, 24),
    Case(1, 16, 4, 64, 128),
    Case(5, 3, 1, 7, 5),
    Case(33, 1, 1, 13, 17),
    Case(64, 16, 4, 64, 128),
    Case(40, 8, 1, 16, 32, "one"),
    Case(19, 6, 3, 16, 32, "none_first"),
    Case(20, 30, 22, 32, 48),
    Case(3, 4, 2, 600, 70),  # too wide for fp32 experts in one launch
]
QUANTISED = [
    Case(0, 4, 2, 16, 32, format="fp8"),
    Case(5, 3, 1, 7, 5, format="fp8"),
    Case(33, 16, 4, 64, 128, format="fp8"),
    Case(1, 16, 4, 64, 128, format="nvfp4"),
    Case(33, 7, 3, 48, 80, format="nvfp4"),
    Case(19, 6, 3, 16, 32, "none_first", format="nvfp4"),
    Case(40, 8, 1, 16, 32, "one", format="nvfp4"),
    Case(20, 30, 22, 32, 48, format="nvfp4"),
    Case(2, 3, 2, 1040, 1056, format="nvfp4"),  # more than the reference expands at a time
]


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Weight, Weight, Tensor, Tensor]:
    """x, up, down, picked, weights; of quantised experts each has a scale of its own."""
    generator = seeded(seed)
    x = torch.randn(case.rows, case.width, generator=generator)
    up = torch.randn(case.experts, case.inner, case.width, generator=generator) * case.width**-0.5
    down = torch.randn(case.experts, case.width, case.inner, generator=generator) * case.inner**-0.5
    if case.format != "float":
        sizes = torch.linspace(0.5, 2, case.experts)[:, None, None]
        up, down = stored_as(case.format, up * sizes), stored_as(case.format, down * sizes.flip(0))
    order = torch.rand(case.rows, case.experts, generator=generator)
    if case.pick == "none_first":
        order[:, 0] = 2.0
    picked = order.argsort(-1)[:, : case.top_k].contiguous()
    if case.pick == "one":
        picked.fill_(case.experts - 1)
    return x, up, down, picked, torch.rand(case.rows, case.top_k, generator=generator)


def routes_to(kernels, picked: Tensor, weights: Tensor, experts: int) -> Routes:
    """Routes that the backend itself makes for given picks, with given weights."""
    logits = torch.full((picked.shape[0], experts), -20.0)
    logits.scatter_(1, picked, torch.linspace(2, -2, picked.shape[1]).expand(picked.shape))
    routes = kernels.route(logits, torch.zeros(experts), Routing(picked.shape[1], 1, 1, True, 1.0))
    assert routes.experts.tolist() == picked.tolist()
    return replace(routes, weights=weights)


def exact_experts(
    x: Tensor, up: Weight, down: Weight, picked: Tensor, weights: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(the result, the largest single term's magnitude per row) in float64; what is multiplied is rounded to dtype."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    largest = torch.zeros(x.shape[0], 1, dtype=torch.float64)
    up, down = exact_weight(up), exact_weight(down)
    for row in range(x.shape[0]):
        for expert, weight in zip(picked[row].tolist(), weights[row].tolist(), strict=True):
            inner = (up[expert] @ x[row].to(dtype).double()).clamp(min=0).square().to(dtype).double()
            terms = weight * down[expert] * inner
            out[row] += terms.sum(1)
            largest[row] = max(largest[row], terms.abs().max())
    return out, largest


@pytest.mark.parametrize("case", CASES + QUANTISED, ids=str)
def test_experts(kernels, case):
    x, up, down, picked, weights = inputs(case)
    routes = routes_to(kernels, picked, weights, case.experts)
    packed = kernels.pack_experts(up, down)
    actual = kernels.experts(x, packed, routes)
    if case.format != "float" and kernels.backend == "triton":
        assert_rounded_alike(actual, kernels, x, up, down, picked, weights)
    else:
        expected, _ = exact_experts(x, up, down, picked, weights)
        assert_close(actual, expected, case.width + case.inner + case.top_k)
    strided = replace(routes, weights=scattered(weights))
    assert_same_bits(kernels.experts(scattered(x), packed, strided), actual)
    residual = torch.randn(x.shape, generator=seeded(1))
    for given in (residual, scattered(residual)):
        assert_same_bits(kernels.experts(x, packed, routes, residual=given), residual + actual)
    assert_same_bits(kernels.experts(x, packed, routes), actual)


@pytest.mark.parametrize("case", [Case(33, 16, 4, 64, 128), Case(7, 3, 2, 13, 17), Case(2, 4, 2, 1040, 72)], ids=str)
def test_experts_in_bf16(kernels, case):
    """The reference multiplies in fp32; a GPU rounds x and the squares to bf16 first, and so must the exact result.

    A square so near the middle between two bf16 values that fp32 and float64 round it apart moves one term by one ulp,
    2^-7 of it at most. Two of those in one sum are allowed for; a row has 4 * 128 squares, and of them about 0.1 do.
    """
    x, up, down, picked, weights = inputs(case)
    up, down = up.bfloat16(), down.bfloat16()
    actual = kernels.experts(x, kernels.pack_experts(up, down), routes_to(kernels, picked, weights, case.experts))
    assert_rounded_alike(actual, kernels, x, up, down, picked, weights)


def assert_rounded_alike(actual: Tensor, kernels, *problem) -> None:
    expected, largest = exact_experts(*problem, torch.bfloat16 if kernels.backend == "triton" else torch.float64)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    if expected.numel():
        assert ((actual - expected).abs() <= 2 * 2**-7 * largest + 1e-5 * expected.abs().amax((0, 1), True)).all()


def test_fp16_experts_keep_their_precision(kernels):
    x, up, down, picked, weights = inputs(Case(3, 4, 2, 16, 24))
    up, down = up.half(), down.half()
    routes = routes_to(kernels, picked, weights, 4)
    expected, _ = exact_experts(x, up, down, picked, weights)
    assert_close(kernels.experts(x, kernels.pack_experts(up, down), routes), expected, 16 + 24 + 2)


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_scales_multiply_finished_sums(kernels, form):
    """Whole numbers, and of every expert another power of two: nothing is rounded, so nothing may differ."""
    generator, experts, width, inner = seeded(6), 5, 32, 48
    x = torch.randint(-2, 3, (9, width), generator=generator).float()
    up = torch.randint(-1, 2, (experts, inner, width), generator=generator).float()
    down = torch.randint(-1, 2, (experts, width, inner), generator=generator).float()
    for weight in (up, down):  # a largest value from which the encoder makes a power of two
        weight[:, 0, :16] = 0
        weight[:, 0, 0] = 7 if form == "fp8" else 21
    scales = 2.0 ** torch.arange(-2, 3)
    packed = kernels.pack_experts(with_scales(form, up, scales), with_scales(form, down, scales.flip(0) / 8))
    picked = torch.rand(9, experts, generator=generator).argsort(-1)[:, :2].contiguous()
    weights = torch.tensor([[0.5, 2.0]]).expand(9, 2).contiguous()
    dense = up * scales[:, None, None], down * scales.flip(0)[:, None, None] / 8
    expected, _ = exact_experts(x, *dense, picked, weights)
    rounded, _ = exact_experts(x, *dense, picked, weights, torch.bfloat16)
    assert_same_bits(
        kernels.experts(x, packed, routes_to(kernels, picked, weights, experts)),
        (rounded if kernels.backend == "triton" else expected).float(),
    )


def with_scales(form: Format, weight: Tensor, scales: Tensor) -> Weight:
    """weight [E, N, K] as unscaled values, and scales [E]."""
    stored = stored_as(form, weight)
    unscaled = stored.unscaled().float() * stored.scale[:, None, None]
    assert torch.equal(unscaled, weight), "whole numbers that the format holds"
    return replace(stored, scale=stored.scale * scales)


@pytest.mark.parametrize("form", ["float", "fp8", "nvfp4"])
def test_experts_of_two_formats_are_refused(kernels, form):
    _, up, down, *_ = inputs(Case(1, 4, 2, 32, 48, format=form))
    _, _, other, *_ = inputs(Case(1, 4, 2, 32, 48, format="nvfp4" if form == "fp8" else "fp8"))
    kernels.pack_experts(up, down)
    with pytest.raises(ValueError, match=f"one format, got {form}, "):
        kernels.pack_experts(up, other)


@pytest.mark.parametrize("case", [case for case in CASES + QUANTISED if case.rows], ids=str)
def test_a_token_does_not_see_the_others(kernels, case):
    x, up, down, picked, weights = inputs(case, 1)
    packed = kernels.pack_experts(up, down)

    def run(x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        return kernels.experts(x, packed, routes_to(kernels, picked[rows], weights[rows], case.experts))

    expected = same_for_all_threads(lambda: run(x)) if kernels.backend == "reference" else run(x)
    order = torch.randperm(case.rows, generator=seeded(2))
    assert_same_bits(run(x[order], order), expected[order])
    for row in {0, case.rows // 2, case.rows - 1}:
        part = slice(row, row + 1)
        assert_same_bits(run(x[part], part), expected[part])
    poisoned = torch.full_like(x, torch.nan)
    poisoned[0] = x[0]
    assert_same_bits(run(poisoned)[0], expected[0])


@pytest.mark.parametrize("case", [Case(17, 4, 2, 13, 49), Case(17, 4, 2, 600, 20), Case(40, 5, 4, 7, 5)], ids=str)
def test_a_gpu_would_forgive_it(kernels, case):
    """Programs in any order, no lane out of bounds, no race, nothing that hangs on masked lanes."""
    if kernels.backend != "triton":
        pytest.skip("only Triton's interpreter can be watched")
    from headrace.kernels.lab.sanitizer import sanitize

    x, up, down, picked, weights = inputs(case)
    x, packed = scattered(x), kernels.pack_experts(up, down)

    def run() -> Tensor:
        return kernels.experts(x, packed, routes_to(kernels, picked, weights, case.experts), residual=x)

    with sanitize():
        actual = run()
    assert_same_bits(actual, run())
