"""Checkpoints that every peer can open: seeded random weights in the hub layout of nemotron_h.

``slice`` has Nemotron 3 Super's widths in five layers, small enough for a machine without a GPU; ``tiny`` is for tests.
Values are drawn in the order in which they are written, so a checkpoint is a function of its shape and the seed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SEED = 1234
SHARD_BYTES = 3 << 29
INDEX = "model.safetensors.index.json"  # written last: where it is, the checkpoint is whole


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes in which checkpoints differ; everything else is as published for Nemotron 3 Super."""

    pattern: str
    vocab_size: int
    hidden_size: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_latent_size: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int

    @property
    def expert_size(self) -> int:
        """Parameters of one routed expert."""
        return 2 * self.moe_latent_size * self.moe_intermediate_size

    def parameters(self) -> int:
        """Parameters that are stored."""
        return sum(math.prod(size) for _, size, _ in _layout(self))

    def parameters_per_token(self) -> int:
        """Parameters that one decoded token reads: all but the embedding table and the experts it is not sent to."""
        idle = self.n_routed_experts - self.num_experts_per_tok
        unread = self.vocab_size * self.hidden_size + self.pattern.count("E") * idle * self.expert_size
        return self.parameters() - unread


SHAPES = {
    "tiny": Shape(
        pattern="MEM*EMEM",
        vocab_size=4096,
        hidden_size=256,
        mamba_num_heads=8,
        mamba_head_dim=64,
        n_groups=2,
        ssm_state_size=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_latent_size=64,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=512,
    ),
    "slice": Shape(
        pattern="MEM*E",
        vocab_size=32768,
        hidden_size=4096,
        mamba_num_heads=128,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        n_routed_experts=128,
        num_experts_per_tok=22,
        moe_latent_size=1024,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
    ),
}


def make(name: str, folder: Path) -> Path:
    """The checkpoint of that name (a key of SHAPES) in ``folder``, written if it is not there; returns the folder.

    Raises OSError where the disk has no room for it.
    """
    shape = SHAPES[name]
    if (folder / INDEX).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    need = 2 * shape.parameters()
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(f"{folder}: {name} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    _write_json(folder / "config.json", config(shape))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_tokenizer(folder)
    _write_weights(shape, folder)
    return folder


def config(shape: Shape) -> dict[str, object]:
    """config.json with the published file's keys."""
    sizes = {field: getattr(shape, field) for field in Shape.__dataclass_fields__ if field != "pattern"}
    return {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "dtype": "bfloat16",
        "hybrid_override_pattern": shape.pattern, "num_hidden_layers": len(shape.pattern), **sizes,
        "intermediate_size": shape.moe_intermediate_size, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 5.0, "moe_shared_expert_overlap": False,
        "mlp_hidden_act": "relu2", "mlp_bias": False, "use_bias": False, "attention_bias": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "mamba_hidden_act": "silu", "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32", "use_mamba_kernels": True, "conv_kernel": 4, "use_conv_bias": True,
        "chunk_size": 128, "expand": 2, "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4,
        "time_step_limit": [0.0, math.inf], "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5, "residual_in_fp32": False,
        "rescale_prenorm_residual": True, "initializer_range": 0.02, "max_position_embeddings": 8192,
        "sliding_window": None, "rope_theta": 10000, "partial_rotary_factor": 1.0, "tie_word_embeddings": False,
        "num_logits_to_keep": 1, "num_nextn_predict_layers": 0, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def _layout(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Every tensor in order: its name, its size, and the kind of its values (see ``_values``)."""
    hidden = shape.hidden_size
    yield "backbone.embeddings.weight", (shape.vocab_size, hidden), "embedding"
    layers = {"M": _mamba_layout, "E": _moe_layout, "*": _attention_layout}
    for index, letter in enumerate(shape.pattern):
        yield f"backbone.layers.{index}.norm.weight", (hidden,), "one"
        for name, size, kind in layers[letter](shape):
            yield f"backbone.layers.{index}.mixer.{name}", size, kind
    yield "backbone.norm_f.weight", (hidden,), "one"
    yield "lm_head.weight", (shape.vocab_size, hidden), "weight"


def _mamba_layout(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    heads = shape.mamba_num_heads
    inner = heads * shape.mamba_head_dim
    convolved = inner + 2 * shape.n_groups * shape.ssm_state_size
    yield "in_proj.weight", (inner + convolved + heads, shape.hidden_size), "weight"
    yield "conv1d.weight", (convolved, 1, 4), "convolution"
    yield "conv1d.bias", (convolved,), "weight"
    yield "A_log", (heads,), "decay"
    yield "D", (heads,), "one"
    yield "dt_bias", (heads,), "time step"
    yield "norm.weight", (inner,), "one"
    yield "out_proj.weight", (shape.hidden_size, inner), "weight"


def _attention_layout(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"{name}.weight", (rows, shape.hidden_size), "weight"
    yield "o_proj.weight", (shape.hidden_size, queries), "weight"


def _moe_layout(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    hidden, latent = shape.hidden_size, shape.moe_latent_size
    shared, inner = shape.moe_shared_expert_intermediate_size, shape.moe_intermediate_size
    yield "gate.weight", (shape.n_routed_experts, hidden), "weight"
    yield "gate.e_score_correction_bias", (shape.n_routed_experts,), "correction"
    yield "fc1_latent_proj.weight", (latent, hidden), "weight"
    yield "fc2_latent_proj.weight", (hidden, latent), "weight"
    yield "shared_experts.up_proj.weight", (shared, hidden), "weight"
    yield "shared_experts.down_proj.weight", (hidden, shared), "weight"
    for expert in range(shape.n_routed_experts):
        yield f"experts.{expert}.up_proj.weight", (inner, latent), "weight"
        yield f"experts.{expert}.down_proj.weight", (latent, inner), "weight"


SCALES = {"embedding": 1.0, "weight": 0.02, "convolution": 0.3, "correction": 1e-3}
"""Standard deviations of what is drawn from a normal distribution."""


def _values(size: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    """A tensor of that kind: bf16, the router's correction fp32 as published."""
    if kind in SCALES:
        drawn = torch.randn(size, generator=generator) * SCALES[kind]
        return drawn if kind == "correction" else drawn.to(torch.bfloat16)
    if kind == "one":
        return torch.ones(size, dtype=torch.bfloat16)
    if kind == "decay":
        return torch.arange(1, size[0] + 1).float().log().to(torch.bfloat16)
    low, high = math.log(0.001), math.log(0.1)
    step = torch.exp(torch.rand(size, generator=generator) * (high - low) + low)
    return (step + torch.log(-torch.expm1(-step))).to(torch.bfloat16)  # the inverse of softplus


def _write_weights(shape: Shape, folder: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = shards = 0

    def flush() -> None:
        nonlocal shard, shards
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard = {}

    for name, size, kind in _layout(shape):
        shard[name] = _values(size, kind, generator)
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with a handful of merges: the least that every peer loads. Prompts are ids, never text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(config(SHAPES["tiny"]))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
