"""Quantisation metadata: the published releases to the byte, both places, both forms, and errors that name the key."""

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from published import NANO, NANO_PATTERN, SUPER, SUPER_PATTERN

from headrace.engine.config import ConfigError, ModelConfig
from headrace.engine.model.weights.errors import CheckpointError
from headrace.engine.model.weights.header import DTYPES
from headrace.engine.model.weights.names import Place, places

# Two layers of each kind but attention, sizes that NVFP4 can hold.
SMALL: dict[str, Any] = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "ME*ME", "vocab_size": 64, "hidden_size": 32,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_latent_size": 16,
    "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
EXPERTS = [f"layers.1.mixer.experts.{expert}.{half}_proj" for expert in range(4) for half in ("up", "down")]
MAP: dict[str, Any] = {
    **{f"backbone.{name}": {"quant_algo": "NVFP4", "group_size": 16} for name in EXPERTS},
    "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
    "backbone.layers.1.mixer.shared_experts.up_proj": {"quant_algo": "FP8"},
}
INSIDE: dict[str, Any] = {
    "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": MAP, "ignore": [],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "config_groups": {"group_0": {"targets": ["a"], "weights": {"num_bits": 4, "group_size": 16, "type": "float"}}},
}  # fmt: skip
BESIDE: dict[str, Any] = {
    "producer": {"name": "modelopt", "version": "0.43.0"},
    "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": MAP},
}
UNIFORM: dict[str, Any] = {
    "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
        "exclude_modules": ["lm_head", "backbone.layers.2.mixer.*", "backbone.layers.0*", "*shared_experts", "*conv1d"],
    }
}  # fmt: skip


def read(inside: Any = None, beside: Any = None) -> ModelConfig:
    return ModelConfig.from_json(SMALL if inside is None else SMALL | {"quantization_config": inside}, beside)


# The releases


def num_bytes(name: str, place: Place) -> int:
    """As the releases store it: floats are bf16, but the router's bias and scales."""
    small = place.shape == () or name.endswith("correction_bias")
    dtype = "F32" if small else place.dtypes[0] if place.format != "float" else "BF16"
    return math.prod(place.shape) * DTYPES[dtype].itemsize


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def super_map(pattern: str) -> dict[str, Any]:
    """The release's 41,100 entries, from the third-party census in facts/model.md, section 4.1."""
    moe = [index for index, letter in enumerate(pattern) if letter == "E"]
    fp8 = {
        "in_proj": numbers("0 2 4 6 9 11 13 15 18 20 27 29 31 40 49 51 53 55 57 60 62 66 68 71 73 82 84 86"),
        "out_proj": numbers("0 2 4 9 11 13 18 38 40 42 44 49 51 53 55 57 60 62 64 66 68 71 73 75 77 80 82 84 86"),
        "o_proj": [69, 78],
        "shared_experts.up_proj": [index for index in moe if index != 41],
        "shared_experts.down_proj": [index for index in moe if index not in (1, 8, 76)],
        "fc1_latent_proj": [1, 3, 5],
        "fc2_latent_proj": [3],
    }
    nvfp4 = {f"experts.{expert}.{half}_proj": moe for expert in range(512) for half in ("up", "down")}
    nvfp4["shared_experts.down_proj"] = [1]
    return {
        f"backbone.layers.{layer}.mixer.{part}": value
        for parts, value in ((fp8, {"quant_algo": "FP8"}), (nvfp4, {"quant_algo": "NVFP4", "group_size": 16}))
        for part, layers in parts.items()
        for layer in layers
    }


def test_super_to_the_byte():
    """165,860 tensors in 80,297,329,824 bytes: the census of the release's own headers."""
    quantized = INSIDE | {"quantized_layers": super_map(SUPER_PATTERN)}
    table = places(ModelConfig.from_json(SUPER | {"quantization_config": quantized}))
    assert len(table) == 165_860
    assert sum(num_bytes(name, place) for name, place in table.items()) == 80_297_329_824
    assert Counter(place.format for place in table.values() if place.part == "weight_scale") == {
        "fp8": 139, "nvfp4": 40_961,
    }  # fmt: skip
    last = "layers.87.mixer.experts.511"
    shapes = {part: table[f"{last}.{part}"].shape for part in ("up_proj.weight", "down_proj.weight_scale")}
    assert shapes == {"up_proj.weight": (2688, 512), "down_proj.weight_scale": (1024, 168)}


def test_nano_to_the_tensor():
    """24,147 tensors in 19.3 GB, from 60 exclusions; its files have no KV scales."""
    excluded = ["lm_head"]
    for index, letter in enumerate(NANO_PATTERN):
        name = f"backbone.layers.{index}.mixer"
        excluded += [f"{name}.conv1d"] if letter == "M" else []
        if letter == "*":
            excluded += [f"{name}.{part}_proj" for part in "qkvo"]
            excluded += [f"backbone.layers.{index - 1}.mixer.{part}_proj" for part in ("in", "out")]
    assert len(excluded) == 60
    beside = UNIFORM["quantization"] | {"exclude_modules": excluded, "kv_cache_quant_algo": "FP8"}
    table = places(ModelConfig.from_json(NANO, {"producer": {"name": "modelopt"}, "quantization": beside}))
    files = {name: place for name, place in table.items() if not name.endswith(("k_scale", "v_scale"))}
    assert len(files) == 24_147
    assert round(sum(num_bytes(name, place) for name, place in files.items()) / 1e9, 1) == 19.3


# Both places, both forms


def test_either_place_says_it_all():
    inside, beside, both = read(INSIDE), read(None, BESIDE), read(INSIDE, BESIDE)
    assert inside == beside == both
    assert hash(inside) == hash(both)
    assert inside.quantization.formats == {"fp8", "nvfp4"}
    assert inside.quantization.kv_cache == "fp8"
    found = {name: place for name, place in places(inside).items() if place.format != "float"}
    assert {name.rpartition(".")[0] for name in found} == {name.removeprefix("backbone.") for name in MAP}
    weight, blocks, scale = (found[f"{EXPERTS[0]}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    assert (weight.shape, weight.dtypes, weight.row) == ((48, 8), ("U8",), 0)
    assert (blocks.shape, blocks.dtypes) == ((48, 1), ("F8_E4M3",))
    assert (scale.shape, scale.dtypes, scale.optional) == ((), ("F32",), False)
    assert found[f"{EXPERTS[0]}.input_scale"].optional
    assert found["layers.0.mixer.in_proj.weight"].dtypes == ("F8_E4M3",)
    assert "layers.0.mixer.in_proj.weight_scale_2" not in found
    assert places(inside)["layers.2.mixer.k_proj.k_scale"].optional
    assert read().quantization is None and not any(name.endswith("scale") for name in places(read()))


def test_newer_prefix_is_the_same():
    renamed = {name.replace("backbone.", "model."): value for name, value in MAP.items()}
    assert read(INSIDE | {"quantized_layers": renamed}) == read(INSIDE)


def test_one_algorithm_and_exclusions():
    """A name excludes what is below it; * stands for anything; the router and the convolution are never quantised."""
    config = read(None, UNIFORM)
    quantised = {name.rpartition(".")[0] for name, place in places(config).items() if place.format != "float"}
    others = [name.replace("layers.1", "layers.4") for name in EXPERTS]
    latent = [f"layers.{layer}.mixer.{part}_latent_proj" for layer in (1, 4) for part in ("fc1", "fc2")]
    assert quantised == {*EXPERTS, *others, *latent, "layers.3.mixer.in_proj", "layers.3.mixer.out_proj"}
    assert config.quantization.kv_cache is None
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}}
    ignored = {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": groups,
               "ignore": UNIFORM["quantization"]["exclude_modules"]}  # fmt: skip
    assert read(ignored) == config == read(ignored, UNIFORM)
    fp8 = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    assert places(read(None, fp8))["layers.2.mixer.q_proj.weight"].dtypes == ("F8_E4M3",)


def test_folders_are_read_whole(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"quantization_config": INSIDE}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(BESIDE))
    assert ModelConfig.load(tmp_path) == read(INSIDE)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert ModelConfig.load(tmp_path / "config.json") == read(INSIDE)
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json is not JSON"):
        ModelConfig.load(tmp_path)


# Errors


def set_at(values: dict[str, Any], *path: Any) -> dict[str, Any]:
    """A copy with the last of ``path`` at the keys before it."""
    changed = copy.deepcopy(values)
    at = changed
    for key in path[:-2]:
        at = at[key]
    at[path[-2]] = path[-1]
    return changed


def entry(value: object, name: str = "backbone.layers.0.mixer.in_proj") -> Callable[[], ModelConfig]:
    return lambda: read(set_at(INSIDE, "quantized_layers", name, value))


def inside(*path: object) -> Callable[[], ModelConfig]:
    return lambda: read(set_at(INSIDE, *path))


def beside(*path: object) -> Callable[[], ModelConfig]:
    return lambda: read(None, set_at(BESIDE, "quantization", *path))


def disagree(*path: object) -> Callable[[], ModelConfig]:
    return lambda: read(INSIDE, set_at(BESIDE, "quantization", *path))


IN_PROJ, O_PROJ = "backbone.layers.0.mixer.in_proj", "backbone.layers.2.mixer.o_proj"
BAD: dict[str, tuple[Callable[[], ModelConfig], list[str]]] = {
    "not an object": (lambda: read([1]), ["quantization_config", "[1]"]),
    "no method": (inside("quant_method", None), ["quant_method", "None"]),
    "another method": (inside("quant_method", "awq"), ["quant_method", "'modelopt'", "'awq'"]),
    "unknown algorithm": (inside("quant_algo", "W4A8_AWQ"), ["quant_algo", "FP8, NVFP4", "'W4A8_AWQ'"]),
    "no algorithm": (inside("quant_algo", None), ["quant_algo", "None"]),
    "unknown algorithm of a module": (entry({"quant_algo": "MXFP8"}), [IN_PROJ, "'MXFP8'"]),
    "entry of another type": (entry("FP8"), [IN_PROJ, "'FP8'"]),
    "entry without an algorithm": (entry({}), [IN_PROJ, "quant_algo", "None"]),
    "block size": (entry({"quant_algo": "NVFP4", "group_size": 32}), [IN_PROJ, "group_size must be 16", "32"]),
    "block size of FP8": (entry({"quant_algo": "FP8", "group_size": 128}), [IN_PROJ, "group_size", "128"]),
    "block size of a group": (
        inside("config_groups", "group_0", "weights", "group_size", 32), ["config_groups: group_0", "16", "32"],
    ),
    "block size of all": (
        lambda: read(None, set_at(UNIFORM, "quantization", "group_size", 32)), ["group_size must be 16", "32"],
    ),
    "no map": (inside("quantized_layers", None), ["quantized_layers", "None"]),
    "map of another type": (inside("quantized_layers", ["a"]), ["quantized_layers", "['a']"]),
    "map beside one algorithm": (inside("quant_algo", "FP8"), ["quantized_layers", "MIXED_PRECISION", "'FP8'"]),
    "a module twice": (entry({"quant_algo": "FP8"}, IN_PROJ.replace("backbone", "model")), ["twice", "in_proj"]),
    "named and excluded": (inside("ignore", ["*in_proj"]), ["in_proj", "quantized_layers", "ignore"]),
    "exclusions of another type": (inside("ignore", [1]), ["ignore", "[1]"]),
    "KV cache of 4 bits": (inside("kv_cache_scheme", {"num_bits": 4, "type": "float"}), ["kv_cache_scheme", "8-bit"]),
    "KV algorithm": (beside("kv_cache_quant_algo", "NVFP4"), ["kv_cache_quant_algo", "'FP8'", "'NVFP4'"]),
    "no quantization": (lambda: read(None, {"producer": {}}), ["hf_quant_config.json", "quantization", "None"]),
    "the two disagree on a module": (
        disagree("quantized_layers", O_PROJ, {"quant_algo": "FP8"}), ["disagree", "o_proj", "not named and fp8"],
    ),
    "the two disagree on a format": (
        disagree("quantized_layers", IN_PROJ, {"quant_algo": "NVFP4"}), ["disagree", "in_proj", "fp8 and nvfp4"],
    ),
    "the two disagree on the KV cache": (disagree("kv_cache_quant_algo", None), ["disagree", "KV cache fp8 and None"]),
    "the two disagree on the form": (
        lambda: read(INSIDE, set_at(UNIFORM, "quantization", "kv_cache_quant_algo", "FP8")),
        ["disagree", "MIXED_PRECISION and nvfp4"],
    ),
    "the two disagree on an exclusion": (
        lambda: read({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
                     {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "*q_proj"]}}),
        ["disagree", "'*q_proj'", "only one"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata_is_named(name):
    make, fragments = BAD[name]
    with pytest.raises(ConfigError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for fragment in fragments:
        assert fragment in message, message


NVFP4 = {"quant_algo": "NVFP4", "group_size": 16}


@pytest.mark.parametrize(
    ("name", "change", "fragments"),
    [
        ("backbone.layers.9.mixer.in_proj", {}, ["layers.9.mixer.in_proj", "no such linear layer"]),
        ("backbone.layers.1.mixer.gate", {}, ["layers.1.mixer.gate", "no such linear layer"]),
        ("backbone.embeddings", {}, ["'embeddings'", "no such linear layer"]),
        ("backbone.layers.1.mixer.experts.4.up_proj", {}, ["experts.4.up_proj", "no such linear layer"]),
        ("backbone.layers.4.mixer.experts.1.up_proj", {}, ["quantised alike", "experts.0.up_proj", "nvfp4"]),
        ("backbone.layers.2.mixer.q_proj", {"hidden_size": 40}, ["q_proj", "40 inputs", "multiple of 16"]),
    ],
)
def test_metadata_that_the_model_cannot_have(name, change, fragments):
    config = ModelConfig.from_json(
        SMALL | change | {"quantization_config": set_at(INSIDE, "quantized_layers", name, NVFP4)}
    )
    with pytest.raises(CheckpointError) as error:
        places(config)
    for fragment in fragments:
        assert fragment in str(error.value)
