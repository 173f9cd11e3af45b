"""Routing and experts of the published model: 512 experts, top 22, latent size 1024, inner size 2688; bf16, and as they
are released in FP8 and NVFP4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.kernels import moe as reference
from headrace.kernels.formats import Format
from headrace.kernels.lab.cases import Case, Sample
from headrace.kernels.lab.launches import Launch
from headrace.kernels.moe import Routes, Routing
from headrace.kernels.triton import moe
from headrace.kernels.triton.routing import TILE, Plan, most_tiles

EXPERTS, WIDTH, INNER = 512, 1024, 2688
ROUTING = Routing(top_k=22, groups=1, topk_groups=1, normalise=True, scale=5.0)
BATCHES = (1, 8, 32, 128)
FP32, INT32, INT64 = 4, 4, 8  # bytes


def logits(batch: int) -> Tensor:
    """Scores as a router without preferences gives them, in a wider projection as the model has them."""
    return torch.randn(batch, EXPERTS + 64, generator=torch.Generator().manual_seed(batch))[:, :EXPERTS]


def planned(routes: Routes) -> Routes:
    """The reference's routes with the plan that the Triton kernel would make of them."""
    rows, top_k = routes.experts.shape
    pairs = routes.experts.flatten()
    tiles = torch.zeros(3, most_tiles(rows, top_k, EXPERTS), dtype=torch.int32)
    slot = place = 0
    for expert, count in enumerate(torch.bincount(pairs, minlength=EXPERTS).tolist()):
        for start in range(0, count, TILE):
            tiles[:, slot] = torch.tensor([expert, place + start, min(TILE, count - start)])
            slot += 1
        place += count
    return Routes(routes.experts, routes.weights, Plan(pairs.argsort(stable=True).int(), tiles))


def routes_of(batch: int) -> Routes:
    return planned(reference.route(logits(batch), torch.zeros(EXPERTS), ROUTING))


def sample(launch: Launch) -> Sample:
    """The fullest and the emptiest used tile, so weighted that tiles and pairs come out right, and an unused one."""
    if launch.name == "_combine":
        rows, blocks, _ = launch.grid
        return {(row, 0, 0): rows * blocks / min(rows, 2) for row in range(min(rows, 2))}
    programs, counts = launch.constexprs["PROGRAMS"], launch.arguments["tiles"][2]
    used = counts[counts > 0]
    low, high = int(used.argmin()), int(used.argmax())
    least, most = int(used[low]), int(used[high])
    full = (int(used.sum()) - len(used) * least) / max(most - least, 1)
    tiles = ((low, len(used) - full), (high, full), (len(used), len(counts) - len(used)))
    return {(slot * programs, 0, 0): weight * programs for slot, weight in tiles if weight}


def packed_experts(form: Format) -> moe.PackedExperts:
    """Memory for the weights, never filled."""

    def stored(*size: int) -> Tensor:
        return torch.empty(EXPERTS, *size, dtype=torch.uint8)

    if form == "float":
        return moe.PackedExperts(torch.empty(EXPERTS, INNER // 16, 2, 16, WIDTH, dtype=torch.bfloat16))
    scales = torch.ones(EXPERTS), torch.ones(EXPERTS)
    if form == "fp8":
        return moe.PackedExperts(stored(INNER // 32, 2, 32 * WIDTH), *scales)
    units = INNER // 64
    return moe.PackedExperts(stored(units, 2, 32 * WIDTH), *scales, stored(units, 2, 4 * WIDTH))


def experts_case(batch: int, form: Format = "float") -> Case:
    routes = routes_of(batch)
    touched = int((torch.bincount(routes.experts.flatten()) > 0).sum())
    op = f"experts {EXPERTS} x {WIDTH} x {INNER}, top {ROUTING.top_k}" + ("" if form == "float" else f", {form}")
    sixteenths = {"float": 32, "fp8": 16, "nvfp4": 9}[form]  # of a byte an element

    def make() -> Callable[[], object]:
        x, packed = torch.randn(batch, WIDTH), packed_experts(form)
        return lambda: moe.experts(x, packed, routes)

    return Case(
        name=f"{op}, batch {batch}",
        op=op,
        make=make,
        minimum_bytes=touched * 2 * WIDTH * INNER * sixteenths // 16 + batch * (2 * WIDTH + ROUTING.top_k) * FP32,
        # The slices' partial sums weigh more beside smaller weights: with 5 pairs an expert 1.5 % of fp8, 3 % of nvfp4.
        most_bytes={"float": 1.02, "fp8": 1.03, "nvfp4": 1.05}[form],
        streamed=("packed", "blocks"),
        wide=("packed",),
        steps=("UNITS", "SPLITS", "PARTS", "GROUPS", "TOP_K"),
        least_in_flight=20_000,
        sample=sample,
    )


def every(launch: Launch) -> Sample:
    """All programs: only the last one groups the pairs."""
    return {(row, 0, 0): 1.0 for row in range(launch.grid[0])}


def route_case(batch: int) -> Case:
    pairs = batch * ROUTING.top_k

    def make() -> Callable[[], object]:
        scores, bias = logits(batch), torch.zeros(EXPERTS)
        return lambda: moe.route(scores, bias, ROUTING)

    return Case(
        name=f"route {EXPERTS}, top {ROUTING.top_k}, batch {batch}",
        op=f"route {EXPERTS}, top {ROUTING.top_k}",
        make=make,
        minimum_bytes=(batch + 1) * EXPERTS * FP32
        + pairs * (INT64 + FP32 + INT32)
        + 3 * INT32 * most_tiles(batch, ROUTING.top_k, EXPERTS),
        most_bytes=1.10,  # beside that the picks once more, read by the program that groups them
        steps=("EXPERTS", "TOP_K", "WIDTH"),
        sample=every,
    )


CASES = (
    *(case(batch) for case in (route_case, experts_case) for batch in BATCHES),
    *(experts_case(batch, form) for form in ("fp8", "nvfp4") for batch in BATCHES),
)
