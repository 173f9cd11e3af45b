"""ModelConfig: what a ``config.json`` of ``model_type: nemotron_h`` says, checked once and frozen.

Both published spellings are read: ``hybrid_override_pattern`` ("MEM*E-") and ``layers_block_type`` (a list of names).
A value that would change the output and is not implemented is an error, never ignored; keys that no implementation
reads (``rope_theta``, ``expand``, dropout, initialisation) are.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from headrace.engine.errors import ConfigError as ConfigError
from headrace.engine.quantization import HF_QUANT_CONFIG, Quantization, read_quantization


class LayerKind(StrEnum):
    """What a layer mixes with; the value is its letter in ``hybrid_override_pattern``."""

    MAMBA = "M"
    MOE = "E"
    ATTENTION = "*"
    MLP = "-"


_BLOCK_TYPES = {
    "linear_attention": LayerKind.MAMBA,
    "mamba": LayerKind.MAMBA,
    "full_attention": LayerKind.ATTENTION,
    "attention": LayerKind.ATTENTION,
    "moe": LayerKind.MOE,
    "mlp": LayerKind.MLP,
}


@dataclass(frozen=True, slots=True)
class MambaConfig:
    """Mamba-2 layers. The convolution runs over x, B and C together."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel: int
    chunk_size: int  # tokens; prompts are cut only at multiples of it
    conv_bias: bool
    bias: bool  # on in_proj and out_proj

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def projection_size(self) -> int:
        """Rows of in_proj: gate, then convolved channels, then one dt per head."""
        return self.inner_size + self.conv_dim + self.num_heads


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Grouped-query attention without positional encoding."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts; with ``latent_size`` the experts work in a projected space, the shared expert never does."""

    num_experts: int
    top_k: int
    latent_size: int | None
    intermediate_size: int
    shared_intermediate_size: int
    num_groups: int
    topk_groups: int
    normalise: bool
    scale: float
    bias: bool  # on the shared expert and the latent projections


@dataclass(frozen=True, slots=True)
class MlpConfig:
    """Dense MLP layers."""

    intermediate_size: int
    bias: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's shape. The part of a layer kind that occurs nowhere is None."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerKind, ...]
    mtp_layers: tuple[LayerKind, ...]  # the multi-token-prediction module's; empty: it has none
    norm_eps: float
    max_position_embeddings: int
    mamba: MambaConfig | None
    attention: AttentionConfig | None
    moe: MoEConfig | None
    mlp: MlpConfig | None
    quantization: Quantization | None = None  # None: all weights are floats

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read a ``.json`` file, or the ``config.json`` of a checkpoint folder; and hf_quant_config.json beside it.

        Raises ConfigError.
        """
        path = Path(path)
        file = path if path.suffix == ".json" else path / "config.json"
        beside = file.with_name(HF_QUANT_CONFIG)
        return cls.from_json(_read_json(file), _read_json(beside) if beside.exists() else None)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """Check a parsed ``config.json`` and what lies beside it. Raises ConfigError naming the key and the value."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"config.json must hold an object, got {type(values).__name__}")
        read = _Reader(values)
        read.choice("model_type", ("nemotron_h",))
        _refuse_unsupported(read)
        layers = _layers(read)
        mtp_layers = _mtp_layers(read)
        used = {*layers, *mtp_layers}
        return cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            layers=layers,
            mtp_layers=mtp_layers,
            norm_eps=_norm_eps(read),
            max_position_embeddings=read.integer("max_position_embeddings", 4096),
            mamba=_mamba(read) if LayerKind.MAMBA in used else None,
            attention=_attention(read) if LayerKind.ATTENTION in used else None,
            moe=_moe(read) if LayerKind.MOE in used else None,
            mlp=_mlp(read) if LayerKind.MLP in used else None,
            quantization=read_quantization(values, hf_quant_config),
        )

    @property
    def pattern(self) -> str:
        """The layers as letters, as ``hybrid_override_pattern`` spells them."""
        return "".join(kind.value for kind in self.layers)

    @property
    def chunk_size(self) -> int:
        """Tokens: a prompt may be cut at multiples of this; 1 where no layer scans."""
        return self.mamba.chunk_size if self.mamba else 1

    def count(self, kind: LayerKind) -> int:
        """Layers of a kind, the MTP module not counted."""
        return self.layers.count(kind)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error


_MISSING = object()


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to the parsed file; every failure is a ConfigError with key and value."""

    values: Mapping[str, Any]

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value; the default where the key is absent or null."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConfigError(f"{key} is missing")
        return default

    def integer(self, key: str, default: Any = _MISSING, low: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{key} must be an integer >= {low}, got {value!r}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number > 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{key} must be a finite number > 0, got {value!r}")
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, got {value!r}")
        return value

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = _MISSING) -> None:
        """Refuse anything that is not among the values this engine implements."""
        value = self.get(key, default)
        if not any(type(value) is type(option) and value == option for option in allowed):
            expected = " or ".join(repr(option) for option in allowed)
            raise ConfigError(f"{key} must be {expected}, got {value!r}")

    def absent(self, key: str, why: str) -> None:
        if self.values.get(key) is not None:
            raise ConfigError(f"{key} is {self.values[key]!r}; {why}")


def _refuse_unsupported(read: _Reader) -> None:
    """Values that would change the output and that nothing here implements."""
    read.choice("mlp_hidden_act", ("relu2",), "relu2")
    read.choice("mamba_hidden_act", ("silu", "swish"), "silu")
    read.choice("mamba_ssm_cache_dtype", ("float32",), "float32")
    read.choice("tie_word_embeddings", (False,), False)
    read.choice("mamba_proj_bias", (False,), False)
    read.absent("sliding_window", "attention over a window is not implemented")
    for key in ("rope_scaling", "rope_parameters"):
        _refuse_scaling(read, key)
    limit = read.get("time_step_limit", [0.0, math.inf])
    if not isinstance(limit, list | tuple) or [_as_float(bound) for bound in limit] != [0.0, math.inf]:
        raise ConfigError(f"time_step_limit must be [0.0, Infinity], got {limit!r}")


def _refuse_scaling(read: _Reader, key: str) -> None:
    """Published files carry rope keys that nothing reads; only the plain kind can be ignored safely."""
    value = read.get(key, {})
    kind = (
        value.get("rope_type", value.get("type", "default" if not value.get("factor") else "scaled"))
        if isinstance(value, dict)
        else None
    )
    if kind != "default":
        raise ConfigError(f"{key} is {value!r}; this architecture has no positional encoding to scale")


def _as_float(value: Any) -> float | None:
    """A number, also in transformers' spelling of those JSON lacks: {"__float__": "Infinity"}."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        value = math.inf if value["__float__"] == "Infinity" else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and not abs(value) > sys.float_info.max or value == math.inf else None


def _norm_eps(read: _Reader) -> float:
    eps = read.number("layer_norm_epsilon", read.get("norm_eps", 1e-5))
    if read.number("norm_eps", eps) != eps:
        raise ConfigError(f"norm_eps {read.get('norm_eps')!r} contradicts layer_norm_epsilon {eps!r}")
    return eps


def _layers(read: _Reader) -> tuple[LayerKind, ...]:
    layers = _kinds(read, "hybrid_override_pattern", "layers_block_type")
    if layers is None:
        raise ConfigError("hybrid_override_pattern is missing, and so is layers_block_type")
    if not layers:
        raise ConfigError("hybrid_override_pattern / layers_block_type names no layer")
    if read.integer("num_hidden_layers", len(layers)) != len(layers):
        raise ConfigError(f"num_hidden_layers is {read.get('num_hidden_layers')}, the layer pattern has {len(layers)}")
    return layers


def _mtp_layers(read: _Reader) -> tuple[LayerKind, ...]:
    count = read.integer("num_nextn_predict_layers", 0, low=0)
    layers = _kinds(read, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    if count == 0:
        return ()
    if count > 1:
        raise ConfigError(f"num_nextn_predict_layers is {count}; one module (used repeatedly) is supported")
    layers = (LayerKind.ATTENTION, LayerKind.MOE) if layers is None else layers
    if not layers or LayerKind.MAMBA in layers:
        letters = "".join(kind.value for kind in layers)
        raise ConfigError(f"mtp_hybrid_override_pattern is {letters!r}; it needs at least one layer and no M")
    return layers


def _kinds(read: _Reader, pattern_key: str, list_key: str) -> tuple[LayerKind, ...] | None:
    """Layer kinds from either spelling; both given must agree."""
    pattern, names = read.get(pattern_key, None), read.get(list_key, None)
    by_letter = {kind.value: kind for kind in LayerKind}
    from_pattern = None if pattern is None else _lookup(pattern_key, pattern, str, by_letter)
    from_names = None if names is None else _lookup(list_key, names, list, _BLOCK_TYPES)
    if from_pattern is not None and from_names is not None and from_pattern != from_names:
        raise ConfigError(f"{pattern_key} {pattern!r} contradicts {list_key} {names!r}")
    return from_names if from_pattern is None else from_pattern


def _lookup(
    key: str, value: Any, kind: type[str] | type[list[Any]], table: Mapping[str, LayerKind]
) -> tuple[LayerKind, ...]:
    if not isinstance(value, kind):
        raise ConfigError(f"{key} must be a {kind.__name__}, got {value!r}")
    for index, item in enumerate(value):
        if not isinstance(item, str) or item not in table:
            raise ConfigError(f"{key}[{index}] is {item!r}; known are {', '.join(table)}")
    return tuple(table[item] for item in value)


def _mamba(read: _Reader) -> MambaConfig:
    heads, groups = read.integer("mamba_num_heads"), read.integer("n_groups")
    if heads % groups:
        raise ConfigError(f"mamba_num_heads {heads} is not a multiple of n_groups {groups}")
    return MambaConfig(
        num_heads=heads,
        head_dim=read.integer("mamba_head_dim"),
        num_groups=groups,
        state_size=read.integer("ssm_state_size"),
        conv_kernel=read.integer("conv_kernel", 4, low=2),
        chunk_size=read.integer("chunk_size", 128),
        conv_bias=read.flag("use_conv_bias", True),
        bias=read.flag("use_bias", False),
    )


def _attention(read: _Reader) -> AttentionConfig:
    heads = read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return AttentionConfig(heads, kv_heads, read.integer("head_dim"), read.flag("attention_bias", False))


def _moe(read: _Reader) -> MoEConfig:
    experts, groups = read.integer("n_routed_experts"), read.integer("n_group", 1)
    top_k, topk_groups = read.integer("num_experts_per_tok"), read.integer("topk_group", 1)
    if experts % groups:
        raise ConfigError(f"n_routed_experts {experts} is not a multiple of n_group {groups}")
    if groups > 1 and experts // groups < 2:
        raise ConfigError(f"n_group {groups} leaves one of {experts} experts per group; at least two are needed")
    if topk_groups > groups:
        raise ConfigError(f"topk_group {topk_groups} is more than n_group {groups}")
    if top_k > experts // groups * topk_groups:
        raise ConfigError(
            f"num_experts_per_tok {top_k} is more than the {experts // groups * topk_groups} experts it may pick from "
            f"(n_routed_experts {experts}, n_group {groups}, topk_group {topk_groups})"
        )
    read.choice("n_shared_experts", (1,), 1)
    read.flag("moe_shared_expert_overlap", False)  # a scheduling hint: the result is the same
    latent = None if read.get("moe_latent_size", None) is None else read.integer("moe_latent_size")
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        latent_size=latent,
        intermediate_size=read.integer("moe_intermediate_size"),
        shared_intermediate_size=read.integer("moe_shared_expert_intermediate_size"),
        num_groups=groups,
        topk_groups=topk_groups,
        normalise=read.flag("norm_topk_prob", True),
        scale=read.number("routed_scaling_factor", 1.0),
        bias=read.flag("mlp_bias", False),
    )


def _mlp(read: _Reader) -> MlpConfig:
    return MlpConfig(read.integer("intermediate_size"), read.flag("mlp_bias", False))
