"""What a model takes and gives on a device that is not at hand: memory by kind, caches that fit, a step's least time.

All of it is predicted: sizes from the headers of the files (or from config.json alone), rates from data sheets. Weights
and states are divided by ``tp`` devices evenly; keys and values are too, up to one head on each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headrace.engine.cli.census import EMBEDDING, EXPERTS, HEAD, MTP, Census
from headrace.engine.config import LayerKind, ModelConfig
from headrace.engine.model.batch import Caches
from headrace.engine.options import EngineConfig
from headrace.engine.run.memory import CACHE_SHARE, CacheSizes, plan_caches, unit_bytes
from headrace.engine.run.padding import padding_rows
from headrace.engine.sizing import step_bytes

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device by its data sheet: dense rates, no sparsity."""

    name: str
    memory: int  # bytes
    bytes_per_s: float
    flops_per_s: float  # of bf16 products, which quantised weights are expanded for


GPUS = {
    "a100": Gpu("A100 80 GB SXM", 81920 << 20, 2.039e12, 312e12),
    "h100": Gpu("H100 80 GB SXM", 81559 << 20, 3.35e12, 989e12),
    "h200": Gpu("H200 SXM", 143771 << 20, 4.8e12, 989e12),
    "b200": Gpu("B200", 183359 << 20, 8.0e12, 2250e12),
    "rtx-pro-6000": Gpu("RTX PRO 6000 Blackwell", 97887 << 20, 1.792e12, 504e12),
    "gb10": Gpu("GB10 (DGX Spark)", 119 * GIB, 0.273e12, 125e12),
}
"""By the name that ``headrace plan --gpu`` takes."""

RESERVED = GIB
"""Bytes that the driver's context, code and torch's own libraries take on a device; a guess on the safe side."""

LAUNCHES_PER_LAYER = 4
"""Of a decode step, on average; tests/compiled/test_step.py holds the kernels to it."""

LAUNCH_SECONDS = 1.3e-6
"""From one kernel to the next inside a CUDA graph on an H100: the least that a launch costs anyone."""

DRAFTS, ACCEPTED = 3, 2.67
"""Drafts a step, and tokens a step that come of them: the published acceptance of 73.5 % a draft."""

TP = (1, 2, 4, 8)


class DoesNotFit(ValueError):
    """Weights, states or pages are more than the memory; the message says which and by how much."""


@dataclass(frozen=True, slots=True)
class _Budget:
    """What ``plan_caches`` asks of a device."""

    memory: int
    cuda: bool = True
    torch: torch.device = torch.device("cuda")

    def available_bytes(self) -> int:
        return self.memory


@dataclass(frozen=True, slots=True)
class Roof:
    """The least time of a decode step, and what of it each kind takes if nothing else did. Seconds."""

    parts: dict[str, float]
    arithmetic: float
    launches: float
    tokens: float  # that a step gives

    @property
    def memory(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Bytes, arithmetic and launches all overlap at best."""
        return max(self.memory, self.arithmetic, self.launches)

    @property
    def limit(self) -> str:
        """What to make smaller first."""
        if self.seconds > self.memory:
            return "arithmetic" if self.arithmetic >= self.launches else "launches"
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True, slots=True)
class Plan:
    """One device of ``tp`` with its part of the model."""

    gpu: Gpu
    tp: int
    weights: dict[str, int]  # bytes by part
    sizes: CacheSizes  # page_bytes and slot_bytes are this device's
    longest_context: int  # tokens of one sequence that has all pages that fit
    step_bytes: int
    roof: Roof

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def state_bytes(self) -> int:
        return (self.sizes.num_slots + self.sizes.padding) * self.sizes.slot_bytes

    @property
    def page_bytes(self) -> int:
        return (self.sizes.num_pages + self.sizes.padding) * self.sizes.page_bytes


def make_plan(config: ModelConfig, census: Census, gpu: Gpu, *, tp: int, context: int, batch: int, mtp: bool) -> Plan:
    """``batch`` sequences of ``context`` tokens each, with or without the MTP module in memory and in use.

    Raises DoesNotFit, and ValueError for sizes that the model cannot be divided by.
    """
    part = _divided(config, tp, mtp)
    weights = {p.name: -(-p.num_bytes // tp) for p in census.parts if mtp or p.name != MTP}
    rest = gpu.memory - RESERVED - sum(weights.values())
    if rest <= 0:
        raise DoesNotFit(
            f"the weights take {_gib(sum(weights.values()))} a device, {_gib(RESERVED)} are reserved, and "
            f"{gpu.name} has {_gib(gpu.memory)}"
        )
    engine = EngineConfig(device="cuda", max_sequences=batch, max_context=context, backend="triton")
    one = Caches.allocate(part, 1, 1, engine.page_size, device="meta", dtype=torch.bfloat16)
    scratch = step_bytes(part, engine)
    needed = unit_bytes(one)[0] * -(-context // engine.page_size) * batch
    try:
        sizes = plan_caches(
            one,
            _Budget(rest),
            num_slots=batch,
            page_size=engine.page_size,
            model_context=config.max_position_embeddings,
            max_context=context,
            step_bytes=scratch,
            padding=padding_rows("triton", batch),
        )
    except ValueError as error:
        raise DoesNotFit(f"beside {_gib(sum(weights.values()))} of weights: {error}") from error
    if sizes.num_pages * sizes.page_bytes < needed:
        raise DoesNotFit(
            f"{batch} sequences of {context:,} tokens need {_gib(needed)} of KV pages, "
            f"{_gib(sizes.num_pages * sizes.page_bytes)} are left for them"
        )
    most = max(0, rest - scratch - (batch + sizes.padding) * sizes.slot_bytes) * CACHE_SHARE["cuda"]
    pages = int(most / sizes.page_bytes) if sizes.page_bytes else 0
    longest = min(config.max_position_embeddings, pages * sizes.page_size if sizes.page_bytes else 1 << 60)
    return Plan(gpu, tp, weights, sizes, longest, scratch, roof(config, census, gpu, tp, sizes, context, batch, mtp))


def roof(
    config: ModelConfig, census: Census, gpu: Gpu, tp: int, sizes: CacheSizes, context: int, batch: int, mtp: bool
) -> Roof:
    """Every weight that is needed is read once, states are read and written once, the context's KV is read once."""
    rows = batch * (1 + DRAFTS) if mtp else batch
    read: dict[str, float] = {}
    for p in census.parts:
        if p.name in (EMBEDDING, MTP):
            continue
        share = _distinct(config, rows) if p.name == EXPERTS else 1.0
        read[p.name] = p.num_bytes * share / tp
    if mtp:
        stored = {p.name: p.num_bytes for p in census.parts}
        read[MTP] = DRAFTS * (_mtp_share(config, batch) * stored[MTP] + stored[HEAD]) / tp
    read["Mamba state"] = 2.0 * batch * sizes.slot_bytes
    read["KV cache"] = float(batch * -(-context // sizes.page_size) * sizes.page_bytes)
    layers = len(config.layers) + (DRAFTS * len(config.mtp_layers) if mtp else 0)
    return Roof(
        {name: num_bytes / gpu.bytes_per_s for name, num_bytes in read.items()},
        arithmetic=rows * census.flops_per_token / tp / gpu.flops_per_s,
        launches=layers * LAUNCHES_PER_LAYER * LAUNCH_SECONDS,
        tokens=batch * ACCEPTED if mtp else float(batch),
    )


def what_would_fit(
    config: ModelConfig, census: Census, gpu: Gpu, *, tp: int, context: int, batch: int, mtp: bool
) -> list[str]:
    """Changes of one kind each that make it fit, the least first."""

    def fits(**change: object) -> bool:
        asked = {"gpu": gpu, "tp": tp, "context": context, "batch": batch, "mtp": mtp, **change}
        try:
            make_plan(config, census, asked.pop("gpu"), **asked)  # type: ignore[arg-type]
        except ValueError:
            return False
        return True

    found = []
    if mtp and fits(mtp=False):
        found.append("without the MTP module")
    if fewer := next((n for n in _below(batch) if fits(batch=n)), None):
        found.append(f"--batch {fewer}")
    if shorter := next((n for n in _below(context) if fits(context=n)), None):
        found.append(f"--context {shorter}")
    if more := next((n for n in TP if n > tp and fits(tp=n)), None):
        found.append(f"--tp {more}")
    found += [f"--gpu {name}" for name, other in GPUS.items() if other.memory > gpu.memory and fits(gpu=other)]
    return found


def _below(number: int) -> list[int]:
    """Powers of two below, the largest first."""
    return [1 << n for n in range(number.bit_length(), -1, -1) if 1 << n < number]


def _divided(config: ModelConfig, tp: int, mtp: bool) -> ModelConfig:
    """One device's part, for the sizes of its caches; the MTP module's layers have some too."""
    mamba, attention = config.mamba, config.attention
    if mamba is not None:
        if mamba.num_groups % tp:
            raise ValueError(f"tp {tp} does not divide the {mamba.num_groups} groups of the Mamba layers")
        mamba = replace(mamba, num_heads=mamba.num_heads // tp, num_groups=mamba.num_groups // tp)
    if attention is not None:
        if attention.num_heads % tp:
            raise ValueError(f"tp {tp} does not divide the {attention.num_heads} attention heads")
        attention = replace(
            attention, num_heads=attention.num_heads // tp, num_kv_heads=max(1, attention.num_kv_heads // tp)
        )
    layers = config.layers + (config.mtp_layers if mtp else ())
    return replace(config, layers=layers, mamba=mamba, attention=attention)


def _distinct(config: ModelConfig, rows: int) -> float:
    """Share of a layer's experts that so many rows pick between them, if they pick at random."""
    if config.moe is None:
        return 1.0
    return 1.0 - (1.0 - config.moe.top_k / config.moe.num_experts) ** rows


def _mtp_share(config: ModelConfig, rows: int) -> float:
    """Share of the MTP module that a draft reads: its experts are nearly all of it."""
    return _distinct(config, rows) if LayerKind.MOE in config.mtp_layers else 1.0


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
