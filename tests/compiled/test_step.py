"""A whole decode step of the published model, captured without weights: how many launches it takes."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from headrace.engine.config import ModelConfig
from headrace.engine.model import Batch, Caches, NemotronH
from headrace.engine.model.weights.names import memory_shapes
from headrace.kernels import select
from headrace.kernels.control import ControlIds
from headrace.kernels.lab.launches import capture
from headrace.kernels.sampling import SamplerState

SUPER_LAYERS = {"M": 40, "E": 40, "*": 8}
SUPER = {
    "model_type": "nemotron_h", "hidden_size": 4096, "vocab_size": 131072, "hybrid_override_pattern": "ME*",
    "num_hidden_layers": 3, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128,
    "conv_kernel": 4, "chunk_size": 128, "use_conv_bias": True, "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 128, "n_routed_experts": 512, "num_experts_per_tok": 22, "n_shared_experts": 1,
    "moe_latent_size": 1024, "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
    "intermediate_size": 5376, "routed_scaling_factor": 5.0, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 262144, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
}  # fmt: skip


def launches_of_a_step(pattern: str, rows: int, **sampling: object) -> list[str]:
    """Names of the kernels that one decode step launches, inputs and sampler included."""
    config = ModelConfig.from_json({**SUPER, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)})
    kernels = select("triton")

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = {name: meta(*shape, dtype=torch.bfloat16) for name, shape in memory_shapes(config).items()}
    with capture(90) as launches:
        model = NemotronH(config, weights, kernels)
        assert not launches, "packing is not part of a step"
        caches = Caches.allocate(config, rows, 64, 64, device="meta", dtype=torch.bfloat16)
        table = meta(rows, 65, dtype=torch.int32)
        slots, state = meta(rows), SamplerState.allocate(rows, "meta")
        ids, positions = kernels.step_inputs(state.last_token, state.length, slots, meta(0), table, meta(rows, 3))
        batch = Batch(ids, slots, positions, (), (), (), table, meta(rows))
        logits = model.logits(model.forward(batch, caches))
        kernels.sample(logits, slots, state, ControlIds(eos=(2, 11), think=12, end_think=13, closing=(13,)), **sampling)
    return [launch.name for launch in launches]


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_four_launches_a_layer(rows):
    """Counted on one layer of each kind: the rest of the step is what an empty pattern would leave."""
    count = {pattern: len(launches_of_a_step(pattern, rows)) for pattern in ("ME*", "MME*", "MEE*", "ME**")}
    mamba, moe, attention = (count[p] - count["ME*"] for p in ("MME*", "MEE*", "ME**"))
    rest = count["ME*"] - mamba - moe - attention
    total = rest + 40 * mamba + 40 * moe + 8 * attention
    assert total <= 4 * 88, f"{total} launches: Mamba {mamba}, MoE {moe}, attention {attention}, others {rest}"


def test_logprobs_cost_no_launch_and_alternatives_few():
    plain = launches_of_a_step("M", 8)
    assert len(launches_of_a_step("M", 8, logprobs=True)) == len(plain)
    extra = Counter(launches_of_a_step("M", 8, top_logprobs=5)) - Counter(plain)
    assert 1 <= extra.total() <= 2
