"""Every op of a step at the sizes of a model: what the kernel benchmarks time and what a GPU is compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headrace.kernels import Kernels
from headrace.kernels.attention import Pages
from headrace.kernels.control import ControlIds
from headrace.kernels.mamba import MambaWeights
from headrace.kernels.moe import Routing
from headrace.kernels.norm import Norm
from headrace.kernels.sampling import SamplerState


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, by the names of its config.json."""

    hidden: int = 4096
    experts: int = 512
    top_k: int = 22
    latent: int = 1024
    expert_inner: int = 2688
    shared_inner: int = 5376
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    mamba_heads: int = 128
    mamba_head_dim: int = 64
    groups: int = 8
    state: int = 128
    chunk: int = 128
    vocab: int = 131072
    page: int = 64

    @property
    def mamba_inner(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv(self) -> int:
        return self.mamba_inner + 2 * self.groups * self.state


SUPER = Shape()
EIGHTH = replace(
    SUPER, hidden=512, experts=64, latent=128, expert_inner=336, shared_inner=672, heads=4, kv_heads=2, mamba_heads=16,
    groups=2, vocab=16384,
)  # fmt: skip
"""An eighth of Super's widths and experts, with its head sizes: what a CPU's references can do in a moment."""


@dataclass(frozen=True, slots=True)
class Work:
    """One op with its inputs. ``run`` may be called again and again; what it advances in place is in ``advanced``."""

    run: Callable[[], Any]
    minimum_bytes: int  # weights, states, keys and values read or written once, activations in and out
    advanced: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Bench:
    """Where works are built: a backend, its device, the dtype in which it keeps weights."""

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    shape: Shape

    def randn(self, *size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Normal values; small tensors are the same on every device."""
        count = torch.Size(size).numel()
        if count < 1 << 27:
            return torch.randn(size, generator=torch.Generator().manual_seed(seed + count)).to(self.device, dtype)
        return torch.empty(size, device=self.device, dtype=dtype).normal_()

    def weight(self, *size: int, seed: int = 1) -> Tensor:
        """A weight whose products keep the size of what they multiply."""
        return self.randn(*size, dtype=self.dtype, seed=seed).mul_(size[-1] ** -0.5)

    def ids(self, values: range) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _linear(b: Bench, rows: int, inputs: int, outputs: int, *, groups: int = 0, residual: bool = False) -> Work:
    weight, x = b.weight(outputs, inputs), b.randn(rows, inputs)
    packed = b.kernels.pack_linear([weight])
    norm = Norm(b.randn(inputs, seed=2), 1e-5, groups) if groups else None
    beside = b.randn(rows, outputs, seed=3) if residual else None
    minimum = bytes_of(weight, x) + 4 * rows * outputs * (2 if residual else 1)
    return Work(lambda: b.kernels.linear(x, packed, norm=norm, residual=beside), minimum)


def in_proj(b: Bench, rows: int) -> Work:
    s = b.shape
    return _linear(b, rows, s.hidden, s.mamba_inner + s.conv + s.mamba_heads, groups=1)


def out_proj(b: Bench, rows: int) -> Work:
    return _linear(b, rows, b.shape.mamba_inner, b.shape.hidden, groups=b.shape.groups, residual=True)


def qkv_proj(b: Bench, rows: int) -> Work:
    s = b.shape
    return _linear(b, rows, s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, groups=1)


def o_proj(b: Bench, rows: int) -> Work:
    return _linear(b, rows, b.shape.heads * b.shape.head_dim, b.shape.hidden, residual=True)


def moe_first(b: Bench, rows: int) -> Work:
    s = b.shape
    return _linear(b, rows, s.hidden, s.experts + s.shared_inner + s.latent, groups=1)


def moe_last(b: Bench, rows: int) -> Work:
    s = b.shape
    weights = b.weight(s.hidden, s.latent), b.weight(s.hidden, s.shared_inner, seed=2)
    packed = b.kernels.pack_linear(weights, dim=1)
    y, shared, x = b.randn(rows, s.latent), b.randn(rows, s.shared_inner), b.randn(rows, s.hidden)
    return Work(
        lambda: b.kernels.linear((y, shared), packed, relu2=True, residual=x), bytes_of(*weights, y, shared, x, x)
    )


def lm_head(b: Bench, rows: int) -> Work:
    return _linear(b, rows, b.shape.hidden, b.shape.vocab)


def mamba_update(b: Bench, rows: int) -> Work:
    s, weights = b.shape, _mamba_weights(b)
    projected = b.randn(rows, s.mamba_inner + s.conv + s.mamba_heads)
    conv = b.randn(rows, 4, s.conv, dtype=b.dtype)
    ssm = b.randn(rows, s.mamba_heads, s.mamba_head_dim, s.state)
    slots, positions = b.ids(range(rows)), b.ids(range(100, 100 + rows))
    touched = rows * s.conv * 4 * conv.element_size()  # three entries read, one written
    minimum = 2 * bytes_of(ssm) + touched + bytes_of(projected) + 4 * rows * s.mamba_inner
    return Work(lambda: b.kernels.mamba_update(projected, conv, ssm, slots, positions, weights), minimum, (conv, ssm))


def mamba_prefill(b: Bench, rows: int) -> Work:
    s, weights = b.shape, _mamba_weights(b)
    projected = b.randn(rows, s.mamba_inner + s.conv + s.mamba_heads)
    conv, ssm = b.randn(1, 4, s.conv, dtype=b.dtype), b.randn(1, s.mamba_heads, s.mamba_head_dim, s.state)
    minimum = bytes_of(projected, ssm, ssm) + 4 * rows * s.mamba_inner
    return Work(lambda: b.kernels.mamba_prefill(projected, conv, ssm, 0, 0, weights, s.chunk), minimum, (conv, ssm))


def _mamba_weights(b: Bench) -> MambaWeights:
    s = b.shape
    heads = [b.randn(s.mamba_heads, seed=seed) for seed in (4, 5, 6)]
    return MambaWeights(
        b.randn(s.conv, 4), b.randn(s.conv), -torch.exp(heads[0]), heads[1], heads[2] - 2, s.mamba_head_dim, s.groups,
        s.state,
    )  # fmt: skip


def decode_attention(b: Bench, rows: int, context: int = 4096) -> Work:
    s = b.shape
    q, k, v, pages, table = _attention(b, rows, rows, context)
    slots, positions = b.ids(range(rows)), torch.full((rows,), context - 1, dtype=torch.int64, device=b.device)
    minimum = bytes_of(pages.keys, pages.values, q, q, k, v)
    return Work(
        lambda: b.kernels.decode_attention(q, k, v, pages, table, slots, positions, s.head_dim**-0.5),
        minimum,
        (pages.keys, pages.values),
    )


def prefill_attention(b: Bench, rows: int) -> Work:
    q, k, v, pages, table = _attention(b, rows, 1, rows)
    minimum = bytes_of(pages.keys, pages.values, pages.keys, pages.values, q, q, k, v)
    return Work(
        lambda: b.kernels.prefill_attention(q, k, v, pages, table, 0, 0, b.shape.head_dim**-0.5),
        minimum,
        (pages.keys, pages.values),
    )


def _attention(b: Bench, rows: int, sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor, Pages, Tensor]:
    s, per = b.shape, -(-context // b.shape.page)
    order = torch.randperm(sequences * per, generator=torch.Generator().manual_seed(0))
    table = order.view(sequences, per).int().to(b.device)
    keys, values = (b.randn(sequences * per, s.page, s.kv_heads, s.head_dim, dtype=b.dtype, seed=i) for i in (1, 2))
    q = b.randn(rows, s.heads, s.head_dim)
    k, v = (b.randn(rows, s.kv_heads, s.head_dim, seed=i) for i in (3, 4))
    return q, k, v, Pages(keys, values), table


def route(b: Bench, rows: int) -> Work:
    s = b.shape
    logits, bias = b.randn(rows, s.experts), b.randn(s.experts) * 0.1
    routing = Routing(s.top_k, 1, 1, True, 5.0)
    return Work(
        lambda: _weights_and_experts(b.kernels.route(logits, bias, routing)), bytes_of(logits) + rows * s.top_k * 12
    )


def _weights_and_experts(routes: Any) -> tuple[Tensor, Tensor]:
    return routes.weights, routes.experts


def experts(b: Bench, rows: int) -> Work:
    s = b.shape
    up = b.weight(s.experts, s.expert_inner, s.latent)
    down = b.weight(s.experts, s.latent, s.expert_inner, seed=2)
    packed = b.kernels.pack_experts(up, down)
    logits, x = b.randn(rows, s.experts), b.randn(rows, s.latent, seed=3)
    routes = b.kernels.route(logits, torch.zeros(s.experts, device=b.device), Routing(s.top_k, 1, 1, True, 5.0))
    touched = int(routes.experts.unique().numel())
    minimum = touched * 2 * s.expert_inner * s.latent * up.element_size() + bytes_of(x, x)
    return Work(lambda: b.kernels.experts(x, packed, routes), minimum)


def sample(b: Bench, rows: int, temperature: float = 1.0) -> Work:
    s = b.shape
    logits, state = b.randn(rows, s.vocab) * 3, SamplerState.allocate(rows, b.device)
    state.temperature.fill_(temperature)
    state.top_p.fill_(0.95)
    state.tokens_left.fill_(1 << 40)
    state.seed.copy_(b.ids(range(rows)))
    slots, control = b.ids(range(rows)), ControlIds(eos=())
    return Work(lambda: b.kernels.sample(logits, slots, state, control).tokens, bytes_of(logits), (state.last_token,))


DECODE = {
    work.__name__: work
    for work in (
        in_proj, mamba_update, out_proj, moe_first, route, experts, moe_last, qkv_proj, decode_attention, o_proj,
        lm_head, sample,
    )
}  # fmt: skip
"""A decode step's ops, in order; each builds its work for a number of rows."""

PROMPT = {work.__name__: work for work in (in_proj, mamba_prefill, prefill_attention, experts)}
"""Ops of a prompt, for a number of tokens of one sequence."""
