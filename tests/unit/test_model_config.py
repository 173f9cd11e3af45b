"""config.json: both spellings, and one clear error for everything that cannot be run."""

import json
import math
from collections import Counter

import pytest
import torch
from published import NANO, SUPER, SUPER_PATTERN

from headrace.engine.config import ConfigError, LayerKind, ModelConfig
from headrace.engine.model import Caches
from headrace.engine.model.weights.names import memory_shapes, places


def test_super_as_published():
    config = ModelConfig.from_json(SUPER)
    assert config.pattern == SUPER_PATTERN
    assert [config.count(LayerKind(letter)) for letter in "ME*-"] == [40, 40, 8, 0]
    assert config.mtp_layers == (LayerKind.ATTENTION, LayerKind.MOE)
    assert config.mlp is None
    assert config.chunk_size == 128
    assert (config.mamba.inner_size, config.mamba.conv_dim, config.mamba.projection_size) == (8192, 10240, 18560)
    assert config.moe.latent_size == 1024


def parameters(config: ModelConfig) -> Counter[str]:
    """Parameters of each part; of the model's own layers by their letter, and apart those of unused experts."""
    sizes: Counter[str] = Counter()
    for name, shape in memory_shapes(config).items():
        size = math.prod(shape)
        head, _, rest = name.partition(".")
        part = config.layers[int(rest.partition(".")[0])].value if head == "layers" else head
        sizes[part] += size
        if ".experts." in name and head == "layers":
            sizes["unused"] -= size // shape[0] * (shape[0] - config.moe.top_k)
    return sizes


def test_published_sizes():
    """The numbers of the releases' own tensor headers, which count each router's bias."""
    config = ModelConfig.from_json(SUPER)
    sizes = parameters(config)
    unused = sizes.pop("unused")
    assert sizes.total() == 123_611_033_088
    assert sizes["mtp"] == 2_942_324_736 + 512
    assert sizes.total() - sizes["mtp"] == 120_668_687_360 + 40 * 512
    assert sizes.total() - sizes["mtp"] + unused == 12_770_216_960 + 40 * 512
    assert sizes["M"] == 40 * 109_640_064
    assert sizes["*"] == 8 * 35_655_680
    assert sizes["E"] == 40 * (2_873_102_336 + 512)
    # Files hold experts one by one.
    assert len(places(config)) == len(memory_shapes(config)) + 41 * 2 * (512 - 1)

    nano = parameters(ModelConfig.from_json(NANO))
    unused = nano.pop("unused")
    assert round(nano.total() / 1e9, 3) == 31.578
    assert round((nano.total() + unused) / 1e9, 3) == 3.580


def test_cache_sizes():
    config = ModelConfig.from_json(SUPER)
    caches = Caches.allocate(config, 1, 1, 1, device="meta", dtype=torch.bfloat16)
    assert sum(layer.nbytes for layer in (*caches.keys, *caches.values)) == 8 * 1024
    assert sum(layer.nbytes for layer in caches.ssm) == 160 * 2**20
    assert sum(layer.nbytes for layer in caches.conv) == 40 * 80 * 1024


NAMES = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


@pytest.mark.parametrize("rename", [{}, {"linear_attention": "mamba", "full_attention": "attention"}])
@pytest.mark.parametrize("count", [None, 88])
def test_both_spellings_mean_the_same(rename, count):
    names = [rename.get(NAMES[letter], NAMES[letter]) for letter in SUPER_PATTERN]
    listed = {key: value for key, value in SUPER.items() if not key.endswith("override_pattern")}
    listed |= {
        "layers_block_type": names,
        "num_hidden_layers": count,
        "mtp_layers_block_type": ["full_attention", "moe"],
    }
    assert ModelConfig.from_json(listed) == ModelConfig.from_json(SUPER)
    assert ModelConfig.from_json(SUPER | listed) == ModelConfig.from_json(SUPER)


def test_what_is_absent():
    nano = ModelConfig.from_json(NANO)
    assert nano.moe.latent_size is None
    assert nano.mtp_layers == ()
    assert ModelConfig.from_json(NANO | {"moe_latent_size": None}) == nano
    mlp = ModelConfig.from_json({"model_type": "nemotron_h", "vocab_size": 9, "hidden_size": 4,
                                 "hybrid_override_pattern": "-", "intermediate_size": 5})  # fmt: skip
    assert (mlp.mamba, mlp.attention, mlp.moe, mlp.mlp.intermediate_size) == (None, None, None, 5)
    assert mlp.chunk_size == 1
    without_kv = {key: value for key, value in SUPER.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_json(without_kv).attention.num_kv_heads == 32


REMOVE = object()
BAD = {
    "another model": ({"model_type": "llama"}, "model_type", "'llama'"),
    "no model type": ({"model_type": REMOVE}, "model_type", "missing"),
    "unknown letter": ({"hybrid_override_pattern": SUPER_PATTERN[:-1] + "X"}, "hybrid_override_pattern[87]", "'X'"),
    "pattern too short": ({"hybrid_override_pattern": "ME*"}, "num_hidden_layers", "88"),
    "empty pattern": ({"hybrid_override_pattern": ""}, "hybrid_override_pattern", "no layer"),
    "pattern of another type": ({"hybrid_override_pattern": ["M"]}, "hybrid_override_pattern", "['M']"),
    "no pattern": ({"hybrid_override_pattern": REMOVE}, "hybrid_override_pattern", "missing"),
    "unknown name": ({"layers_block_type": ["mamba", "rwkv"]}, "layers_block_type[1]", "'rwkv'"),
    "name of another type": ({"layers_block_type": ["mamba", ["moe"]]}, "layers_block_type[1]", "['moe']"),
    "names as a string": ({"layers_block_type": "MEM"}, "layers_block_type", "'MEM'"),
    "spellings disagree": ({"layers_block_type": ["moe"] * 88}, "layers_block_type", "contradicts"),
    "two MTP modules": ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers", "2"),
    "MTP with a state": ({"mtp_hybrid_override_pattern": "ME"}, "mtp_hybrid_override_pattern", "'ME'"),
    "MTP without layers": ({"mtp_hybrid_override_pattern": ""}, "mtp_hybrid_override_pattern", "''"),
    "MTP spellings disagree": ({"mtp_layers_block_type": ["moe"]}, "mtp_layers_block_type", "contradicts"),
    "kv heads": ({"num_key_value_heads": 5}, "num_key_value_heads", "5"),
    "Mamba groups": ({"n_groups": 7}, "n_groups", "7"),
    "more experts than there are": ({"num_experts_per_tok": 513}, "num_experts_per_tok", "513"),
    "more experts than the groups hold": ({"n_group": 32, "topk_group": 1}, "num_experts_per_tok", "16"),
    "uneven expert groups": ({"n_group": 7}, "n_group", "7"),
    "groups of one expert": ({"n_group": 512, "topk_group": 64}, "n_group", "512"),
    "more groups than there are": ({"topk_group": 2}, "topk_group", "2"),
    "two shared experts": ({"n_shared_experts": 2}, "n_shared_experts", "2"),
    "mlp activation": ({"mlp_hidden_act": "silu"}, "mlp_hidden_act", "'silu'"),
    "mamba activation": ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act", "'gelu'"),
    "state dtype": ({"mamba_ssm_cache_dtype": "float16"}, "mamba_ssm_cache_dtype", "'float16'"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings", "True"),
    "unused bias": ({"mamba_proj_bias": True}, "mamba_proj_bias", "True"),
    "window": ({"sliding_window": 4096}, "sliding_window", "4096"),
    "rope scaling": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling", "yarn"),
    "rope scaling without a type": ({"rope_scaling": {"factor": 4.0}}, "rope_scaling", "4.0"),
    "rope parameters": ({"rope_parameters": "long"}, "rope_parameters", "'long'"),
    "quantised by others": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "'gptq'"),
    "clamped dt": ({"time_step_limit": [0.001, math.inf]}, "time_step_limit", "0.001"),
    "dt limit of another type": ({"time_step_limit": 5}, "time_step_limit", "5"),
    "eps": ({"norm_eps": 1e-6}, "norm_eps", "1e-06"),
    "eps is NaN": ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon", "nan"),
    "eps is zero": ({"layer_norm_epsilon": 0}, "layer_norm_epsilon", "0"),
    "scale is infinite": ({"routed_scaling_factor": math.inf}, "routed_scaling_factor", "inf"),
    "scale is negative": ({"routed_scaling_factor": -1.0}, "routed_scaling_factor", "-1.0"),
    "scale is a string": ({"routed_scaling_factor": "2"}, "routed_scaling_factor", "'2'"),
    "size is negative": ({"hidden_size": -4096}, "hidden_size", "-4096"),
    "size is zero": ({"vocab_size": 0}, "vocab_size", "0"),
    "size is a float": ({"head_dim": 128.0}, "head_dim", "128.0"),
    "size is a flag": ({"ssm_state_size": True}, "ssm_state_size", "True"),
    "size is a list": ({"moe_intermediate_size": [1, 2]}, "moe_intermediate_size", "[1, 2]"),
    "kernel too short": ({"conv_kernel": 1}, "conv_kernel", "1"),
    "flag is a number": ({"use_conv_bias": 1}, "use_conv_bias", "1"),
    "flag is a string": ({"mlp_bias": "false"}, "mlp_bias", "'false'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name):
    changes, key, value = BAD[name]
    values = {k: v for k, v in (SUPER | changes).items() if v is not REMOVE}
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(values)
    assert key in str(error.value)
    assert value in str(error.value)
    assert "\n" not in str(error.value)


REQUIRED = [
    "vocab_size", "hidden_size", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size",
    "num_attention_heads", "head_dim", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_sizes_are_named(key):
    with pytest.raises(ConfigError, match=f"^{key} is missing$"):
        ModelConfig.from_json({k: v for k, v in SUPER.items() if k != key})


def test_harmless_values_pass():
    harmless = {
        "rope_scaling": {"rope_type": "default"},
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "unknown_key": {"anything": 1},
        "use_cache": True,
    }
    assert ModelConfig.from_json(SUPER | harmless) == ModelConfig.from_json(SUPER)


def test_files(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.load(tmp_path)
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="not JSON"):
            ModelConfig.load(tmp_path)
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="object"):
        ModelConfig.load(file)
    file.write_text(json.dumps(SUPER | {"time_step_limit": [0.0, math.inf]}))
    assert ModelConfig.load(tmp_path) == ModelConfig.load(file) == ModelConfig.from_json(SUPER)
