"""What a model is made of and what a token costs, from its configuration and the headers of its files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from headrace.engine.config import LayerKind, ModelConfig
from headrace.engine.model.batch import Caches
from headrace.engine.model.weights.files import has_tensors
from headrace.engine.model.weights.header import DTYPES
from headrace.engine.model.weights.loader import match_tensors
from headrace.engine.model.weights.names import memory_shapes, places
from headrace.engine.options import EngineConfig
from headrace.engine.run.memory import unit_bytes
from headrace.engine.sizing import cache_dtypes

RECENT = (8, 9)
"""The compute capability from which on GPUs have e4m3; what a token costs is said of such a one."""

PUBLISHED_IN_FP32 = ("e_score_correction_bias", ".k_scale", ".v_scale")
"""Of the tensors that may have any float format; the others are published in bf16."""

EMBEDDING, HEAD, EXPERTS, MTP = "embedding", "output head", "routed experts", "MTP module"
_LAYERS = {
    LayerKind.MAMBA: "Mamba-2 layers",
    LayerKind.ATTENTION: "attention layers",
    LayerKind.MOE: "MoE layers without routed experts",
    LayerKind.MLP: "MLP layers",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of weights over all layers. ``used`` is the share of it that one token passes through."""

    name: str
    layers: int
    parameters: int
    num_bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class Census:
    """A model in numbers. Costs are of one decoded token of one sequence, MTP module not used; caches as on a GPU."""

    parts: tuple[Part, ...]
    bytes_are_assumed: bool
    kv_bytes_per_token: int
    kv_dtype: str
    state_bytes_per_sequence: int
    draft_parameters: int
    """Parameters that a draft of the MTP module is multiplied with, the head's among them; 0 without the module."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(part.parameters for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Size of the weights as stored."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token is multiplied with (of the embedding it reads one row)."""
        return round(sum(part.parameters * part.used for part in self.parts))

    @property
    def flops_per_token(self) -> int:
        """One multiplication and one addition per active parameter; attention and the scan not counted."""
        return 2 * self.active_parameters

    @property
    def bytes_read_per_token(self) -> int:
        """Weights that one token needs, as stored."""
        return round(sum(part.num_bytes * part.used for part in self.parts))


def take_census(folder: Path, config: ModelConfig) -> Census:
    """Count a checkpoint; a folder of only its .json files is enough.

    Raises CheckpointError for damaged files, and for those that would not be loaded with this configuration.
    """
    parameters: dict[str, int] = {}
    drafts = 0.0
    for name, shape in memory_shapes(config).items():
        part = _part(name, config)
        parameters[part] = parameters.get(part, 0) + prod(shape)
        if part == MTP:
            drafts += prod(shape) * (_used(EXPERTS, config) if ".experts." in name else 1.0)
    there = has_tensors(folder)
    stored = _stored_bytes(folder, config) if there else _expected_bytes(config)
    parts = tuple(
        Part(name, _layers(name, config), count, stored.get(name, 0), _used(name, config))
        for name, count in parameters.items()
    )
    dtypes = cache_dtypes(config, EngineConfig(device="cuda", backend="triton"), RECENT)
    kv_bytes, state_bytes = unit_bytes(Caches.allocate(config, 1, 1, 1, "meta", *dtypes))
    if drafts:
        drafts += parameters[HEAD]
    return Census(parts, not there, kv_bytes, kv_name(dtypes[1]), state_bytes, round(drafts))


def kv_name(dtype: torch.dtype) -> str:
    """Of keys and values, as ``EngineConfig.kv_dtype`` spells it."""
    return "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def _expected_bytes(config: ModelConfig) -> dict[str, int]:
    """By part, of the files that the configuration describes, as they would be published."""
    expected: dict[str, int] = {}
    for name, place in places(config).items():
        [kind, *others] = place.dtypes
        if others:
            kind = "F32" if name.endswith(PUBLISHED_IN_FP32) else "BF16"
        part = _part(name, config)
        expected[part] = expected.get(part, 0) + prod(place.shape) * DTYPES[kind].itemsize
    return expected


def _stored_bytes(folder: Path, config: ModelConfig) -> dict[str, int]:
    stored: dict[str, int] = {}
    for source in match_tensors(folder, config):
        part = _part(source.place.name, config)
        stored[part] = stored.get(part, 0) + source.entry.num_bytes
    return stored


def _part(name: str, config: ModelConfig) -> str:
    head, _, rest = name.partition(".")
    if head in ("embeddings", "lm_head", "mtp", "norm_f"):
        return {"embeddings": EMBEDDING, "mtp": MTP}.get(head, HEAD)
    return EXPERTS if ".experts." in name else _LAYERS[config.layers[int(rest.partition(".")[0])]]


def _layers(part: str, config: ModelConfig) -> int:
    kinds = {name: kind for kind, name in _LAYERS.items()} | {EXPERTS: LayerKind.MOE}
    return config.count(kinds[part]) if part in kinds else 0


def _used(part: str, config: ModelConfig) -> float:
    if part in (EMBEDDING, MTP):
        return 0.0
    if part == EXPERTS and config.moe is not None:
        return config.moe.top_k / config.moe.num_experts
    return 1.0
