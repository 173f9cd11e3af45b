"""Which ops are timed and compared, and how exact a backend has to be: ``ops`` builds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from benchmarks import ops
from benchmarks.ops import BF16, FP8, FP32, NVFP4, Bench, Shape, Sizes, Work
from headrace.engine import EngineConfig
from headrace.kernels import BACKENDS, Kernels, select
from headrace.kernels.formats import Format


@dataclass(frozen=True, slots=True)
class Case:
    """An op with what it is asked for: of which model, in which dtypes, and how exact a backend has to be."""

    name: str
    make: Callable[[Bench, int], Work]
    group: Literal["decode", "prompt"] = "decode"
    weights: torch.dtype | None = None  # as the checkpoint has them; None: it takes none
    cache: torch.dtype | None = None  # of pages, or of the convolution's inputs
    roundings: int = 0
    """Times that a backend may round to the dtype of weights or pages on the way to a result, if that is not fp32: a
    number that is squared afterwards counts four times, because its error doubles."""
    model: Literal["super", "nano"] = field(default="super", kw_only=True)

    def build(self, kernels: Kernels, device: torch.device, sizes: Sizes, rows: int) -> Work:
        """The work for ``rows`` sequences (decode) or tokens of one sequence (prompt)."""
        generator = torch.Generator(device).manual_seed(0)
        shape: Shape = getattr(sizes, self.model)
        bench = Bench(kernels, device, shape, sizes, self.weights or FP32, self.cache or FP32, generator)
        return self.make(bench, rows)

    def rows(self, sizes: Sizes) -> tuple[int, ...]:
        return sizes.decode if self.group == "decode" else sizes.prompt

    @property
    def format(self) -> Format:
        """Of the weights; a backend without kernels for it is not asked."""
        return "fp8" if self.weights == FP8 else "nvfp4" if self.weights == NVFP4 else "float"

    @property
    def in_fp32(self) -> Case | None:
        """The same with weights and caches of fp32, which hides no error behind roundings; None: it is not of bf16."""
        if BF16 not in (self.weights, self.cache) or FP8 in (self.weights, self.cache) or self.format != "float":
            return None
        return replace(self, weights=self.weights and FP32, cache=self.cache and FP32, roundings=0)

    @property
    def dtype(self) -> str:
        """Names the dtypes: "bfloat16", or "-" for none."""
        weights = "nvfp4" if self.format == "nvfp4" else self.weights
        named = {str(dtype).removeprefix("torch.") for dtype in (weights, self.cache) if dtype}
        return ", ".join(sorted(named)) or "-"


def _projection(make: Callable[[Bench, int], Work], group: Literal["decode", "prompt"] = "decode") -> Case:
    return Case(make.__name__, make, group, BF16, roundings=1)


CASES = (
    # A decode step of Super, in order.
    Case("step_inputs", ops.step_inputs),
    Case("embed", ops.embed, weights=BF16),
    _projection(ops.in_proj),
    Case("mamba_update", ops.mamba_update, cache=BF16),
    _projection(ops.out_proj),
    _projection(ops.moe_first),
    Case("route", ops.route),
    Case("experts", ops.experts, weights=BF16, roundings=5),
    _projection(ops.moe_last),
    _projection(ops.qkv_proj),
    Case("decode_attention", ops.decode_attention, cache=BF16, roundings=2),
    _projection(ops.o_proj),
    Case("rms_norm", ops.rms_norm),
    _projection(ops.lm_head),
    Case("sample", ops.sample),
    # What differs where drafts are verified, contexts are long, pages are fp8, or requests ask for other sampling.
    Case("mamba_verify", partial(ops.mamba_update, each=4), cache=BF16),
    Case("attention_verify", partial(ops.decode_attention, each=4), cache=BF16, roundings=2),
    Case("attention_long", partial(ops.decode_attention, long=True), cache=BF16, roundings=2),
    Case("attention_fp8", ops.decode_attention, cache=FP8, roundings=2),
    Case("attention_fp8_verify", partial(ops.decode_attention, each=4), cache=FP8, roundings=2),
    Case("sample_greedy", partial(ops.sample, temperature=0.0)),
    Case("sample_whole", partial(ops.sample, top_p=1.0)),
    Case("sample_logprobs", partial(ops.sample, top_logprobs=20)),
    # Weights as Super is released in FP8 and NVFP4.
    Case("in_proj_fp8", ops.in_proj, weights=FP8, roundings=1),
    Case("out_proj_fp8", ops.out_proj, weights=FP8, roundings=1),
    Case("shared_up_fp8", ops.shared_up, weights=FP8, roundings=1),
    Case("shared_down_fp8", ops.shared_down, weights=FP8, roundings=1),
    Case("experts_fp8", ops.experts, weights=FP8, roundings=5),
    Case("shared_up_nvfp4", ops.shared_up, weights=NVFP4, roundings=1),
    Case("shared_down_nvfp4", ops.shared_down, weights=NVFP4, roundings=1),
    Case("experts_nvfp4", ops.experts, weights=NVFP4, roundings=5),
    # Nano's MoE layer, which has no latent space and keeps its router in fp32.
    Case("nano_gate", ops.gate, weights=FP32, model="nano"),
    Case("nano_shared_up", ops.shared_up, weights=BF16, roundings=1, model="nano"),
    Case("nano_route", ops.route, model="nano"),
    Case("nano_experts", partial(ops.experts, residual=True), weights=BF16, roundings=5, model="nano"),
    Case("nano_shared_down", ops.shared_down, weights=BF16, roundings=1, model="nano"),
    # Prompts.
    _projection(ops.in_proj, "prompt"),
    Case("mamba_prefill", ops.mamba_prefill, "prompt", cache=BF16),
    Case("prefill_attention", ops.prefill_attention, "prompt", cache=BF16, roundings=2),
    Case("prefill_attention_fp8", ops.prefill_attention, "prompt", cache=FP8, roundings=2),
    Case("experts", ops.experts, "prompt", BF16, roundings=5),
    Case("in_proj_fp8", ops.in_proj, "prompt", FP8, roundings=1),
    Case("experts_nvfp4", ops.experts, "prompt", NVFP4, roundings=5),
)


def backends(device: torch.device) -> list[str]:
    """The backends that an engine may use on the device and whose needs are installed."""
    found = []
    for name in BACKENDS:
        try:
            EngineConfig(device=device.type, backend=name)  # type: ignore[arg-type]
            select(name)
        except ValueError:
            continue
        found.append(name)
    return found
