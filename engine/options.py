"""EngineConfig: how an engine is laid out. Validated once, never written afterwards."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["auto", "reference", "triton"]
CacheDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine. Every field is checked on construction (ValueError naming it).

    max_sequences       sequences that decode together = Mamba slots
    max_batched_tokens  rows of one step; None: prefill_chunk + max_sequences, the least that is valid
    prefill_chunk       prompt tokens of one sequence per step; rounded up to the model's SSD chunk size
    page_size           tokens per KV page
    num_pages           KV pages; None: sized from cache_bytes
    cache_bytes         memory for KV pages; None: a quarter of what is available (of a GPU's, most), at most what
                        can be used
    max_context         tokens per sequence, prompt included; None: the model's limit (and what the pages hold)
    max_waiting         sequences that may queue before QueueFull
    preempt_bytes       host memory for preempted sequences; when it is full they are recomputed instead
    closing_text        text forced before ``</think>`` when a budget runs out ("" = the bare marker)
    device              "cpu", "cuda" or "cuda:N"
    backend             kernels: "reference" (plain torch), "triton"; "auto": triton on a CUDA device, else reference
    cache_dtype         of keys, values and convolution inputs: "float32", "bfloat16"; "auto": bfloat16 on a CUDA device
    """

    max_sequences: int = 64
    max_batched_tokens: int | None = None
    prefill_chunk: int = 256
    page_size: int = 16
    num_pages: int | None = None
    cache_bytes: int | None = None
    max_context: int | None = None
    max_waiting: int = 1024
    preempt_bytes: int = 1 << 30
    closing_text: str = ""
    device: str = "cpu"
    backend: Backend = "auto"
    cache_dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        for name in ("max_sequences", "prefill_chunk", "page_size", "max_waiting"):
            _check_int(name, getattr(self, name), 1)
        for name in ("max_batched_tokens", "num_pages", "cache_bytes"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if self.max_context is not None:
            _check_int("max_context", self.max_context, 2)
        _check_int("preempt_bytes", self.preempt_bytes, 0)
        if not isinstance(self.closing_text, str):
            raise ValueError(f"closing_text must be a string, got {self.closing_text!r}")
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        for name, allowed in (("backend", get_args(Backend)), ("cache_dtype", get_args(CacheDtype))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.backend == "triton" and self.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend 'triton' needs a CUDA device (or TRITON_INTERPRET=1, for tests)")

    @property
    def kernels(self) -> str:
        """The backend's name in the table of kernels."""
        if self.backend != "auto":
            return self.backend
        return "reference" if self.device == "cpu" else "triton"

    @property
    def torch_cache_dtype(self) -> str:
        """The caches' dtype by torch's name."""
        if self.cache_dtype != "auto":
            return self.cache_dtype
        return "float32" if self.device == "cpu" else "bfloat16"


def _check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
