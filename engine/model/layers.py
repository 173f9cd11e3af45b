"""The layers every block is made of: linear, embedding and norm over loaded weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from headrace.kernels import Kernels
from headrace.kernels.formats import Weight, format_of
from headrace.kernels.norm import Norm

Weights = Mapping[str, Any]
"""Weights by name, as ``weights.names`` lists them; a layer's experts may be any ``kernels.moe.Matrices``.

Each is asked for once, so that a checkpoint can be read as the model is built from it.
"""


class Linear:
    """y = residual + f(norm(x)) W^T + b, the weights packed for the backend.

    Several names are one projection: their outputs side by side (``dim`` 0), or their inputs (``dim`` 1, outputs
    summed). One launch then reads all that lie together and are stored alike; where formats meet, there is another.
    """

    def __init__(self, kernels: Kernels, weights: Weights, *names: str, dim: int = 0) -> None:
        self._linear, self._dim = kernels.linear, dim
        self._packed: list[Any] = []
        self._sizes: list[list[int]] = []  # outputs of each name, packed weight by packed weight
        pairs = ((name, weights[f"{name}.weight"]) for name in names)
        for kind, run in groupby(pairs, key=lambda pair: _kind(pair[1], dim)):
            named = dict(run)
            # The products of quantised weights each have a scale of their own: they can stand side by side only.
            alone = dim == 1 and kind != "float"
            for part in [{name: weight} for name, weight in named.items()] if alone else [named]:
                parts = list(part.values())
                self._sizes.append([weight.shape[0] for weight in parts])
                self._packed.append(kernels.pack_linear(parts, _bias(weights, part, dim), dim=dim))

    def __call__(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *,
        norm: Norm | None = None,
        relu2: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x [T, in] (or two, the columns of one after the other's) -> [T, out]; see ``kernels.linear``.

        With ``dim`` 1 and two names, x are the two inputs, and there is no norm. Of several names with ``dim`` 0 the
        outputs come from ``parts``.
        """
        if len(self._packed) == 1:
            y: Tensor = self._linear(x, self._packed[0], norm=norm, relu2=relu2, residual=residual)
            return y
        # Two weights with an input each: what one gives, the other adds to. relu2 is the second input's.
        assert self._dim == 1 and norm is None and isinstance(x, tuple), "outputs side by side: see parts"
        first: Tensor = self._linear(x[0], self._packed[0], residual=residual)
        second: Tensor = self._linear(x[1], self._packed[1], relu2=relu2, residual=first)
        return second

    def parts(self, x: Tensor, *, norm: Norm | None = None) -> list[Tensor]:
        """x [T, in] -> each name's outputs [T, out] (views; rows strided as they come), with ``dim`` 0."""
        return [
            part
            for packed, sizes in zip(self._packed, self._sizes, strict=True)
            for part in torch.split(self._linear(x, packed, norm=norm), sizes, 1)
        ]


def _kind(weight: Weight, dim: int) -> object:
    """What weights of one launch have in common: the format, and side by side a float's dtype, to widen none."""
    form = format_of(weight)
    return (form, weight.dtype) if dim == 0 and form == "float" else form


def _bias(weights: Weights, parts: dict[str, Weight], dim: int) -> Tensor | None:
    """Of the packed weight, [N] fp32: zeros where a part has none, the sum where parts are summed."""
    biases = [weights.get(f"{name}.bias") for name in parts]
    if all(bias is None for bias in biases):
        return None
    filled = [
        torch.zeros(part.shape[0], device=part.device) if bias is None else bias.float()
        for bias, part in zip(biases, parts.values(), strict=True)
    ]
    return torch.cat(filled) if dim == 0 else torch.stack(filled).sum(0)


class Embedding:
    """Token ids to rows."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str) -> None:
        self._embed = kernels.embed
        weight = weights[f"{name}.weight"]
        # Nothing packs it, so on a CPU it may be a view of the file, which others may rewrite or cut short.
        self._weight = weight.clone() if weight.device.type == "cpu" else weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden] fp32."""
        x: Tensor = self._embed(self._weight, token_ids)
        return x


def load_norm(weights: Weights, name: str, eps: float, groups: int = 1) -> Norm:
    """An RMS norm's weight and constants."""
    return Norm(weights[f"{name}.weight"].float(), eps, groups)
