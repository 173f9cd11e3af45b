"""Routing and experts against plain loops in float64."""

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, same_for_all_threads, scattered, seeded
from torch import Tensor

from headrace.kernels.moe import Routing


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
    picked, weights = kernels.route(logits, bias, routing)
    expected_picks, expected_weights = exact_route(logits, bias, routing)
    assert picked.shape == weights.shape == (rows, routing.top_k)
    assert picked.tolist() == expected_picks
    assert_close(weights, torch.tensor(expected_weights, dtype=torch.float64).view(weights.shape), routing.top_k)


def test_ties_go_to_the_lowest_index(kernels):
    picked, weights = kernels.route(torch.zeros(3, 16), torch.zeros(16), Routing(4, 1, 1, True, 1.0))
    assert picked.tolist() == [[0, 1, 2, 3]] * 3
    assert weights.tolist() == [[0.25] * 4] * 3
    picked, _ = kernels.route(torch.zeros(1, 16), torch.zeros(16), Routing(4, 4, 2, True, 1.0))
    assert picked.tolist() == [[0, 1, 2, 3]]
    picked, _ = kernels.route(torch.zeros(1, 16), torch.eye(16)[9], Routing(4, 4, 2, True, 1.0))
    assert picked.tolist() == [[9, 0, 1, 2]], "group 2 for its expert 9, group 0 for its index"


def test_the_bias_only_selects(kernels):
    """A bias that turns the choice round leaves the weights those of the scores."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    picked, weights = kernels.route(logits, torch.tensor([-9.0, -9.0, 0.0, 0.5]), Routing(2, 1, 1, False, 1.0))
    assert picked.tolist() == [[3, 2]]
    assert_close(weights, torch.sigmoid(logits.double())[:, [3, 2]])


def test_routing_does_not_see_rows_or_threads(kernels):
    logits, bias = torch.randn(67, 24, generator=seeded(3)), torch.zeros(24)
    routing = Routing(5, 4, 2, True, 5.0)
    picked = same_for_all_threads(lambda: kernels.route(logits, bias, routing)[0])
    weights = same_for_all_threads(lambda: kernels.route(logits, bias, routing)[1])
    for row in range(67):
        alone = kernels.route(logits[row : row + 1], bias, routing)
        assert_same_bits(alone[0][0], picked[row])
        assert_same_bits(alone[1][0], weights[row])


@dataclass(frozen=True)
class Case:
    rows: int
    experts: int
    top_k: int
    width: int
    inner: int
    pick: str = "random"  # random | one: all rows on one expert | none_first: expert 0 has no row


CASES = [
    Case(0, 4, 2, 16, 24),
    Case(1, 16, 4, 64, 128),
    Case(5, 3, 1, 7, 5),
    Case(33, 1, 1, 13, 17),
    Case(64, 16, 4, 64, 128),
    Case(40, 8, 1, 16, 32, "one"),
    Case(19, 6, 3, 16, 32, "none_first"),
    Case(50, 40, 22, 32, 48),
]


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    generator = seeded(seed)
    x = torch.randn(case.rows, case.width, generator=generator)
    up = torch.randn(case.experts, case.inner, case.width, generator=generator) * case.width**-0.5
    down = torch.randn(case.experts, case.width, case.inner, generator=generator) * case.inner**-0.5
    order = torch.rand(case.rows, case.experts, generator=generator)
    if case.pick == "none_first":
        order[:, 0] = 2.0
    picked = order.argsort(-1)[:, : case.top_k].contiguous()
    if case.pick == "one":
        picked.fill_(case.experts - 1)
    return x, up, down, picked, torch.rand(case.rows, case.top_k, generator=generator)


def exact_experts(x: Tensor, up: Tensor, down: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, weight in zip(picked[row].tolist(), weights[row].tolist(), strict=True):
            inner = (up[expert].double() @ x[row].double()).clamp(min=0).square()
            out[row] += weight * (down[expert].double() @ inner)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts(kernels, case):
    x, up, down, picked, weights = inputs(case)
    actual = kernels.experts(x, up, down, picked, weights)
    assert_close(actual, exact_experts(x, up, down, picked, weights), case.width + case.inner + case.top_k)
    assert_same_bits(kernels.experts(scattered(x), up, down, picked, scattered(weights)), actual)


@pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=str)
def test_a_token_does_not_see_the_others(kernels, case):
    x, up, down, picked, weights = inputs(case, 1)
    expected = same_for_all_threads(lambda: kernels.experts(x, up, down, picked, weights))
    order = torch.randperm(case.rows, generator=seeded(2))
    assert_same_bits(kernels.experts(x[order], up, down, picked[order], weights[order]), expected[order])
    for row in {0, case.rows // 2, case.rows - 1}:
        part = slice(row, row + 1)
        assert_same_bits(kernels.experts(x[part], up, down, picked[part], weights[part]), expected[part])
    poisoned = torch.full_like(x, torch.nan)
    poisoned[0] = x[0]
    assert_same_bits(kernels.experts(poisoned, up, down, picked, weights)[0], expected[0])
