"""EngineConfig: how an engine is laid out. Validated once, never written afterwards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine. Every field is checked on construction (ValueError naming it).

    max_sequences       sequences that decode together = Mamba slots
    max_batched_tokens  rows of one step; None: prefill_chunk + max_sequences, the least that is valid
    prefill_chunk       prompt tokens of one sequence per step; rounded up to the model's SSD chunk size
    page_size           tokens per KV page
    num_pages           KV pages; None: sized from cache_bytes
    cache_bytes         memory for KV pages; None: a quarter of what is available, at most what can be used
    max_context         tokens per sequence, prompt included; None: the model's limit (and what the pages hold)
    max_waiting         sequences that may queue before QueueFull
    preempt_bytes       host memory for preempted sequences; when it is full they are recomputed instead
    closing_text        text forced before ``</think>`` when a budget runs out ("" = the bare marker)
    device              "cpu" (reference kernels)
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
        if self.device != "cpu":
            raise ValueError(f"device must be 'cpu', got {self.device!r}")


def _check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
