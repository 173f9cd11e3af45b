"""What a layer mixes with: Mamba-2, attention, mixture of experts, dense MLP.

Each is a whole layer, x + mix(norm(x)) over the rows [T, hidden] of a step: its first projection takes the norm in, its
last one adds the residual. Decode rows take the decode path, prompt rows the prompt path, however they are batched;
what is done row by row is done for all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from headrace.engine.config import AttentionConfig, ConfigError, LayerKind, MambaConfig, ModelConfig, MoEConfig
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.layers import Linear, Weights, load_norm
from headrace.kernels import Kernels
from headrace.kernels.attention import Pages
from headrace.kernels.mamba import MambaWeights
from headrace.kernels.moe import Routing
from headrace.kernels.norm import Norm

Layer = Callable[[Tensor, Batch, Caches], Tensor]


def make_layer(
    config: ModelConfig, kernels: Kernels, weights: Weights, name: str, kind: LayerKind, index: int
) -> Layer:
    """One layer; ``index`` counts layers of the same kind and picks the layer's caches."""
    norm = load_norm(weights, f"{name}.norm", config.norm_eps)
    name = f"{name}.mixer"
    if kind is LayerKind.MAMBA and config.mamba:
        return MambaLayer(config.mamba, norm, kernels, weights, name, index)
    if kind is LayerKind.ATTENTION and config.attention:
        return AttentionLayer(config.attention, norm, kernels, weights, name, index)
    if kind is LayerKind.MOE and config.moe:
        return MoELayer(config.moe, norm, kernels, weights, name)
    assert kind is LayerKind.MLP, kind
    return MlpLayer(norm, kernels, weights, name)


class MambaLayer:
    """Mamba-2: project, convolve, scan, gate, norm, project. Heads / groups consecutive heads share B and C."""

    def __init__(
        self, config: MambaConfig, norm: Norm, kernels: Kernels, weights: Weights, name: str, index: int
    ) -> None:
        self.norm, self.kernels, self.index, self.chunk = norm, kernels, index, config.chunk_size
        self.in_proj = Linear(kernels, weights, f"{name}.in_proj")
        self.out_proj = Linear(kernels, weights, f"{name}.out_proj")
        self.out_norm = load_norm(weights, f"{name}.norm", norm.eps, config.num_groups)
        self.weights = MambaWeights(
            conv_weight=weights[f"{name}.conv1d.weight"].float().squeeze(1),
            conv_bias=weights[f"{name}.conv1d.bias"].float() if config.conv_bias else None,
            a=-torch.exp(weights[f"{name}.A_log"].float()),
            d=weights[f"{name}.D"].float(),
            dt_bias=weights[f"{name}.dt_bias"].float(),
            head_dim=config.head_dim,
            groups=config.num_groups,
            state_size=config.state_size,
        )

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        conv, ssm = caches.conv[self.index], caches.ssm[self.index]
        projected = self.in_proj(x, norm=self.norm)
        parts = []
        if end := batch.num_decodes:
            slots, positions = batch.decode_slots, batch.decode_positions
            parts.append(self.kernels.mamba_update(projected[:end], conv, ssm, slots, positions, self.weights))
        for rows, slot, start in batch.chunks():
            parts.append(self.kernels.mamba_prefill(projected[rows], conv, ssm, slot, start, self.weights, self.chunk))
        return self.out_proj(joined(parts), norm=self.out_norm, residual=x)


class AttentionLayer:
    """Grouped-query attention over the paged context, no positional encoding."""

    def __init__(
        self, config: AttentionConfig, norm: Norm, kernels: Kernels, weights: Weights, name: str, index: int
    ) -> None:
        self.norm, self.config, self.kernels, self.index = norm, config, kernels, index
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Linear(kernels, weights, f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        self.o_proj = Linear(kernels, weights, f"{name}.o_proj")
        self.kv_scales = _kv_scale(weights, f"{name}.k_proj.k_scale"), _kv_scale(weights, f"{name}.v_proj.v_scale")

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        keys, values = caches.keys[self.index], caches.values[self.index]
        # The scales were found for fp8; a wider cache has no use for them.
        pages = Pages(keys, values, *(self.kv_scales if keys.dtype == torch.float8_e4m3fn else ()))
        table, scale = batch.page_table, self.scale
        width = self.config.head_dim
        q, k, v = (
            part.view(part.shape[0], part.shape[1] // width, width) for part in self.qkv_proj.parts(x, norm=self.norm)
        )
        parts = []
        if end := batch.num_decodes:
            slots, positions = batch.decode_slots, batch.decode_positions
            parts.append(
                self.kernels.decode_attention(q[:end], k[:end], v[:end], pages, table, slots, positions, scale)
            )
        for rows, slot, start in batch.chunks():
            parts.append(self.kernels.prefill_attention(q[rows], k[rows], v[rows], pages, table, slot, start, scale))
        return self.o_proj(joined(parts).flatten(1), residual=x)


def _kv_scale(weights: Weights, name: str) -> float:
    """What cached keys or values are divided by; 1 where the checkpoint has none."""
    scale = 1.0 if (stored := weights.get(name)) is None else float(stored)
    if not 0 < scale < math.inf:
        raise ConfigError(f"{name} must be a finite number > 0, got {scale}")
    return scale


class MoELayer:
    """Routed experts, in a latent space if the model has one, plus the shared expert on the full hidden state.

    Router, way into the latent space and shared expert read the same rows, so they are one projection; the way back
    and the shared expert's second half are one sum.
    """

    def __init__(self, config: MoEConfig, norm: Norm, kernels: Kernels, weights: Weights, name: str) -> None:
        self.norm, self.kernels, self.latent = norm, kernels, config.latent_size is not None
        self.routing = Routing(config.top_k, config.num_groups, config.topk_groups, config.normalise, config.scale)
        self.selection_bias = weights[f"{name}.gate.e_score_correction_bias"].float()
        self.experts = kernels.pack_experts(weights[f"{name}.experts.up_proj"], weights[f"{name}.experts.down_proj"])
        # The latent projections are rarely quantised, nor is the router: side by side they are one launch.
        latent = [f"{name}.fc1_latent_proj"] if self.latent else []
        self.first = Linear(kernels, weights, f"{name}.gate", *latent, f"{name}.shared_experts.up_proj")
        back = [f"{name}.fc2_latent_proj"] if self.latent else []
        self.last = Linear(kernels, weights, *back, f"{name}.shared_experts.down_proj", dim=1)

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        # Without a latent space the experts read the normed rows themselves, and add the residual.
        normed, norm = (x, self.norm) if self.latent else (self.kernels.rms_norm(x, self.norm), None)
        logits, *inner, shared = self.first.parts(normed, norm=norm)
        routes = self.kernels.route(logits, self.selection_bias, self.routing)
        if self.latent:
            y = self.kernels.experts(inner[0], self.experts, routes)
            return self.last((y, shared), relu2=True, residual=x)
        y = self.kernels.experts(normed, self.experts, routes, residual=x)
        return self.last(shared, relu2=True, residual=y)


class MlpLayer:
    """down(relu(up x)^2)."""

    def __init__(self, norm: Norm, kernels: Kernels, weights: Weights, name: str) -> None:
        self.norm = norm
        self.up_proj = Linear(kernels, weights, f"{name}.up_proj")
        self.down_proj = Linear(kernels, weights, f"{name}.down_proj")

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        return self.down_proj(self.up_proj(x, norm=self.norm), relu2=True, residual=x)


def joined(parts: list[Tensor]) -> Tensor:
    """One step's rows from those of its decodes and chunks; a step of one kind is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
