"""A trainable nemotron_h in plain PyTorch, small enough for a CPU.

Parameter names follow the published checkpoints (`backbone.layers.N.mixer...`, `mtp.layers.N...`), except that the
experts of a layer are one stacked tensor here. Rows hold several packed examples; nothing leaks between them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESET = -60.0
"""Log decay added at an example's first token: exp(-60) of the previous state is nothing, and fp32 sums keep 1e-5."""


@dataclass(frozen=True)
class Config:
    """Sizes, in the spelling of config.json."""

    vocab_size: int = 640
    hidden_size: int = 160
    hybrid_override_pattern: str = "MEM*EM*E"
    mamba_num_heads: int = 8
    mamba_head_dim: int = 32
    n_groups: int = 2
    ssm_state_size: int = 32
    conv_kernel: int = 4
    chunk_size: int = 64
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    moe_latent_size: int = 64
    moe_intermediate_size: int = 128
    moe_shared_expert_intermediate_size: int = 256
    routed_scaling_factor: float = 2.5
    layer_norm_epsilon: float = 1e-5

    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size


@dataclass(frozen=True)
class Packing:
    """What the mixers need to keep packed examples apart."""

    attention: Tensor
    """[rows, 1, tokens, tokens], 0 where a query may look and -inf elsewhere."""
    same: Tensor
    """[rows, tokens, taps], 1 where the token `tap` places back belongs to the same example."""
    reset: Tensor
    """[rows, tokens], RESET at the first token of an example and 0 elsewhere."""

    @staticmethod
    def of(document: Tensor, taps: int) -> "Packing":
        tokens = document.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=document.device).tril()
        visible = (document[:, :, None] == document[:, None, :]) & causal
        attention = torch.zeros(visible.shape, device=document.device).masked_fill(~visible, -math.inf)
        same = torch.stack([shifted(document + 2, tap) == document + 2 for tap in range(taps)], -1).float()
        return Packing(attention[:, None], same, (1 - same[..., 1]) * RESET)


def shifted(values: Tensor, places: int) -> Tensor:
    """`values` moved `places` to the right along dimension 1, zeros coming in."""
    if not places:
        return values
    return F.pad(values.transpose(1, -1), (places, 0))[..., : values.shape[1]].transpose(1, -1)


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale * inputs**-0.5)
    return layer


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class GatedNorm(nn.Module):
    """y * silu(z), then RMSNorm within each group of channels."""

    def __init__(self, size: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.epsilon = groups, epsilon

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        grouped = (y * F.silu(gate)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(grouped, grouped.shape[-1:], None, self.epsilon).flatten(-2) * self.weight


class Mamba(nn.Module):
    """Mamba-2 with the chunked quadratic form."""

    def __init__(self, config: Config, scale: float) -> None:
        super().__init__()
        self.config = config
        heads, inner, channels = config.mamba_num_heads, config.mamba_inner, config.conv_channels
        self.in_proj = linear(config.hidden_size, inner + channels + heads)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels)
        self.A_log = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.D = nn.Parameter(torch.ones(heads))
        step = torch.exp(torch.rand(heads) * math.log(100) + math.log(1e-3))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = GatedNorm(inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = linear(inner, config.hidden_size, scale)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        c = self.config
        states = c.n_groups * c.ssm_state_size
        gate, convolved, dt = self.in_proj(x).split([c.mamba_inner, c.conv_channels, c.mamba_num_heads], -1)
        values, keys, queries = self.convolve(convolved, packing).split([c.mamba_inner, states, states], -1)
        dt = F.softplus(dt + self.dt_bias)
        decay = dt * -torch.exp(self.A_log) + packing.reset[..., None]
        values = values.unflatten(-1, (c.n_groups, -1, c.mamba_head_dim))
        dt = dt.unflatten(-1, (c.n_groups, -1))
        keys, queries = (part.unflatten(-1, (c.n_groups, -1)) for part in (keys, queries))
        mixed = scan(values * dt[..., None], keys, queries, decay.unflatten(-1, (c.n_groups, -1)), c.chunk_size)
        mixed = mixed + values * self.D.view(c.n_groups, -1, 1)
        return self.out_proj(self.norm(mixed.flatten(2), gate))

    def convolve(self, x: Tensor, packing: Packing) -> Tensor:
        taps = self.conv1d.weight[:, 0]
        total = self.conv1d.bias + x * taps[:, -1]
        for back in range(1, self.config.conv_kernel):
            total = total + shifted(x, back) * packing.same[..., back, None] * taps[:, -1 - back]
        return F.silu(total)


def scan(values: Tensor, keys: Tensor, queries: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """y_t = sum over s <= t of exp(decay summed over s+1..t) (q_t . k_s) v_s, chunk by chunk.

    Shapes: values [B, T, G, H, P], keys and queries [B, T, G, N], decay [B, T, G, H] (G groups of H heads).
    """
    tokens = values.shape[1]
    chunk = min(chunk, tokens)
    short = -tokens % chunk
    if short:
        values, keys, queries, decay = (
            F.pad(part.transpose(1, -1), (0, short)).transpose(1, -1) for part in (values, keys, queries, decay)
        )
    values, keys, queries, decay = (part.unflatten(1, (-1, chunk)) for part in (values, keys, queries, decay))
    running = decay.cumsum(2).permute(0, 1, 3, 4, 2)  # [B, C, G, H, t]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=values.device).tril()
    gaps = running[..., :, None] - running[..., None, :]
    weights = torch.exp(gaps.masked_fill(~causal, -math.inf))
    keys, queries = keys.transpose(2, 3), queries.transpose(2, 3)  # [B, C, G, t, N]
    values = values.permute(0, 1, 3, 4, 2, 5)  # [B, C, G, H, t, P]
    scores = (queries @ keys.transpose(-1, -2))[:, :, :, None]
    inside = (scores * weights) @ values
    to_end = torch.exp(running[..., -1:] - running)
    added = (keys.transpose(-1, -2)[:, :, :, None] * to_end[..., None, :]) @ values  # [B, C, G, H, N, P]
    kept = torch.exp(running[..., -1])[..., None, None]
    state, before = torch.zeros_like(added[:, 0]), []
    for index in range(added.shape[1]):
        before.append(state)
        state = state * kept[:, index] + added[:, index]
    carried = (queries[:, :, :, None] * torch.exp(running)[..., None]) @ torch.stack(before, 1)
    return (inside + carried).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :tokens]


class Attention(nn.Module):
    """Grouped-query attention without any positional encoding."""

    def __init__(self, config: Config, scale: float) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj = linear(config.hidden_size, inner), linear(config.hidden_size, shared)
        self.v_proj, self.o_proj = linear(config.hidden_size, shared), linear(inner, config.hidden_size, scale)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=packing.attention, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Router(nn.Module):
    """Sigmoid scores; the correction bias takes part in the choice only."""

    e_score_correction_bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) * config.hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Weights [..., experts], zero for the experts not chosen."""
        scores = torch.sigmoid(F.linear(x, self.weight))
        chosen = (scores + self.e_score_correction_bias).topk(self.top, -1).indices
        picked = scores * torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        return picked / (picked.sum(-1, keepdim=True) + 1e-20) * self.scale


class Experts(nn.Module):
    """All experts for all tokens, weighted afterwards: at this size two large products beat sixteen small ones."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, inner, latent = config.n_routed_experts, config.moe_intermediate_size, config.moe_latent_size
        self.up_proj = nn.Parameter(torch.randn(experts, inner, latent) * latent**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, latent, inner) * inner**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        inner = torch.relu(F.linear(x, self.up_proj.flatten(0, 1))).square().unflatten(-1, self.up_proj.shape[:2])
        return F.linear((inner * weights[..., None]).flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class SharedExpert(nn.Module):
    def __init__(self, config: Config, scale: float) -> None:
        super().__init__()
        self.up_proj = linear(config.hidden_size, config.moe_shared_expert_intermediate_size)
        self.down_proj = linear(config.moe_shared_expert_intermediate_size, config.hidden_size, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)).square())


class LatentMoE(nn.Module):
    """Routed experts in a latent space plus a shared expert at full width."""

    load: Tensor

    def __init__(self, config: Config, scale: float) -> None:
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        self.shared_experts = SharedExpert(config, scale)
        self.fc1_latent_proj = linear(config.hidden_size, config.moe_latent_size)
        self.fc2_latent_proj = linear(config.moe_latent_size, config.hidden_size, scale)
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        weights = self.gate(x)
        if self.training:
            self.load.copy_((weights > 0).float().mean((0, 1)).detach())
        return self.fc2_latent_proj(self.experts(self.fc1_latent_proj(x), weights)) + self.shared_experts(x)

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Aux-loss-free balancing: nudge the choice towards experts that got less than their share."""
        share = self.gate.top / len(self.load)
        self.gate.e_score_correction_bias += rate * torch.sign(share - self.load)


MIXERS = {"M": Mamba, "*": Attention, "E": LatentMoE}


class Layer(nn.Module):
    def __init__(self, kind: str, config: Config, scale: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[kind](config, scale)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        return x + self.mixer(self.norm(x), packing)


class Backbone(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        pattern = config.hybrid_override_pattern
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embeddings.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(kind, config, 0.5 * len(pattern) ** -0.5) for kind in pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, packing: Packing) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, packing)
        return self.norm_f(x)


class Network(nn.Module):
    """Backbone and output layer; `forward` returns the normed hidden states, which the MTP head also reads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size, 0.5)

    def forward(self, ids: Tensor, packing: Packing) -> Tensor:
        return self.backbone(ids, packing)

    def packing(self, document: Tensor) -> Packing:
        return Packing.of(document, self.config.conv_kernel)


def loads(networks: Iterable[nn.Module]) -> list[Tensor]:
    """The last step's share of tokens per expert, of every LatentMoE."""
    return [module.load for network in networks for module in network.modules() if isinstance(module, LatentMoE)]


def balance(network: nn.Module, rate: float = 1e-3) -> None:
    """One step of expert balancing in every LatentMoE of `network`."""
    for module in network.modules():
        if isinstance(module, LatentMoE):
            module.balance(rate)
