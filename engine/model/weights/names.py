"""Which tensors a configuration has, by name and shape: what a checkpoint must hold, no more and no less.

Names are the published ones without the leading ``backbone.`` (``model.`` in files written by newer transformers).
The experts of a layer are one stacked weight in memory; in files they come one by one. A quantised weight is one in
memory too; in files it is ``X.weight`` and its scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from headrace.engine.config import LayerKind, ModelConfig
from headrace.engine.model.weights.errors import CheckpointError
from headrace.engine.model.weights.header import FLOATS
from headrace.kernels.formats import BLOCK, Format

Shapes = dict[str, tuple[int, ...]]

LINEAR = (
    *("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    *("fc1_latent_proj", "fc2_latent_proj", "eh_proj", "lm_head"),
)
"""Modules that may be quantised, by the last part of their names. The router is none: it picks, at full precision."""

Part = Literal["weight", "weight_scale", "weight_scale_2", "input_scale"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file's tensor goes: a tensor in memory, or a part of a quantised one, or of one row of a stacked one."""

    name: str
    row: int | None
    shape: tuple[int, ...]  # of the file's tensor
    dtypes: tuple[str, ...] = FLOATS  # that it may have, as a header spells them
    format: Format = "float"  # of the weight
    part: Part = "weight"
    optional: bool = False


def places(config: ModelConfig) -> dict[str, Place]:
    """Name in the file (without prefix) -> where it goes, in the order of the layers.

    Raises CheckpointError if the configuration's quantisation is not one of this model.
    """
    table: dict[str, Place] = {}
    _check_modules(config)
    for name, shape in memory_shapes(config).items():
        head, stacked, matrix = name.partition(".experts.")
        if not stacked:
            table.update(_tensor(config, name, None, name.removesuffix(".weight"), shape))
            continue
        for expert in range(shape[0]):
            table.update(_tensor(config, name, expert, f"{head}.experts.{expert}.{matrix}", shape[1:]))
    return table | _kv_scales(config)


def modules(config: ModelConfig) -> Shapes:
    """Linear layer -> [N, K]; experts one by one. What may be quantised."""
    found: Shapes = {}
    for name, shape in memory_shapes(config).items():
        head, stacked, matrix = name.partition(".experts.")
        if stacked:
            found |= {f"{head}.experts.{expert}.{matrix}": shape[1:] for expert in range(shape[0])}
        elif name.endswith(".weight") and name.split(".")[-2] in LINEAR:
            found[name.removesuffix(".weight")] = shape
    return found


def _check_modules(config: ModelConfig) -> None:
    if config.quantization is None:
        return
    linear = modules(config)
    unknown = [name for name in config.quantization.modules if name not in linear]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"quantized_layers names {unknown[0]!r}{more}, but config.json describes no such linear layer"
        )
    stacks: dict[str, tuple[str, Format]] = {}
    for name, (_, width) in linear.items():
        found = config.quantization.format_of(name)
        if found == "nvfp4" and width % BLOCK:
            raise CheckpointError(f"{name!r} is to be NVFP4, but its {width} inputs are not a multiple of {BLOCK}")
        head, expert, _ = name.partition(".experts.")
        first, other = stacks.setdefault(head, (name, found)) if expert else (name, found)
        if other != found:
            raise CheckpointError(f"experts of a layer must be quantised alike: {first!r} is {other}, {name!r} {found}")


def _tensor(
    config: ModelConfig, name: str, row: int | None, module: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, Place]]:
    """The file's tensors of one weight in memory."""
    file = name if row is None else f"{module}.weight"
    form: Format = "float"
    if config.quantization and file.endswith(".weight") and module.split(".")[-1] in LINEAR:
        form = config.quantization.format_of(module)
    if form == "float":
        yield file, Place(name, row, shape)
        return
    rows, width = shape
    if form == "fp8":
        yield file, Place(name, row, shape, ("F8_E4M3",), form)
        yield f"{module}.weight_scale", Place(name, row, (), ("F32",), form, "weight_scale")
    else:
        yield file, Place(name, row, (rows, width // 2), ("U8",), form)
        blocks = (rows, width // BLOCK)
        yield f"{module}.weight_scale", Place(name, row, blocks, ("F8_E4M3",), form, "weight_scale")
        yield f"{module}.weight_scale_2", Place(name, row, (), ("F32",), form, "weight_scale_2")
    # Of the activations, which nothing here quantises.
    yield f"{module}.input_scale", Place(name, row, (), ("F32",), form, "input_scale", optional=True)


KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")
"""Of an fp8 KV cache: the ends of their names. Files have them for every attention layer, or for none."""


def _kv_scales(config: ModelConfig) -> dict[str, Place]:
    """Scales of an fp8 KV cache (the MTP module's has none), where the files have them; else they are 1."""
    if config.quantization is None:
        return {}
    layers = [f"layers.{index}" for index, kind in enumerate(config.layers) if kind is LayerKind.ATTENTION]
    names = [f"{layer}.mixer.{scale}" for layer in layers for scale in KV_SCALES]
    return {name: Place(name, None, (), optional=True) for name in names}


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
