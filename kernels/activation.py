"""Elementwise functions of the references, written from exp and log1p.

torch's own sigmoid, silu and softplus give other bits for the same value at another place in memory (vector body and
scalar tail differ); exp, log1p and rsqrt do not. Found and kept by tests/kernels/test_elementwise.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise."""
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), elementwise."""
    return x / (1.0 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without overflow: max(x, 0) + log1p(exp(-|x|)), elementwise."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def relu2(x: Tensor) -> Tensor:
    """max(x, 0) squared, elementwise."""
    x = x.clamp(min=0)
    return x * x
