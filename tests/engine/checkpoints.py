"""Seeded random checkpoints in the published hub layout, written by transformers, with its model as the witness."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "moe_shared_expert_overlap": False,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 1024,
}
NAMES = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
OLD_NAMES = NAMES | {"M": "mamba", "*": "attention"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a checkpoint, and transformers' model with the same weights."""

    folder: Path
    config: dict[str, Any]
    witness: NemotronHForCausalLM

    def logits(self, token_ids: list[int]) -> Tensor:
        """transformers' logits [T, vocab] for every position."""
        with torch.no_grad():
            return self.witness(torch.tensor([token_ids]), use_cache=False).logits[0]


def make_checkpoint(
    folder: Path,
    pattern: str,
    *,
    spelling: str = "pattern",
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    prefix: str = "backbone.",
    mtp: str = "",
    seed: int = 0,
    **settings: Any,
) -> Checkpoint:
    """Random weights for ``pattern`` and BASE with ``settings``.

    spelling: how config.json names the layers: "pattern", "names" or "old names". mtp: the pattern of an MTP module.
    """
    witness = make_witness(pattern, BASE | settings, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    witness.save_pretrained(folder)
    tensors = {name.replace("backbone.", prefix): t for name, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    config = config_json(pattern, BASE | settings, spelling, mtp)
    if mtp:
        tensors |= mtp_tensors(mtp, tensors, config["hidden_size"], prefix, seed)
    write_tensors(
        folder, {name: t if name.endswith("correction_bias") else t.to(dtype) for name, t in tensors.items()}, shards
    )
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder, config, witness)


def make_witness(pattern: str, settings: dict[str, Any], dtype: torch.dtype, seed: int) -> NemotronHForCausalLM:
    """transformers' model in fp32, every parameter random and rounded to ``dtype``."""
    model = NemotronHForCausalLM(NemotronHConfig(layers_block_type=[NAMES[letter] for letter in pattern], **settings))
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        mixer = layer.mixer
        if hasattr(mixer, "time_step_limit"):
            mixer.time_step_limit = (0.0, float("inf"))  # transformers clamps dt on one of its two paths only
        if hasattr(mixer, "q_proj") and settings.get("attention_bias"):
            # transformers ignores attention_bias; the layers it uses can carry one.
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                old = getattr(mixer, name)
                setattr(mixer, name, nn.Linear(old.in_features, old.out_features, bias=True))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(_random(name, tensor.shape, generator))
            if not name.endswith("correction_bias"):
                tensor.copy_(tensor.to(dtype))
    model.set_experts_implementation("eager")  # the default one refuses odd widths
    return model.eval()


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values that keep activations near 1 and make every tensor matter."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name or name.endswith(".D"):
        return 1 + 0.2 * noise
    if name.endswith("A_log"):
        return 0.5 + 0.5 * noise
    if name.endswith("dt_bias"):
        return -1 + noise
    if name.endswith("bias"):
        return 0.1 * noise
    if name.endswith("embeddings.weight"):
        return noise
    if name.endswith("conv1d.weight"):
        return 0.5 * noise
    return noise * shape[-1] ** -0.5 * (2.0 if "lm_head" in name else 1.0)


def config_json(pattern: str, settings: dict[str, Any], spelling: str = "pattern", mtp: str = "") -> dict[str, Any]:
    """config.json with the published file's keys."""
    layers: dict[str, Any] = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    if spelling != "pattern":
        names = NAMES if spelling == "names" else OLD_NAMES
        layers = {"layers_block_type": [names[letter] for letter in pattern], "num_hidden_layers": None}
    return {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "dtype": "bfloat16",
        "attention_dropout": 0.0, "expand": 2, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
        "mamba_hidden_act": "silu", "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32",
        "mlp_hidden_act": "relu2", "n_shared_experts": 1, "norm_eps": 1e-5, "partial_rotary_factor": 1.0,
        "rescale_prenorm_residual": True, "residual_in_fp32": False, "rope_theta": 10000, "sliding_window": None,
        "tie_word_embeddings": False, "time_step_limit": [0.0, float("inf")], "time_step_min": 0.001,
        "use_conv_bias": True, "num_nextn_predict_layers": 1 if mtp else 0,
        **({"mtp_hybrid_override_pattern": mtp} if mtp else {}), **layers, **settings,
    }  # fmt: skip


def mtp_tensors(pattern: str, tensors: dict[str, Tensor], hidden: int, prefix: str, seed: int) -> dict[str, Tensor]:
    """An MTP module: each layer shaped like the first layer of its kind in the model, with values of its own."""
    generator = torch.Generator().manual_seed(seed + 1)
    kinds = {"*": "mixer.q_proj.weight", "E": "mixer.gate.weight", "-": "mixer.up_proj.weight"}
    shapes = {}
    for index, letter in enumerate(pattern):
        like = next(name for name in tensors if name.endswith(kinds[letter])).removesuffix(kinds[letter])
        assert like.startswith(prefix)
        shapes |= {
            name.replace(like, f"mtp.layers.{index}."): t.shape for name, t in tensors.items() if name.startswith(like)
        }
    shapes |= {f"mtp.layers.0.{name}.weight": (hidden,) for name in ("enorm", "hnorm")}
    shapes["mtp.layers.0.eh_proj.weight"] = (hidden, 2 * hidden)
    shapes[f"mtp.layers.{len(pattern) - 1}.final_layernorm.weight"] = (hidden,)
    return {name: _random(name, torch.Size(shape), generator) for name, shape in shapes.items()}


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One file, or as many shards with an index as asked for."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
