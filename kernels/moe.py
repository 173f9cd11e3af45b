"""Mixture of experts: sigmoid routing with a selection bias, experts of two matrices with squared ReLU, weighted sum.

    s = sigmoid(logits);  picked = top-k of (s + bias);  w = scale * s[picked] / (sum s[picked] + 1e-20)
    y = sum_j w_j * down_{picked_j} relu(up_{picked_j} x)^2 [+ residual]

Source: DeepSeek-V3's router as Nemotron 3 uses it. The bias only selects. With group-limited routing the experts
form ``groups`` equal runs; a group's score is the sum of its two best (s + bias), and only the ``topk_groups`` best
groups take part. Ties go to the lowest index, of groups and of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headrace.kernels.activation import relu2, sigmoid
from headrace.kernels.formats import Fp8, Nvfp4, Weight, check_numbers, common_format, tensors_of
from headrace.kernels.linear import TILE, multiply_tiles


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router picks: the configuration's constants."""

    top_k: int
    groups: int
    topk_groups: int
    normalise: bool
    scale: float


@dataclass(frozen=True, slots=True)
class Routes:
    """Where each row goes, best expert first. ``plan`` is a backend's own grouping of the (row, expert) pairs."""

    experts: Tensor  # [T, top_k] int64
    weights: Tensor  # [T, top_k] fp32
    plan: object = None


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts as the reference wants them: fp32, or quantised as they are stored."""

    up: Weight  # [E, I, K]
    down: Weight  # [E, K, I]


class Matrices(Protocol):
    """One matrix per expert, all of one shape and format: a stacked weight, or a file's tensors read one by one.

    What was given may be overwritten by what is asked for next. What is not a tensor says its ``format``
    (``formats.format_of``).
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int) -> Weight: ...


def pack_experts(up: Matrices, down: Matrices) -> PackedExperts:
    """Prepare experts' weights, E of up [I, K] and of down [K, I], for ``experts``; once, at load.

    Either all are fp32, bf16 or fp16, or all ``Fp8``, or all ``Nvfp4``; each quantised one has its own scale. Each
    matrix is asked for once, and not kept beside the result. Raises ValueError for two formats, NotANumber for a
    quantised matrix that holds NaN.
    """
    common_format((up, down))
    return PackedExperts(_stacked(up), _stacked(down))


def _stacked(matrices: Matrices) -> Weight:
    """A copy of all, one after the other."""
    first = matrices[0]
    count = len(matrices)

    def room(like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, *like.shape, dtype=dtype, device=like.device)

    stacked: Weight
    if isinstance(first, Tensor):
        stacked = room(first, torch.float32)
    elif isinstance(first, Fp8):
        stacked = Fp8(room(first.values, first.values.dtype), room(first.scale, torch.float32))
    else:
        blocks = room(first.block_scales, first.block_scales.dtype)
        stacked = Nvfp4(room(first.codes, torch.uint8), blocks, room(first.scale, torch.float32))
    for expert in range(count):
        matrix = matrices[expert] if expert else first
        check_numbers(matrix)
        for place, part in zip(tensors_of(stacked), tensors_of(matrix), strict=True):
            place[expert] = part
    return stacked


def route(logits: Tensor, bias: Tensor, routing: Routing) -> Routes:
    """logits [T, E] fp32 (rows strided as they like), bias [E] fp32 -> each row's ``top_k`` experts."""
    scores = sigmoid(logits)
    choice = scores + bias
    if routing.groups > 1:
        choice = _keep_best_groups(choice, routing)
    experts = _top(choice, routing.top_k)
    weights = scores.gather(1, experts)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routes(experts, weights * routing.scale)


def _keep_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    rows, experts = choice.shape
    grouped = choice.view(rows, routing.groups, experts // routing.groups)
    best_two = grouped.gather(2, _top(grouped, 2))
    kept = _top(best_two[..., 0] + best_two[..., 1], routing.topk_groups)
    dropped = torch.ones(rows, routing.groups, dtype=torch.bool, device=choice.device).scatter_(1, kept, False)
    return grouped.masked_fill(dropped[..., None], -torch.inf).view(rows, experts)


def _top(values: Tensor, k: int) -> Tensor:
    # torch.topk leaves the order of ties open; a stable sort does not.
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def experts(x: Tensor, packed: PackedExperts, routes: Routes, *, residual: Tensor | None = None) -> Tensor:
    """The routed experts' weighted sum: x [T, K] fp32 (rows strided as they like) -> [T, K] fp32.

    Each (row, expert) pair is a row of that expert's 16-row tiles; a row's terms are added in the order picked.
    residual [T, K] fp32 (rows strided as they like): added to that sum, last.
    """
    picked, up, down = routes.experts, packed.up, packed.down
    rows, top_k = picked.shape
    places, tiles_of = _places(picked.flatten(), up.shape[0])
    tiles = x.new_zeros(sum(tiles_of) * TILE, x.shape[1])
    tiles.index_copy_(0, places, x.repeat_interleave(top_k, 0))
    tiles = tiles.view(-1, TILE, x.shape[1])
    out = torch.empty_like(tiles)
    end = 0
    for expert, count in enumerate(tiles_of):
        if count:
            start, end = end, end + count
            inner = relu2(_times(tiles[start:end], up[expert]))
            out[start:end] = _times(inner, down[expert])
    terms = out.flatten(0, 1).index_select(0, places).view(rows, top_k, x.shape[1]) * routes.weights[..., None]
    total = terms[:, 0]
    for j in range(1, top_k):
        total = total + terms[:, j]
    return total if residual is None else residual + total


def _times(tiles: Tensor, weight: Weight) -> Tensor:
    product = multiply_tiles(tiles, weight)
    return product if isinstance(weight, Tensor) else product * weight.scale


def _places(pairs: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Lay (row, expert) pairs out by expert, each expert's part filled up to whole tiles.

    pairs [n] int64, the expert of each -> (the pair's row in the layout [n], tiles per expert).
    """
    counts = torch.bincount(pairs, minlength=experts)
    tiles = (counts + TILE - 1) // TILE
    order = pairs.argsort(stable=True)
    sorted_pairs = pairs[order]
    # The i-th pair in sorted order is shifted by the filling of all experts before its own.
    filling = (tiles * TILE - counts).cumsum(0) - (tiles * TILE - counts)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=pairs.device) + filling[sorted_pairs]
    return places, tiles.tolist()
