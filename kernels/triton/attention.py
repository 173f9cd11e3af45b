"""Paged attention: decode in one launch, a prompt's chunk in two. Contract: ``headrace.kernels.attention``."""

from headrace.kernels.triton.attention_decode import decode_attention
from headrace.kernels.triton.attention_prefill import prefill_attention

__all__ = ["decode_attention", "prefill_attention"]
