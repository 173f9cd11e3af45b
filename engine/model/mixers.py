"""What a layer mixes with: Mamba-2, attention, mixture of experts, dense MLP.

Each is called with the normed rows [T, hidden] of a step and gives [T, hidden]. Decode rows take the decode path,
prompt rows the prompt path, however they are batched; what is done row by row is done for all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.engine.config import AttentionConfig, LayerKind, MambaConfig, ModelConfig, MoEConfig
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.layers import Linear, Weights
from headrace.kernels import Kernels
from headrace.kernels.moe import Routing

Mixer = Callable[[Tensor, Batch, Caches], Tensor]


def make_mixer(
    config: ModelConfig, kernels: Kernels, weights: Weights, name: str, kind: LayerKind, index: int
) -> Mixer:
    """The mixer of one layer; ``index`` counts layers of the same kind and picks the layer's caches."""
    if kind is LayerKind.MAMBA and config.mamba:
        return MambaMixer(config.mamba, config.norm_eps, kernels, weights, name, index)
    if kind is LayerKind.ATTENTION and config.attention:
        return AttentionMixer(config.attention, kernels, weights, name, index)
    if kind is LayerKind.MOE and config.moe:
        return MoEMixer(config.moe, kernels, weights, name)
    assert kind is LayerKind.MLP, kind
    return MlpMixer(kernels, weights, name)


class MambaMixer:
    """Mamba-2: project, convolve, scan, gate, norm, project. Heads / groups consecutive heads share B and C."""

    def __init__(
        self, config: MambaConfig, eps: float, kernels: Kernels, weights: Weights, name: str, index: int
    ) -> None:
        self.config, self.eps, self.kernels, self.index = config, eps, kernels, index
        self.in_proj = Linear(kernels, weights, f"{name}.in_proj")
        self.out_proj = Linear(kernels, weights, f"{name}.out_proj")
        self.conv_weight = weights[f"{name}.conv1d.weight"].float().squeeze(1)
        self.conv_bias = weights[f"{name}.conv1d.bias"].float() if config.conv_bias else None
        self.norm_weight = weights[f"{name}.norm.weight"].float()
        self.a = -torch.exp(weights[f"{name}.A_log"].float())
        self.d = weights[f"{name}.D"].float()
        self.dt_bias = weights[f"{name}.dt_bias"].float()

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        config = self.config
        gate, xbc, dt = torch.split(self.in_proj(x), [config.inner_size, config.conv_dim, config.num_heads], -1)
        y = x.new_empty(x.shape[0], config.inner_size)
        end = batch.num_decodes
        if end:
            y[:end] = self._decode(xbc[:end], dt[:end], batch.decode_slots, caches)
        for slot, start, length in zip(batch.chunk_slots, batch.chunk_starts, batch.chunk_lengths, strict=True):
            rows = slice(end, end := end + length)
            y[rows] = self._prefill(xbc[rows], dt[rows], slot, start == 0, caches)
        y = self.kernels.gated_rms_norm(y, gate, self.norm_weight, config.num_groups, self.eps)
        return self.out_proj(y)

    def _decode(self, xbc: Tensor, dt: Tensor, slots: Tensor, caches: Caches) -> Tensor:
        xbc = self.kernels.conv_update(xbc, caches.conv[self.index], slots, self.conv_weight, self.conv_bias)
        x, b, c = self._heads(xbc)
        y: Tensor = self.kernels.ssm_update(x, dt, b, c, caches.ssm[self.index], slots, self.a, self.d, self.dt_bias)
        return y.flatten(1)

    def _prefill(self, xbc: Tensor, dt: Tensor, slot: int, fresh: bool, caches: Caches) -> Tensor:
        xbc = self.kernels.conv_prefill(xbc, caches.conv[self.index], slot, fresh, self.conv_weight, self.conv_bias)
        x, b, c = self._heads(xbc)
        y: Tensor = self.kernels.ssm_prefill(
            x, dt, b, c, caches.ssm[self.index], slot, fresh, self.a, self.d, self.dt_bias, self.config.chunk_size
        )
        return y.flatten(1)

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, conv_dim] -> x [T, heads, head_dim], B and C [T, groups, state]."""
        config = self.config
        shared = config.num_groups * config.state_size
        x, b, c = torch.split(xbc, [config.inner_size, shared, shared], -1)
        return (
            x.view(-1, config.num_heads, config.head_dim),
            b.view(-1, config.num_groups, config.state_size),
            c.view(-1, config.num_groups, config.state_size),
        )


class AttentionMixer:
    """Grouped-query attention over the paged context, no positional encoding."""

    def __init__(self, config: AttentionConfig, kernels: Kernels, weights: Weights, name: str, index: int) -> None:
        self.config, self.kernels, self.index = config, kernels, index
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(kernels, weights, f"{name}.q_proj")
        self.k_proj = Linear(kernels, weights, f"{name}.k_proj")
        self.v_proj = Linear(kernels, weights, f"{name}.v_proj")
        self.o_proj = Linear(kernels, weights, f"{name}.o_proj")

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        keys, values, table = caches.keys[self.index], caches.values[self.index], batch.page_table
        heads, kv_heads, width = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q = self.q_proj(x).view(-1, heads, width)
        k = self.k_proj(x).view(-1, kv_heads, width)
        v = self.v_proj(x).view(-1, kv_heads, width)
        out = torch.empty_like(q)
        end = batch.num_decodes
        if end:
            slots, positions = batch.decode_slots, batch.decode_positions
            self.kernels.append(keys, values, k[:end], v[:end], table, slots, positions)
            out[:end] = self.kernels.decode_attention(q[:end], keys, values, table, slots, positions, self.scale)
        for slot, start, length in zip(batch.chunk_slots, batch.chunk_starts, batch.chunk_lengths, strict=True):
            rows = slice(end, end := end + length)
            positions = torch.arange(start, start + length, device=x.device)
            self.kernels.append(keys, values, k[rows], v[rows], table, torch.full_like(positions, slot), positions)
            out[rows] = self.kernels.prefill_attention(q[rows], keys, values, table, slot, start, self.scale)
        return self.o_proj(out.flatten(1))


class MoEMixer:
    """Routed experts, in a latent space if the model has one, plus the shared expert on the full hidden state."""

    def __init__(self, config: MoEConfig, kernels: Kernels, weights: Weights, name: str) -> None:
        self.kernels = kernels
        self.routing = Routing(config.top_k, config.num_groups, config.topk_groups, config.normalise, config.scale)
        self.gate = Linear(kernels, weights, f"{name}.gate")
        self.selection_bias = weights[f"{name}.gate.e_score_correction_bias"].float()
        latent = config.latent_size is not None
        self.to_latent = Linear(kernels, weights, f"{name}.fc1_latent_proj") if latent else None
        self.from_latent = Linear(kernels, weights, f"{name}.fc2_latent_proj") if latent else None
        self.up = weights[f"{name}.experts.up_proj"].float()
        self.down = weights[f"{name}.experts.down_proj"].float()
        self.shared = MlpMixer(kernels, weights, f"{name}.shared_experts")

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        picked, shares = self.kernels.route(self.gate(x), self.selection_bias, self.routing)
        inner = self.to_latent(x) if self.to_latent else x
        y = self.kernels.experts(inner, self.up, self.down, picked, shares)
        y = self.from_latent(y) if self.from_latent else y
        return y + self.shared(x, batch, caches)


class MlpMixer:
    """down(relu(up x)^2)."""

    def __init__(self, kernels: Kernels, weights: Weights, name: str) -> None:
        self.relu2 = kernels.relu2
        self.up_proj = Linear(kernels, weights, f"{name}.up_proj")
        self.down_proj = Linear(kernels, weights, f"{name}.down_proj")

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        return self.down_proj(self.relu2(self.up_proj(x)))
