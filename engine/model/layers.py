"""The layers every block is made of: linear, embedding and norm over loaded weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.kernels import Kernels
from headrace.kernels.norm import Norm

Weights = Mapping[str, Any]
"""Tensors by name, as ``weights.names`` lists them; a layer's experts may be any ``kernels.moe.Matrices``.

Each is asked for once, so that a checkpoint can be read as the model is built from it.
"""


class Linear:
    """y = residual + f(norm(x)) W^T + b, the weight packed for the backend.

    Several names are one projection: their outputs side by side (``dim`` 0), or their inputs (``dim`` 1, outputs
    summed). One launch then reads them all.
    """

    def __init__(self, kernels: Kernels, weights: Weights, *names: str, dim: int = 0) -> None:
        self._linear = kernels.linear
        parts = [weights[f"{name}.weight"] for name in names]
        self.sizes = [part.shape[0] for part in parts]
        self._packed = kernels.pack_linear(parts, self._bias(weights, names, dim), dim=dim)

    def _bias(self, weights: Weights, names: tuple[str, ...], dim: int) -> Tensor | None:
        biases = [weights.get(f"{name}.bias") for name in names]
        if all(bias is None for bias in biases):
            return None
        zeros = weights[f"{names[0]}.weight"].new_zeros
        filled = [
            (zeros(size) if bias is None else bias).float() for bias, size in zip(biases, self.sizes, strict=True)
        ]
        return torch.cat(filled) if dim == 0 else torch.stack(filled).sum(0)

    def __call__(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *,
        norm: Norm | None = None,
        relu2: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x [T, in] (or two, the columns of one after the other's) -> [T, out]; see ``kernels.linear``."""
        y: Tensor = self._linear(x, self._packed, norm=norm, relu2=relu2, residual=residual)
        return y


class Embedding:
    """Token ids to rows."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str) -> None:
        self._embed = kernels.embed
        self._weight = weights[f"{name}.weight"]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden] fp32."""
        x: Tensor = self._embed(self._weight, token_ids)
        return x


def load_norm(weights: Weights, name: str, eps: float, groups: int = 1) -> Norm:
    """An RMS norm's weight and constants."""
    return Norm(weights[f"{name}.weight"].float(), eps, groups)
