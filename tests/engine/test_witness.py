"""The model against transformers' NemotronH on random checkpoints: logits, and greedy continuations."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from checkpoints import Checkpoint, make_checkpoint
from driver import Driver, random_prompt
from transformers import NemotronHForCausalLM

from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.model import NemotronH, load_model

TOLERANCE = 1e-4
"""Of fp32 logits, relative to the larger of |expected| and the row's root mean square."""
LENGTH = 300


@dataclass(frozen=True)
class Case:
    name: str
    pattern: str
    write: dict[str, Any] = field(default_factory=dict)  # how the files are written
    settings: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("latent MoE", "MEM*EMEM*E", settings={"moe_latent_size": 32}),
    Case("latent MoE, sharded bf16", "MEM*E", {"dtype": torch.bfloat16, "shards": 3}, {"moe_latent_size": 16}),
    Case("plain MoE", "ME*EM", {"spelling": "names", "prefix": "model."}),
    Case("plain MoE, all experts", "E*ME", settings={"num_experts_per_tok": 8, "norm_topk_prob": False}),
    Case("dense MLP", "M-*-M-", {"spelling": "old names"}),
    Case("every kind, fp16", "ME*-", {"dtype": torch.float16}, {"moe_latent_size": 32}),
    Case("one Mamba group, default chunk", "MEM", settings={"n_groups": 1, "chunk_size": 128, "moe_latent_size": 32}),
    Case("four Mamba groups", "MM*", {"spelling": "names"}, {"n_groups": 4}),
    Case("eight Mamba groups", "M*M", settings={"n_groups": 8}),
    Case("group-limited routing", "ME*E", settings={"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
    Case("group-limited latent", "MEM*E", settings={"n_group": 2, "topk_group": 1, "moe_latent_size": 32}),
    Case(
        "all biases, no conv bias",
        "ME*-ME",
        {"mtp": "*E"},
        {"use_bias": True, "mlp_bias": True, "attention_bias": True, "use_conv_bias": False, "moe_latent_size": 32},
    ),
    Case("shared expert overlap", "MEE", settings={"moe_shared_expert_overlap": True}),
    Case(
        "odd sizes",
        "M*EM",
        settings={
            "vocab_size": 101,
            "hidden_size": 50,
            "mamba_num_heads": 6,
            "mamba_head_dim": 7,
            "n_groups": 3,
            "ssm_state_size": 5,
            "conv_kernel": 3,
            "chunk_size": 13,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 11,
            "moe_latent_size": 19,
            "moe_intermediate_size": 23,
            "moe_shared_expert_intermediate_size": 29,
        },
    ),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request, tmp_path_factory) -> tuple[Checkpoint, NemotronH]:
    case = request.param
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), case.pattern, **case.write, **case.settings)
    return checkpoint, load_model(checkpoint.folder)


def test_logits(pair):
    """Every position of a long prompt, which by causality is every prompt of 1 to 300 tokens."""
    checkpoint, model = pair
    prompt = random_prompt(LENGTH, model.config.vocab_size, seed=1)
    actual, expected = Driver(model, 1).step(chunks={0: prompt}), checkpoint.logits(prompt)
    assert actual.dtype == torch.float32
    scale = torch.maximum(expected.abs(), expected.square().mean(-1, keepdim=True).sqrt())
    assert float(((actual - expected).abs() / scale).max()) < TOLERANCE


def test_a_prompt_is_the_beginning_of_a_longer_one(pair):
    """What makes the test above cover all lengths: the bits of a short prompt are those of the long one's rows."""
    _, model = pair
    prompt = random_prompt(LENGTH, model.config.vocab_size, seed=1)
    whole = Driver(model, 1).step(chunks={0: prompt})
    for length in (1, 2, 12, 13, 31, 32, 33, 127, 128, 200, 299):
        assert torch.equal(Driver(model, 1).step(chunks={0: prompt[:length]}), whole[:length]), length


def test_greedy_continuations(pair):
    """64 tokens after prompts of several lengths. The witness reads prompt and continuation in one pass: it would
    have said the same as long as each of our tokens is its own most likely one after the same prefix. Where two
    tokens are closer than 1e-4 the two arithmetics may differ; at most one token in a hundred may be such a one.
    """
    checkpoint, model = pair
    close = total = 0
    for seed, length in enumerate((1, 30, 130)):
        prompt = random_prompt(length, model.config.vocab_size, seed)
        tokens = Driver(model, 1).greedy(0, prompt, 64)
        assert len(set(tokens)) > 8, "a continuation that repeats itself proves little"
        expected = checkpoint.logits([*prompt, *tokens])[length - 1 : -1]
        margins = expected.max(-1).values - expected[torch.arange(64), torch.tensor(tokens)]
        assert float(margins.max()) < 1e-4, f"token {int(margins.argmax())} is not the witness's"
        close += int((margins > 0).sum())
        total += len(tokens)
    assert close <= 0.01 * total


def test_the_embedded_model():
    """The files that come with the package, read by transformers as any published checkpoint."""
    witness = NemotronHForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    for layer in witness.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    model = load_model(EMBEDDED_MODEL)
    prompt = random_prompt(200, model.config.vocab_size, 0)
    with torch.no_grad():
        expected = witness(torch.tensor([prompt]), use_cache=False).logits[0]
    actual = Driver(model, 1).step(chunks={0: prompt})
    scale = torch.maximum(expected.abs(), expected.square().mean(-1, keepdim=True).sqrt())
    assert float(((actual - expected).abs() / scale).max()) < TOLERANCE
    assert model.mtp is not None
