"""What a model costs: parameters, bytes of a token and of a sequence. Arithmetic only, nothing is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.engine.config import LayerKind, ModelConfig
from headrace.engine.model.weights.names import memory_shapes


@dataclass(frozen=True, slots=True)
class Part:
    """All layers of one kind together (the embedding and the head are parts of their own)."""

    name: str
    layers: int
    parameters: int
    active_parameters: int  # that one token uses


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes of a model. Router biases count as parameters; the MTP module is a part and in ``parameters``."""

    parts: tuple[Part, ...]
    kv_values_per_token: int  # keys and values of all attention layers
    conv_values_per_sequence: int
    ssm_values_per_sequence: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token of plain decoding uses; both tables count whole, the MTP module not at all."""
        return sum(part.active_parameters for part in self.parts if part.name != "mtp")

    def kv_bytes_per_token(self, element_bytes: int = 4) -> int:
        """Bytes of KV pages per token of context (the reference keeps fp32)."""
        return self.kv_values_per_token * element_bytes

    def state_bytes_per_sequence(self, conv_element_bytes: int = 4) -> int:
        """Bytes of a slot: convolution inputs, and states in fp32."""
        return self.conv_values_per_sequence * conv_element_bytes + self.ssm_values_per_sequence * 4


def footprint(config: ModelConfig) -> Footprint:
    """Sizes of the model that ``config`` describes."""
    attention, mamba = config.attention, config.mamba
    kv_values = 2 * attention.num_kv_heads * attention.head_dim if attention else 0
    conv_values = mamba.conv_dim * (mamba.conv_kernel - 1) if mamba else 0
    ssm_values = mamba.inner_size * mamba.state_size if mamba else 0
    return Footprint(
        parts=_parts(config),
        kv_values_per_token=kv_values * config.count(LayerKind.ATTENTION),
        conv_values_per_sequence=conv_values * config.count(LayerKind.MAMBA),
        ssm_values_per_sequence=ssm_values * config.count(LayerKind.MAMBA),
    )


def _parts(config: ModelConfig) -> tuple[Part, ...]:
    totals: dict[str, list[int]] = {}
    for name, shape in memory_shapes(config).items():
        size = math.prod(shape)
        active = size
        if ".experts." in name and config.moe:
            active = size // config.moe.num_experts * config.moe.top_k
        total = totals.setdefault(_part(config, name), [0, 0])
        total[0] += size
        total[1] += active
    layers = {kind.name.lower(): config.count(kind) for kind in LayerKind} | {"mtp": len(config.mtp_layers)}
    return tuple(Part(name, layers.get(name, 1), *sizes) for name, sizes in totals.items())


def _part(config: ModelConfig, name: str) -> str:
    head, _, rest = name.partition(".")
    if head == "layers":
        return config.layers[int(rest.partition(".")[0])].name.lower()
    return head
