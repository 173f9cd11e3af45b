"""The published NVFP4 checkpoint of Nemotron 3 Super, tensor by tensor, as files that are all holes.

Written down from what is known of the release (names, shapes, dtypes, which layers keep which format), not from the
engine's own lists: those are what it is a witness for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN, VOCAB = 4096, 131072
PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*" + 4 * "EMEMEMEMEM*" + "EMEMEMEM*EMEMEMEME"
EXPERTS, LATENT, INNER, SHARED = 512, 1024, 2688, 5376
CONV, HEADS, STATE_WIDTH = 10240, 128, 8192
ATTENTION, KV = 4096, 256

FP8_IN_PROJ = {
    0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 27, 29, 31, 40, 49, 51, 53, 55, 57, 60, 62, 66, 68, 71, 73, 82, 84, 86,
}  # fmt: skip
FP8_OUT_PROJ = {
    0, 2, 4, 9, 11, 13, 18, 38, 40, 42, 44, 49, 51, 53, 55, 57, 60, 62, 64, 66, 68, 71, 73, 75, 77, 80, 82, 84, 86,
}  # fmt: skip
FP8_O_PROJ, FP8_FC1, FP8_FC2 = {69, 78}, {1, 3, 5}, {3}
BF16_SHARED_UP, NVFP4_SHARED_DOWN, BF16_SHARED_DOWN = {41}, {1}, {8, 76}

SHARDS = 17
BYTES = 80_297_329_824
TENSORS = 165_860
NVFP4_MATRICES, FP8_MATRICES = 40_961, 139

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}


def linear(name: str, rows: int, columns: int, form: str) -> Iterator[Tensor]:
    if form == "BF16":
        yield f"{name}.weight", "BF16", (rows, columns)
        return
    if form == "FP8":
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale", "F32", ()
    else:
        yield f"{name}.weight", "U8", (rows, columns // 2)
        yield f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16)
        yield f"{name}.weight_scale_2", "F32", ()
    yield f"{name}.input_scale", "F32", ()


def moe(name: str, shared: tuple[str, str], latent: tuple[str, str], experts: str) -> Iterator[Tensor]:
    yield f"{name}.gate.weight", "BF16", (EXPERTS, HIDDEN)
    yield f"{name}.gate.e_score_correction_bias", "F32", (EXPERTS,)
    yield from linear(f"{name}.shared_experts.up_proj", SHARED, HIDDEN, shared[0])
    yield from linear(f"{name}.shared_experts.down_proj", HIDDEN, SHARED, shared[1])
    yield from linear(f"{name}.fc1_latent_proj", LATENT, HIDDEN, latent[0])
    yield from linear(f"{name}.fc2_latent_proj", HIDDEN, LATENT, latent[1])
    for expert in range(EXPERTS):
        yield from linear(f"{name}.experts.{expert}.up_proj", INNER, LATENT, experts)
        yield from linear(f"{name}.experts.{expert}.down_proj", LATENT, INNER, experts)


def attention(name: str, o_proj: str) -> Iterator[Tensor]:
    yield f"{name}.q_proj.weight", "BF16", (ATTENTION, HIDDEN)
    yield f"{name}.k_proj.weight", "BF16", (KV, HIDDEN)
    yield f"{name}.v_proj.weight", "BF16", (KV, HIDDEN)
    yield from linear(f"{name}.o_proj", HIDDEN, ATTENTION, o_proj)


def chosen(layer: int, layers: set[int], form: str, otherwise: str) -> str:
    return form if layer in layers else otherwise


def tensors() -> Iterator[Tensor]:
    """All of them."""
    yield "backbone.embeddings.weight", "BF16", (VOCAB, HIDDEN)
    for i, kind in enumerate(PATTERN):
        name = f"backbone.layers.{i}"
        yield f"{name}.norm.weight", "BF16", (HIDDEN,)
        mixer = f"{name}.mixer"
        if kind == "M":
            yield from linear(f"{mixer}.in_proj", 18560, HIDDEN, chosen(i, FP8_IN_PROJ, "FP8", "BF16"))
            yield from linear(f"{mixer}.out_proj", HIDDEN, STATE_WIDTH, chosen(i, FP8_OUT_PROJ, "FP8", "BF16"))
            yield f"{mixer}.conv1d.weight", "BF16", (CONV, 1, 4)
            yield f"{mixer}.conv1d.bias", "BF16", (CONV,)
            for vector in ("A_log", "D", "dt_bias"):
                yield f"{mixer}.{vector}", "BF16", (HEADS,)
            yield f"{mixer}.norm.weight", "BF16", (STATE_WIDTH,)
        elif kind == "*":
            yield from attention(mixer, chosen(i, FP8_O_PROJ, "FP8", "BF16"))
            yield f"{mixer}.k_proj.k_scale", "F32", ()
            yield f"{mixer}.v_proj.v_scale", "F32", ()
        else:
            down = chosen(i, BF16_SHARED_DOWN, "BF16", chosen(i, NVFP4_SHARED_DOWN, "NVFP4", "FP8"))
            latent = chosen(i, FP8_FC1, "FP8", "BF16"), chosen(i, FP8_FC2, "FP8", "BF16")
            yield from moe(mixer, (chosen(i, BF16_SHARED_UP, "BF16", "FP8"), down), latent, "NVFP4")
    yield "backbone.norm_f.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN)
    for part in ("enorm", "hnorm", "norm"):
        yield f"mtp.layers.0.{part}.weight", "BF16", (HIDDEN,)
    yield "mtp.layers.0.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)
    yield from attention("mtp.layers.0.mixer", "BF16")
    for part in ("norm", "final_layernorm"):
        yield f"mtp.layers.1.{part}.weight", "BF16", (HIDDEN,)
    yield from moe("mtp.layers.1.mixer", ("BF16", "BF16"), ("BF16", "BF16"), "BF16")


def quantised() -> dict[str, dict[str, Any]]:
    """The metadata's map: module -> how."""
    found: dict[str, dict[str, Any]] = {}
    for name, dtype, _ in tensors():
        module, _, last = name.rpartition(".")
        if last == "weight" and dtype == "U8":
            found[module] = {"quant_algo": "NVFP4", "group_size": 16}
        if last == "weight" and dtype == "F8_E4M3":
            found[module] = {"quant_algo": "FP8"}
    return found


def num_bytes(tensor: Tensor) -> int:
    size = SIZES[tensor[1]]
    for length in tensor[2]:
        size *= length
    return size


def write(folder: Path, config: dict[str, Any]) -> None:
    """The folder as it is published, but all weights are holes in the files: nothing lies on the disk."""
    every = list(tensors())
    total, shard, filled, parts = sum(map(num_bytes, every)), 0, 0, [[] for _ in range(SHARDS)]
    for tensor in every:
        parts[min(SHARDS - 1, filled * SHARDS // total)].append(tensor)
        filled += num_bytes(tensor)
    weight_map = {}
    for shard, part in enumerate(parts, 1):
        file = f"model-{shard:05}-of-{SHARDS:05}.safetensors"
        header, at = {}, 0
        for tensor in part:
            header[tensor[0]] = {
                "dtype": tensor[1], "shape": list(tensor[2]), "data_offsets": [at, at + num_bytes(tensor)],
            }  # fmt: skip
            at += num_bytes(tensor)
            weight_map[tensor[0]] = file
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + at)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layers = quantised()
    metadata = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    inside = {
        "quant_method": "modelopt", **metadata, "ignore": [], "config_groups": {},
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": inside}))
    beside = {
        "producer": {"name": "modelopt", "version": "0.43.0"},
        "quantization": {**metadata, "kv_cache_quant_algo": "FP8"},
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
