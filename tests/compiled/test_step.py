"""A whole decode step of the published model, captured without weights: how many launches it takes."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from headrace.engine.config import ModelConfig
from headrace.engine.model import Batch, Caches, NemotronH
from headrace.engine.model.weights.names import memory_shapes
from headrace.kernels import select
from headrace.kernels.control import ControlIds
from headrace.kernels.lab.launches import capture
from headrace.kernels.sampling import SamplerState
from headrace.kernels.triton.sampling import control_ids
from headrace.kernels.triton.scratch import counters

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


NANO = SUPER | {
    "hidden_size": 2688, "mamba_num_heads": 64, "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_latent_size": None, "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
    "intermediate_size": 1856, "routed_scaling_factor": 2.5,
}  # fmt: skip
"""Without a latent space; its router is fp32 beside bf16 weights."""
FORMS = {"Super": (SUPER, torch.bfloat16), "Nano": (NANO, torch.float32)}  # and the dtype of the router


class TorchOps(TorchDispatchMode):
    """Counts the ops that torch itself would run on the device: all but those that allocate or look at memory."""

    FREE = {"aten.empty", "aten.empty_like", "aten.new_empty"}

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if not func.is_view and name not in self.FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def step(pattern: str, rows: int, form: str = "Super", **sampling: object) -> tuple[list[str], Counter[str]]:
    """The kernels that a decode step launches, inputs and sampler included, and the ops that torch itself runs."""
    fields, router = FORMS[form]
    config = ModelConfig.from_json({**fields, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)})
    kernels = select("triton")

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = {
        name: meta(*shape, dtype=router if name.endswith("gate.weight") else torch.bfloat16)
        for name, shape in memory_shapes(config).items()
    }
    with capture(90) as launches:
        model = NemotronH(config, weights, kernels)
        assert not launches, "packing is not part of a step"
        caches = Caches.allocate(config, rows, 64, 64, device="meta", dtype=torch.bfloat16)
        table = meta(rows, 65, dtype=torch.int32)
        slots, state = meta(rows), SamplerState.allocate(rows, "meta")
        control = ControlIds(eos=(2, 11), think=12, end_think=13, closing=(13,))
        none, page_writes, sample_rows = meta(0), meta(rows, 3), meta(rows)
        # What is made once for all steps.
        counters(slots.device, rows)
        control_ids(control, slots.device)
        with TorchOps() as ops:
            ids, positions = kernels.step_inputs(state.last_token, state.length, slots, none, table, page_writes)
            batch = Batch(ids, slots, positions, (), (), (), table, sample_rows)
            logits = model.logits(model.forward(batch, caches))
            kernels.sample(logits, slots, state, control, **sampling)
    return [launch.name for launch in launches], ops.names


def launches_of_a_step(pattern: str, rows: int, **more: object) -> list[str]:
    return step(pattern, rows, **more)[0]


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
@pytest.mark.parametrize(("form", "layers", "most"), [("Super", (40, 40, 8), 4 * 88), ("Nano", (23, 23, 6), 5.5 * 52)])
def test_launches_a_layer(form, layers, most, rows):
    """Counted on one layer of each kind: the rest of the step is what an empty pattern would leave.

    Without a latent space an MoE layer takes 8 and not 5: a norm of its own, since the experts read normed rows; the
    router apart from the shared expert, having another dtype; and experts too wide for one launch.
    """
    count = {pattern: len(launches_of_a_step(pattern, rows, form=form)) for pattern in ("ME*", "MME*", "MEE*", "ME**")}
    mamba, moe, attention = each = [count[p] - count["ME*"] for p in ("MME*", "MEE*", "ME**")]
    rest = count["ME*"] - sum(each)
    total = rest + sum(n * launches for n, launches in zip(layers, each, strict=True))
    assert total <= most, f"{total} launches: Mamba {mamba}, MoE {moe}, attention {attention}, others {rest}"


def test_logprobs_cost_no_launch_and_alternatives_few():
    plain = launches_of_a_step("M", 8)
    assert len(launches_of_a_step("M", 8, logprobs=True)) == len(plain)
    extra = Counter(launches_of_a_step("M", 8, top_logprobs=5)) - Counter(plain)
    assert 1 <= extra.total() <= 2


@pytest.mark.parametrize("form", FORMS)
def test_torch_runs_nothing(form):
    """Views and allocations apart, which cost the device nothing."""
    assert step("ME*", 8, form)[1] == {}
    assert step("ME*", 8, form, top_logprobs=5)[1] == {}


def test_torch_ops_would_be_seen():
    x = torch.empty(4, device="meta")
    with TorchOps() as ops:
        x[:2].view(1, 2).add_(1)
        torch.cat([x, torch.zeros_like(x)])
    assert ops.names == {"aten.add_": 1, "aten.cat": 1, "aten.zeros_like": 1}
