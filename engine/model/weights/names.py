"""Which tensors a configuration has, by name and shape: what a checkpoint must hold, no more and no less.

Names are the published ones without the leading ``backbone.`` (``model.`` in files written by newer transformers).
The experts of a layer are one stacked tensor in memory; in files they come one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.engine.config import LayerKind, ModelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file's tensor goes: a tensor in memory, or one row of a stacked one."""

    name: str
    row: int | None
    shape: tuple[int, ...]  # of the file's tensor


def places(config: ModelConfig) -> dict[str, Place]:
    """Name in the file (without prefix) -> where it goes, in the order of the layers."""
    table = {}
    for name, shape in memory_shapes(config).items():
        head, stacked, matrix = name.partition(".experts.")
        if not stacked:
            table[name] = Place(name, None, shape)
            continue
        for expert in range(shape[0]):
            table[f"{head}.experts.{expert}.{matrix}.weight"] = Place(name, expert, shape[1:])
    return table


def memory_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every tensor the model is built from."""
    hidden = config.hidden_size
    shapes: Shapes = {"embeddings.weight": (config.vocab_size, hidden)}
    for index, kind in enumerate(config.layers):
        shapes.update(_layer(config, f"layers.{index}", kind))
    shapes["norm_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index, kind in enumerate(config.mtp_layers):
        shapes.update(_layer(config, f"mtp.layers.{index}", kind))
    if config.mtp_layers:
        shapes["mtp.layers.0.enorm.weight"] = (hidden,)
        shapes["mtp.layers.0.hnorm.weight"] = (hidden,)
        shapes["mtp.layers.0.eh_proj.weight"] = (hidden, 2 * hidden)
        shapes[f"mtp.layers.{len(config.mtp_layers) - 1}.final_layernorm.weight"] = (hidden,)
    return shapes


def _layer(config: ModelConfig, name: str, kind: LayerKind) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.norm.weight", (config.hidden_size,)
    mixer = {
        LayerKind.MAMBA: _mamba,
        LayerKind.ATTENTION: _attention,
        LayerKind.MOE: _moe,
        LayerKind.MLP: _mlp,
    }[kind]
    for part, shape in mixer(config).items():
        yield f"{name}.mixer.{part}", shape


def _mamba(config: ModelConfig) -> Shapes:
    mamba, hidden = config.mamba, config.hidden_size
    assert mamba
    shapes: Shapes = {
        **_linear("in_proj", mamba.projection_size, hidden, mamba.bias),
        "conv1d.weight": (mamba.conv_dim, 1, mamba.conv_kernel),
    }
    if mamba.conv_bias:
        shapes["conv1d.bias"] = (mamba.conv_dim,)
    shapes.update(dict.fromkeys(("A_log", "D", "dt_bias"), (mamba.num_heads,)))
    shapes["norm.weight"] = (mamba.inner_size,)
    return shapes | _linear("out_proj", hidden, mamba.inner_size, mamba.bias)


def _attention(config: ModelConfig) -> Shapes:
    attention, hidden = config.attention, config.hidden_size
    assert attention
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    return {
        **_linear("q_proj", queries, hidden, attention.bias),
        **_linear("k_proj", keys, hidden, attention.bias),
        **_linear("v_proj", keys, hidden, attention.bias),
        **_linear("o_proj", hidden, queries, attention.bias),
    }


def _moe(config: ModelConfig) -> Shapes:
    moe, hidden = config.moe, config.hidden_size
    assert moe
    width = moe.latent_size or hidden
    shapes: Shapes = {
        "gate.weight": (moe.num_experts, hidden),
        "gate.e_score_correction_bias": (moe.num_experts,),
        "experts.up_proj": (moe.num_experts, moe.intermediate_size, width),
        "experts.down_proj": (moe.num_experts, width, moe.intermediate_size),
        **_linear("shared_experts.up_proj", moe.shared_intermediate_size, hidden, moe.bias),
        **_linear("shared_experts.down_proj", hidden, moe.shared_intermediate_size, moe.bias),
    }
    if moe.latent_size:
        shapes |= _linear("fc1_latent_proj", width, hidden, moe.bias)
        shapes |= _linear("fc2_latent_proj", hidden, width, moe.bias)
    return shapes


def _mlp(config: ModelConfig) -> Shapes:
    mlp, hidden = config.mlp, config.hidden_size
    assert mlp
    return {
        **_linear("up_proj", mlp.intermediate_size, hidden, mlp.bias),
        **_linear("down_proj", hidden, mlp.intermediate_size, mlp.bias),
    }


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes
