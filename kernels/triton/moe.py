"""Mixture of experts: see ``headrace.kernels.moe`` for the contract."""

from headrace.kernels.triton.expert_weights import PackedExperts, pack_experts
from headrace.kernels.triton.experts import experts
from headrace.kernels.triton.routing import route

__all__ = ["PackedExperts", "experts", "pack_experts", "route"]
