"""What a model takes and gives on a device that is not at hand: memory by kind, caches that fit, a step's least time.

All of it is predicted: sizes from the headers of the files (or from config.json alone), rates from data sheets. Weights
and states are divided by ``tp`` devices evenly; keys and values are too, up to one head on each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from headrace.engine.cli.census import EMBEDDING, EXPERTS, HEAD, MTP, Census, kv_name
from headrace.engine.config import LayerKind, ModelConfig
from headrace.engine.model.batch import Caches
from headrace.engine.options import EngineConfig
from headrace.engine.run.memory import CACHE_SHARE, CacheSizes, plan_caches, unit_bytes
from headrace.engine.run.padding import padding_rows
from headrace.engine.sizing import cache_dtypes, step_bytes

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device by its data sheet: dense rates, no sparsity."""

    name: str
    memory: int  # bytes
    bytes_per_s: float
    flops_per_s: float  # of bf16 products, which quantised weights are expanded for
    capability: tuple[int, int]  # compute capability


GPUS = {
    "a100": Gpu("A100 80 GB SXM", 81920 << 20, 2.039e12, 312e12, (8, 0)),
    "h100": Gpu("H100 80 GB SXM", 81559 << 20, 3.35e12, 989e12, (9, 0)),
    "h200": Gpu("H200 SXM", 143771 << 20, 4.8e12, 989e12, (9, 0)),
    "b200": Gpu("B200", 183359 << 20, 8.0e12, 2250e12, (10, 0)),
    "rtx-pro-6000": Gpu("RTX PRO 6000 Blackwell", 97887 << 20, 1.792e12, 504e12, (12, 0)),
    "gb10": Gpu("GB10 (DGX Spark)", 119 * GIB, 0.273e12, 125e12, (12, 1)),
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

MOST_SEQUENCES = 1 << 16
"""More are not looked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned."""

    gpu: Gpu
    tp: int
    context: int  # tokens of every sequence
    batch: int  # sequences
    mtp: bool  # with the MTP module in memory and in use


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
    kv_dtype: str
    most_slots: int  # sequences of the context asked for that fit
    most_pages: int  # that fit beside the slots asked for; 0 if the model has none
    longest_context: int  # tokens of one sequence that has all of these pages
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


@dataclass(frozen=True, slots=True)
class _Fit:
    """Caches that fit, before anything is said of speed."""

    sizes: CacheSizes
    kv_dtype: str
    step_bytes: int
    most_pages: int


def make_plan(config: ModelConfig, census: Census, asked: Asked) -> Plan:
    """Raises DoesNotFit, and ValueError for sizes that the model cannot be divided by."""
    fit = _fit(config, census, asked)
    batch, limit = asked.batch, config.max_position_embeddings
    slots = _most_sequences(config, census, asked, batch, MOST_SEQUENCES)
    longest = min(limit, fit.most_pages * fit.sizes.page_size) if fit.sizes.page_bytes else limit
    return Plan(
        asked.gpu,
        asked.tp,
        device_weights(census, asked.tp, asked.mtp),
        fit.sizes,
        fit.kv_dtype,
        slots,
        fit.most_pages,
        longest,
        fit.step_bytes,
        roof(config, census, fit.sizes, asked),
    )


def device_weights(census: Census, tp: int, mtp: bool) -> dict[str, int]:
    """Bytes on one device, by part."""
    return {part.name: -(-part.num_bytes // tp) for part in census.parts if mtp or part.name != MTP}


def _fit(config: ModelConfig, census: Census, asked: Asked) -> _Fit:
    """Raises what ``make_plan`` raises."""
    gpu, tp, context, batch, mtp = asked.gpu, asked.tp, asked.context, asked.batch, asked.mtp
    part = _divided(config, tp, mtp)
    weights = sum(device_weights(census, tp, mtp).values())
    rest = gpu.memory - RESERVED - weights
    if rest <= 0:
        raise DoesNotFit(
            f"the weights take {_gib(weights)} a device, {_gib(RESERVED)} are reserved, and "
            f"{gpu.name} has {_gib(gpu.memory)}"
        )
    engine = EngineConfig(device="cuda", max_sequences=batch, max_context=context, backend="triton")
    dtypes = cache_dtypes(part, engine, gpu.capability)
    one = Caches.allocate(part, 1, 1, engine.page_size, "meta", *dtypes)
    page_bytes, slot_bytes = unit_bytes(one)
    padding, scratch = padding_rows("triton", batch), step_bytes(part, engine)
    states, left = (batch + padding) * slot_bytes, rest - scratch
    beside = f"beside {_gib(weights)} of weights and {_gib(scratch)} of a step's own tensors"
    if states > left:
        raise DoesNotFit(
            f"--batch {batch} needs {_gib(states)} of Mamba state; {beside}, {_gib(max(0, left))} are left"
        )
    pages = batch * -(-context // engine.page_size)
    most_pages = int((left - states) * CACHE_SHARE["cuda"]) // page_bytes - padding if page_bytes else 0
    if page_bytes and most_pages < pages:
        raise DoesNotFit(
            f"--batch {batch} with --context {context} needs {_gib(pages * page_bytes)} of KV pages; {beside} and "
            f"{_gib(states)} of Mamba state, {_gib(max(0, most_pages) * page_bytes)} are left for them"
        )
    sizes = plan_caches(
        one,
        _Budget(rest),
        num_slots=batch,
        page_size=engine.page_size,
        model_context=config.max_position_embeddings,
        max_context=context,
        step_bytes=scratch,
        padding=padding,
    )
    return _Fit(sizes, kv_name(dtypes[1]), scratch, most_pages)


def _fits(config: ModelConfig, census: Census, asked: Asked) -> bool:
    try:
        _fit(config, census, asked)
    except ValueError:
        return False
    return True


def _most_sequences(config: ModelConfig, census: Census, asked: Asked, low: int, high: int) -> int:
    """From low to high, in place of ``asked.batch``."""
    return _largest(low, high, lambda batch: _fits(config, census, replace(asked, batch=batch)))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from low (which fits, or 0) to high that fits, where all smaller ones do."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def roof(config: ModelConfig, census: Census, sizes: CacheSizes, asked: Asked) -> Roof:
    """Every weight that is needed is read once, states are read and written once, the context's KV is read once."""
    gpu, tp, batch, mtp = asked.gpu, asked.tp, asked.batch, asked.mtp
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
    read["KV cache"] = float(batch * -(-asked.context // sizes.page_size) * sizes.page_bytes)
    drafts = 2 * DRAFTS * batch * census.draft_parameters if mtp else 0
    layers = len(config.layers) + (DRAFTS * len(config.mtp_layers) if mtp else 0)
    return Roof(
        {name: num_bytes / gpu.bytes_per_s for name, num_bytes in read.items()},
        arithmetic=(rows * census.flops_per_token + drafts) / tp / gpu.flops_per_s,
        launches=layers * LAUNCHES_PER_LAYER * LAUNCH_SECONDS,
        tokens=batch * ACCEPTED if mtp else float(batch),
    )


def what_would_fit(config: ModelConfig, census: Census, asked: Asked) -> list[str]:
    """Changes that make it fit, of one kind each: the largest batch and context, the fewest and smallest devices.

    If there is none: the most sequences for each number of devices.
    """
    tp, found = asked.tp, []
    if asked.mtp and _fits(config, census, replace(asked, mtp=False)):
        found.append("without the MTP module")
    if fewer := _most_sequences(config, census, asked, 0, asked.batch - 1):
        found.append(f"--batch {fewer}")
    if (shorter := _largest(1, asked.context - 1, lambda n: _fits(config, census, replace(asked, context=n)))) > 1:
        found.append(f"--context {shorter}")
    if more := next((n for n in TP if n > tp and _fits(config, census, replace(asked, tp=n))), None):
        found.append(f"--tp {more}")
    larger = {name: gpu for name, gpu in GPUS.items() if gpu.memory > asked.gpu.memory}
    found += [f"--gpu {name}" for name, gpu in larger.items() if _fits(config, census, replace(asked, gpu=gpu))]
    if not found:
        for more in (n for n in TP if n > tp):
            if fewer := _most_sequences(config, census, replace(asked, tp=more), 0, asked.batch - 1):
                found.append(f"--tp {more} --batch {fewer}")
    return found


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
