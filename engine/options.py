"""EngineConfig: how an engine is laid out. Validated once, never written afterwards."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal, get_args

from headrace.kernels import native_is_built
from headrace.kernels.native.library import MAX_THREADS

Backend = Literal["auto", "reference", "native", "triton"]
Instructions = Literal["auto", "portable", "avx2", "avx512", "avx512_bf16"]
CacheDtype = Literal["auto", "float32", "bfloat16"]
KvDtype = Literal["auto", "float32", "bfloat16", "fp8"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine. Every field is checked on construction (ValueError naming it).

    max_sequences       sequences that decode together = Mamba slots; the Triton kernels have up to 7 more, for padding
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
    backend             kernels: "native" (C++), "triton", "reference" (plain torch); "auto": triton on a CUDA device,
                        on a CPU native, or reference where the native kernels were not built
    threads             threads of the native kernels; None: one per core that this process may use
    instructions        the native kernels' instruction path: "portable", "avx2", "avx512" give the same bits, "auto"
                        is the best of them; "avx512_bf16" rounds activations to bfloat16, for twice the flops
    cache_dtype         of keys, values and convolution inputs: "float32", "bfloat16"; "auto": bfloat16 on a CUDA device
    kv_dtype            of keys and values, where not cache_dtype: "float32", "bfloat16", or "fp8" (e4m3, divided by the
                        checkpoint's scales); "auto": fp8 if the checkpoint asks for it and the kernels have it
    warm_up             run steps of every size while loading, so that no request waits for a kernel to be compiled;
                        None: on a CUDA device
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
    threads: int | None = None
    instructions: Instructions = "auto"
    cache_dtype: CacheDtype = "auto"
    kv_dtype: KvDtype = "auto"
    warm_up: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_sequences", "prefill_chunk", "page_size", "max_waiting"):
            _check_int(name, getattr(self, name), 1)
        for name in ("max_batched_tokens", "num_pages", "cache_bytes", "threads"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if self.threads is not None and self.threads > MAX_THREADS:
            raise ValueError(f"threads must be at most {MAX_THREADS}, got {self.threads}")
        if self.max_context is not None:
            _check_int("max_context", self.max_context, 2)
        _check_int("preempt_bytes", self.preempt_bytes, 0)
        if not isinstance(self.closing_text, str):
            raise ValueError(f"closing_text must be a string, got {self.closing_text!r}")
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        choices = {"backend": Backend, "instructions": Instructions, "cache_dtype": CacheDtype, "kv_dtype": KvDtype}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if not isinstance(self.warm_up, bool | None):
            raise ValueError(f"warm_up must be true, false or None, got {self.warm_up!r}")
        if self.backend == "native" and self.device != "cpu":
            raise ValueError(f"backend 'native' runs on device 'cpu', not on {self.device!r}")
        for name, unset in (("threads", None), ("instructions", "auto")):
            if getattr(self, name) != unset and self.kernels != "native":
                raise ValueError(f"{name}: an option of the native kernels, and these are {self.kernels!r}")
        if self.backend == "triton" and self.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend 'triton' needs a CUDA device (or TRITON_INTERPRET=1, for tests)")

    @property
    def kernels(self) -> str:
        """The backend's name in the table of kernels."""
        if self.backend != "auto":
            return self.backend
        if self.device != "cpu":
            return "triton"
        return "native" if native_is_built() else "reference"

    @property
    def torch_cache_dtype(self) -> str:
        """The caches' dtype by torch's name."""
        if self.cache_dtype != "auto":
            return self.cache_dtype
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def warms_up(self) -> bool:
        """Whether loading runs steps of every size."""
        return self.device != "cpu" if self.warm_up is None else self.warm_up


def _check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
