"""config.json of the published checkpoints, without what only describes them."""

from typing import Any

SUPER_PATTERN = (
    "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
)  # fmt: skip
NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"

SHARED: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "vocab_size": 131072,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": False,
    "attention_dropout": 0.0, "sliding_window": None, "rope_theta": 10000, "partial_rotary_factor": 1.0,
    "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128, "expand": 2,
    "use_conv_bias": True, "use_bias": False, "mamba_proj_bias": False, "mamba_hidden_act": "silu",
    "mamba_ssm_cache_dtype": "float32", "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "mlp_hidden_act": "relu2",
    "mlp_bias": False, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5,
    "residual_in_fp32": False, "rescale_prenorm_residual": True, "max_position_embeddings": 262144,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip
SUPER = SHARED | {
    "hidden_size": 4096, "num_hidden_layers": 88, "hybrid_override_pattern": SUPER_PATTERN, "mamba_num_heads": 128,
    "n_routed_experts": 512, "num_experts_per_tok": 22, "moe_intermediate_size": 2688, "intermediate_size": 2688,
    "moe_shared_expert_intermediate_size": 5376, "moe_latent_size": 1024, "moe_shared_expert_overlap": False,
    "routed_scaling_factor": 5.0, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
}  # fmt: skip
NANO = SHARED | {
    "hidden_size": 2688, "num_hidden_layers": 52, "hybrid_override_pattern": NANO_PATTERN, "mamba_num_heads": 64,
    "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5,
}  # fmt: skip
