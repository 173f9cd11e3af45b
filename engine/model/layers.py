"""The layers every block is made of: linear, embedding and norm over loaded weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from headrace.kernels import Kernels

Weights = Mapping[str, Tensor]
"""Tensors by name, as ``weights.names`` lists them."""


class Linear:
    """y = x W^T (+ b), the weight packed for the backend."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str) -> None:
        self._linear = kernels.linear
        self._packed = kernels.pack_linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        y: Tensor = self._linear(x, self._packed)
        return y


class Embedding:
    """Token ids to rows."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weight = weights[f"{name}.weight"]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden] fp32."""
        return self._weight.index_select(0, token_ids).float()


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * w."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str, eps: float) -> None:
        self._norm = kernels.rms_norm
        self._weight = weights[f"{name}.weight"].float()
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        y: Tensor = self._norm(x, self._weight, self._eps)
        return y
