"""Mamba-2 on the GPU; contract and reference in ``headrace.kernels.mamba``."""

from __future__ import annotations

from headrace.kernels.triton.mamba_prefill import mamba_prefill
from headrace.kernels.triton.mamba_update import mamba_update

__all__ = ["mamba_prefill", "mamba_update"]
