"""Write a trained model in the published layout: `python -m benchmarks.tiny.export RUN --out engine/tiny`.

Everything is stored as bf16 except the routers' correction biases (fp32), with one tensor per expert.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.tiny.mtp import Mtp
from benchmarks.tiny.network import Config, Network
from benchmarks.tiny.tokenizer import CONTROL, IM_END, MODEL_DIR, THINK, TOKENIZER

MAX_POSITIONS = 4096


def published(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The published name (one per expert) and dtype of a parameter."""
    tensor = tensor.detach()
    if ".experts." in name:
        stem, which = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            yield f"{stem}.{expert}.{which}.weight", matrix.to(torch.bfloat16).contiguous()
    elif name.endswith("e_score_correction_bias"):
        yield name, tensor.float()
    else:
        yield name, tensor.to(torch.bfloat16).contiguous()


def tensors(network: Network, head: Mtp) -> dict[str, Tensor]:
    """All tensors of the checkpoint by published name."""
    holder = nn.ModuleDict({"mtp": head})
    everything = {**network.state_dict(), **holder.state_dict()}
    return dict(pair for item in everything.items() for pair in published(*item))


def model_config(config: Config) -> dict[str, Any]:
    """config.json in the published spelling."""
    sizes = asdict(config)
    return sizes | {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "bfloat16",
        "num_hidden_layers": len(config.hybrid_override_pattern), "expand": 2,
        "intermediate_size": config.moe_intermediate_size, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu",
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "use_bias": False, "hidden_dropout": 0.0,
        "mamba_proj_bias": False, "use_conv_bias": True, "norm_eps": config.layer_norm_epsilon, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True, "moe_shared_expert_overlap": False,
        "num_logits_to_keep": 1, "tie_word_embeddings": False, "residual_in_fp32": False,
        "rescale_prenorm_residual": True, "initializer_range": 0.02, "mamba_ssm_cache_dtype": "float32",
        "use_mamba_kernels": True, "use_cache": True, "max_position_embeddings": MAX_POSITIONS, "sliding_window": None,
        "rope_theta": 10000, "partial_rotary_factor": 1.0, "time_step_min": 0.001, "time_step_max": 0.1,
        "time_step_floor": 1e-4, "time_step_limit": [0.0, float("inf")], "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def generation_config() -> dict[str, Any]:
    ids = {"bos_token_id": 1, "eos_token_id": [2, IM_END], "pad_token_id": 0}
    return ids | {"do_sample": True, "temperature": 1.0, "top_p": 0.95}


def tokenizer_config() -> dict[str, Any]:
    """As Nemotron 3: <think> and later markers are not special, so they survive skip_special_tokens."""
    pieces = ("<unk>", "<s>", "</s>", *CONTROL)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(index): {"content": piece, "special": index < THINK} | flags for index, piece in enumerate(pieces)}
    return {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_eos_token": False,
        "add_prefix_space": False, "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
        "pad_token": "<unk>", "model_max_length": MAX_POSITIONS, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added,
    }  # fmt: skip


def write(out: Path, network: Network, head: Mtp) -> None:
    """The whole model folder, apart from the chat template and the card."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors(network, head), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    files = {"config": model_config(network.config), "generation_config": generation_config()}
    for name, values in (files | {"tokenizer_config": tokenizer_config()}).items():
        (out / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")
    if out.resolve() != TOKENIZER.parent:
        shutil.copy(TOKENIZER, out)


def trained(folder: Path) -> tuple[Network, Mtp]:
    """The network and head in `folder`; before the MTP stage the head is untrained."""
    network, head = Network(Config()), Mtp(Config())
    network.load_state_dict(torch.load(folder / "backbone.pt", weights_only=True)["modules"]["network"])
    if (folder / "mtp.pt").exists():
        head.load_state_dict(torch.load(folder / "mtp.pt", weights_only=True)["modules"]["head"])
    return network.eval(), head.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with backbone.pt and mtp.pt")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    torch.manual_seed(0)
    write(args.out, *trained(args.folder))
    print(f"{args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
