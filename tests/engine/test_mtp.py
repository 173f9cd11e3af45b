"""The MTP module against a version written straight from its description, since transformers has none."""

import pytest
import torch
from checkpoints import Checkpoint, make_checkpoint
from driver import random_prompt
from safetensors.torch import load_file
from torch import Tensor

from headrace.engine.model import NemotronH, load_model

SETTINGS = {"moe_latent_size": 32, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}


@pytest.fixture(scope="module", params=["*E", "*E-", "E"])
def pair(request, tmp_path_factory) -> tuple[Checkpoint, NemotronH]:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint = make_checkpoint(folder, "ME*-", mtp=request.param, dtype=torch.bfloat16, **SETTINGS)
    return checkpoint, load_model(folder)


class Plain:
    """float64, one token at a time, whole context recomputed; reads the files by itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        files = load_file(checkpoint.folder / "model.safetensors")
        self.tensors = {name: tensor.double() for name, tensor in files.items()}
        self.config = checkpoint.config
        self.pattern = self.config["mtp_hybrid_override_pattern"]

    def get(self, name: str) -> Tensor:
        return self.tensors[f"mtp.layers.{name}"]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config["layer_norm_epsilon"]).sqrt() * weight

    def drafts(self, hidden: Tensor, next_ids: list[int]) -> Tensor:
        embedded = self.tensors["backbone.embeddings.weight"][next_ids]
        parts = [self.norm(embedded, self.get("0.enorm.weight")), self.norm(hidden, self.get("0.hnorm.weight"))]
        x = torch.cat(parts, -1) @ self.get("0.eh_proj.weight").t()
        for index, letter in enumerate(self.pattern):
            mixer = {"*": self.attention, "E": self.moe, "-": self.mlp}[letter]
            x = x + mixer(self.norm(x, self.get(f"{index}.norm.weight")), f"{index}.mixer")
        return self.norm(x, self.get(f"{len(self.pattern) - 1}.final_layernorm.weight"))

    def attention(self, x: Tensor, name: str) -> Tensor:
        width, heads, kv_heads = (
            self.config[key] for key in ("head_dim", "num_attention_heads", "num_key_value_heads")
        )
        q, k, v = (x @ self.get(f"{name}.{part}_proj.weight").t() for part in "qkv")
        rows = []
        for t in range(len(x)):
            outs = []
            for head in range(heads):
                part = slice(head // (heads // kv_heads) * width, (head // (heads // kv_heads) + 1) * width)
                scores = k[: t + 1, part] @ q[t, head * width : (head + 1) * width] / width**0.5
                outs.append(scores.softmax(0) @ v[: t + 1, part])
            rows.append(torch.cat(outs))
        return torch.stack(rows) @ self.get(f"{name}.o_proj.weight").t()

    def mlp(self, x: Tensor, name: str) -> Tensor:
        inner = (x @ self.get(f"{name}.up_proj.weight").t()).clamp(min=0).square()
        return inner @ self.get(f"{name}.down_proj.weight").t()

    def moe(self, x: Tensor, name: str) -> Tensor:
        experts, groups = self.config["n_routed_experts"], self.config["n_group"]
        scores = torch.sigmoid(x @ self.get(f"{name}.gate.weight").t())
        choice = scores + self.get(f"{name}.gate.e_score_correction_bias")
        latent = x @ self.get(f"{name}.fc1_latent_proj.weight").t()
        rows = []
        for t in range(len(x)):
            best_two = choice[t].view(groups, -1).sort(-1).values[:, -2:].sum(-1)
            group = int(best_two.argmax())
            allowed = choice[t].clone()
            allowed[[e for e in range(experts) if e // (experts // groups) != group]] = -torch.inf
            picked = allowed.argsort(descending=True)[: self.config["num_experts_per_tok"]].tolist()
            total = sum(scores[t, picked])
            out = sum(scores[t, e] / total * self.mlp(latent[t], f"{name}.experts.{e}") for e in picked)
            rows.append(out * self.config["routed_scaling_factor"])
        routed = torch.stack(rows) @ self.get(f"{name}.fc2_latent_proj.weight").t()
        return routed + self.mlp(x, f"{name}.shared_experts")


def test_drafts(pair):
    """Also the second draft, made from the first one's output."""
    checkpoint, model = pair
    plain = Plain(checkpoint)
    ids = random_prompt(160, model.config.vocab_size, 0)
    hidden = torch.randn(159, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    actual = model.mtp.forward(hidden, torch.tensor(ids[1:]))
    expected = plain.drafts(hidden.double(), ids[1:])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    second = model.mtp.forward(actual[:-1], torch.tensor(ids[2:]))
    torch.testing.assert_close(second.double(), plain.drafts(expected[:-1], ids[2:]), rtol=2e-4, atol=2e-4)
    head = plain.tensors["lm_head.weight"]
    torch.testing.assert_close(model.logits(actual).double(), expected @ head.t(), rtol=5e-4, atol=5e-4)


def test_a_draft_does_not_see_later_tokens(pair):
    _, model = pair
    ids = torch.tensor(random_prompt(140, model.config.vocab_size, 2))
    hidden = torch.randn(140, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    whole = model.mtp.forward(hidden, ids)
    for length in (0, 1, 17, 128, 129):
        assert torch.equal(model.mtp.forward(hidden[:length], ids[:length]), whole[:length])


def test_a_model_without_mtp_has_none(tmp_path):
    assert load_model(make_checkpoint(tmp_path, "M").folder).mtp is None
