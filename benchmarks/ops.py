"""Every op of a step at the sizes of a model, with inputs, and counted bytes and flops; ``cases`` lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from headrace.kernels import Kernels
from headrace.kernels.attention import Pages
from headrace.kernels.control import ControlIds
from headrace.kernels.formats import BLOCK, Fp8, Nvfp4, Weight, tensors_of
from headrace.kernels.mamba import MambaWeights
from headrace.kernels.moe import Routing
from headrace.kernels.norm import Norm
from headrace.kernels.sampling import SamplerState

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
NVFP4 = torch.uint8  # of weights: what their codes are stored as
TAPS = 4  # of the convolution
COARSE = 1 / 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, by the names of its config.json."""

    hidden: int = 4096
    experts: int = 512
    top_k: int = 22
    routed_scale: float = 5.0
    latent: int = 1024  # width of the routed experts' inputs; without a latent space, of the hidden state
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


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a benchmark is."""

    name: str
    super: Shape
    nano: Shape
    context: int  # tokens of a decoding sequence
    long_context: int
    decode: tuple[int, ...]  # sequences of a decode step
    prompt: tuple[int, ...]  # tokens


FULL = Sizes(
    "full",
    super=Shape(),
    nano=Shape(
        hidden=2688, experts=128, top_k=6, routed_scale=2.5, latent=2688, expert_inner=1856, shared_inner=3712,
        mamba_heads=64,
    ),
    context=4096, long_context=32768, decode=(1, 8, 32, 128), prompt=(256, 2048),
)  # fmt: skip
"""Nemotron 3 Super 120B-A12B and Nano 30B-A3B as published."""

EIGHTH = Sizes(
    "eighth",
    super=replace(
        FULL.super, hidden=512, experts=64, latent=128, expert_inner=336, shared_inner=672, heads=4, mamba_heads=16,
        groups=2, vocab=16384,
    ),
    nano=replace(FULL.nano, hidden=336, experts=16, latent=336, expert_inner=232, shared_inner=464, mamba_heads=8),
    context=512, long_context=4096, decode=(1, 8, 32), prompt=(256,),
)  # fmt: skip
"""An eighth of the widths, experts and contexts, with the head sizes: what a CPU's references can do in a moment."""

SIZES = {sizes.name: sizes for sizes in (FULL, EIGHTH)}


@dataclass(frozen=True, slots=True)
class Work:
    """One op with its inputs. ``run`` may be called again and again; what it advances in place is in ``advanced``."""

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    minimum_bytes: int  # weights, states, keys and values read or written once, inputs and outputs
    flops: int = 0  # multiplications and additions of its sums of products; 0 where it has none
    advanced: tuple[Tensor, ...] = ()

    def results(self) -> tuple[Tensor, ...]:
        """Run once."""
        out = self.run()
        return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a work is built: a backend, its device, a model's sizes, the dtypes of weights and of caches.

    Inputs come from one seeded generator on the device. A row's own do not follow the number of rows.
    """

    kernels: Kernels
    device: torch.device
    shape: Shape
    sizes: Sizes
    weights: torch.dtype
    cache: torch.dtype
    generator: torch.Generator

    def randn(self, *size: int, dtype: torch.dtype = FP32) -> Tensor:
        drawn = BF16 if dtype == FP8 else dtype
        return torch.randn(size, generator=self.generator, device=self.device, dtype=drawn).to(dtype)

    def rows(self, count: int, *size: int) -> Tensor:
        """[count, *size] fp32: of decode rows as many as there may be are drawn, so that each has its own values."""
        return self.randn(max(count, self.sizes.decode[-1]), *size)[:count].clone()

    def coarse(self, count: int, width: int) -> Tensor:
        """Rows of multiples of COARSE: what is to be ranked is equal or far apart, so rounding decides no rank."""
        return (self.rows(count, width) / COARSE).round() * COARSE

    def weight(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """A weight whose products keep the size of what they multiply."""
        return self.randn(*size, dtype=dtype or self.weights).mul_(size[-1] ** -0.5)

    def stored(self, *size: int) -> Weight:
        """A weight, or a stack of them, in the bench's format: of quantised ones the stored numbers are drawn."""
        if self.weights not in (FP8, NVFP4):
            return self.weight(*size)
        *stack, outputs, width = size
        if self.weights == FP8:
            return Fp8(self.randn(*size, dtype=FP8), torch.full(stack, width**-0.5, device=self.device))
        codes = torch.randint(
            0, 256, (*stack, outputs, width // 2), generator=self.generator, device=self.device, dtype=torch.uint8
        )
        blocks = self.randn(*stack, outputs, width // BLOCK).abs().to(FP8)
        return Nvfp4(codes, blocks, torch.full(stack, (8 * width) ** -0.5, device=self.device))

    def slots(self, count: int) -> Tensor:
        """All slots but not in order: row i has slot (i + 1) % count, as ``by_slot`` lays it out."""
        return (torch.arange(count, device=self.device) + 1) % count

    def by_slot(self, rows: Tensor) -> Tensor:
        """What belongs to each row, in the order of the rows' slots."""
        return rows.roll(1, 0).contiguous()

    def ids(self, values: range) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)


def bytes_of(*stored: Weight) -> int:
    return sum(t.numel() * t.element_size() for weight in stored for t in tensors_of(weight))


def step_inputs(b: Bench, rows: int) -> Work:
    slots, nothing = b.slots(rows), b.ids(range(0))
    last, length = b.by_slot(b.ids(range(5, 5 + rows))), b.by_slot(b.ids(range(64, 64 + rows)))
    table = torch.zeros(rows, 64, dtype=torch.int32, device=b.device)
    writes = torch.stack([slots, length[slots] // b.shape.page, slots + 7], 1)
    outputs, written = 2 * 8 * rows, 4 * rows
    return Work(
        lambda: b.kernels.step_inputs(last, length, slots, nothing, table, writes),
        bytes_of(last, length, slots, writes) + outputs + written,
        advanced=(table,),
    )


def embed(b: Bench, rows: int) -> Work:
    s = b.shape
    weight, ids = b.weight(s.vocab, s.hidden), b.ids(range(rows)) * 7919 % s.vocab
    read = rows * s.hidden * weight.element_size()
    return Work(lambda: b.kernels.embed(weight, ids), bytes_of(ids) + read + 4 * rows * s.hidden)


def rms_norm(b: Bench, rows: int) -> Work:
    x, norm = b.rows(rows, b.shape.hidden), Norm(b.randn(b.shape.hidden), 1e-5)
    return Work(lambda: b.kernels.rms_norm(x, norm), bytes_of(x, x, norm.weight))


def linear(
    b: Bench, rows: int, inputs: int, outputs: int, *, groups: int = 0, relu2: bool = False, residual: bool = False
) -> Work:
    """A projection with what is fused into it; ``groups`` of the norm before it, 0: none."""
    weight, x, beside = b.stored(outputs, inputs), b.rows(rows, inputs), b.rows(rows, outputs)
    packed = b.kernels.pack_linear([weight])
    norm = Norm(b.randn(inputs), 1e-5, groups) if groups else None
    added = beside if residual else None
    minimum = bytes_of(weight, x, beside, *([beside] if residual else []), *([norm.weight] if norm else []))
    return Work(
        lambda: b.kernels.linear(x, packed, norm=norm, relu2=relu2, residual=added),
        minimum,
        2 * rows * outputs * inputs,
    )


def in_proj(b: Bench, rows: int) -> Work:
    s = b.shape
    return linear(b, rows, s.hidden, s.mamba_inner + s.conv + s.mamba_heads, groups=1)


def out_proj(b: Bench, rows: int) -> Work:
    return linear(b, rows, b.shape.mamba_inner, b.shape.hidden, groups=b.shape.groups, residual=True)


def qkv_proj(b: Bench, rows: int) -> Work:
    s = b.shape
    return linear(b, rows, s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, groups=1)


def o_proj(b: Bench, rows: int) -> Work:
    return linear(b, rows, b.shape.heads * b.shape.head_dim, b.shape.hidden, residual=True)


def moe_first(b: Bench, rows: int) -> Work:
    s = b.shape
    return linear(b, rows, s.hidden, s.experts + s.shared_inner + s.latent, groups=1)


def moe_last(b: Bench, rows: int) -> Work:
    s = b.shape
    weights = b.weight(s.hidden, s.latent), b.weight(s.hidden, s.shared_inner)
    packed = b.kernels.pack_linear(weights, dim=1)
    y, shared, x = b.rows(rows, s.latent), b.rows(rows, s.shared_inner), b.rows(rows, s.hidden)
    return Work(
        lambda: b.kernels.linear((y, shared), packed, relu2=True, residual=x),
        bytes_of(*weights, y, shared, x, x),
        2 * rows * s.hidden * (s.latent + s.shared_inner),
    )


def gate(b: Bench, rows: int) -> Work:
    return linear(b, rows, b.shape.hidden, b.shape.experts)


def shared_up(b: Bench, rows: int) -> Work:
    return linear(b, rows, b.shape.hidden, b.shape.shared_inner)


def shared_down(b: Bench, rows: int) -> Work:
    return linear(b, rows, b.shape.shared_inner, b.shape.hidden, relu2=True, residual=True)


def lm_head(b: Bench, rows: int) -> Work:
    return linear(b, rows, b.shape.hidden, b.shape.vocab)


def mamba_update(b: Bench, rows: int, each: int = 1) -> Work:
    """``rows`` sequences, ``each`` tokens of each: more than one is what verifying drafts takes."""
    s, weights = b.shape, _mamba_weights(b)
    projected = b.rows(rows, each, s.mamba_inner + s.conv + s.mamba_heads).flatten(0, 1)
    ring = TAPS - 1 + each
    conv = b.by_slot(b.rows(rows, ring, s.conv)).to(b.cache)
    ssm = b.by_slot(b.rows(rows, s.mamba_heads, s.mamba_head_dim, s.state))
    slots, positions = b.slots(rows), b.ids(range(100, 100 + rows))
    inner = rows * each * s.mamba_inner
    # Of the ring the past is read and the new inputs are written: all entries once.
    minimum = 2 * bytes_of(ssm) + bytes_of(conv, projected, slots, positions, weights.conv_weight) + 4 * inner
    flops = each * (5 * ssm.numel() + 2 * TAPS * rows * s.conv)  # h * decay + (x dt) B, and its sum with C
    return Work(
        lambda: b.kernels.mamba_update(projected, conv, ssm, slots, positions, weights, each),
        minimum, flops, (conv, ssm),
    )  # fmt: skip


def mamba_prefill(b: Bench, rows: int) -> Work:
    s, weights = b.shape, _mamba_weights(b)
    projected = b.rows(rows, s.mamba_inner + s.conv + s.mamba_heads)
    conv, ssm = b.randn(1, TAPS, s.conv).to(b.cache), b.randn(1, s.mamba_heads, s.mamba_head_dim, s.state)
    minimum = bytes_of(projected, ssm, conv, weights.conv_weight) + 4 * rows * s.mamba_inner
    # The recurrence's own count, which the chunked forms exceed: it is what has to be done.
    flops = rows * (5 * ssm.numel() + 2 * TAPS * s.conv)
    return Work(
        lambda: b.kernels.mamba_prefill(projected, conv, ssm, 0, 0, weights, s.chunk), minimum, flops, (conv, ssm)
    )


def _mamba_weights(b: Bench) -> MambaWeights:
    s = b.shape
    a, d, dt_bias = (b.randn(s.mamba_heads) for _ in range(3))
    return MambaWeights(
        b.randn(s.conv, TAPS), b.randn(s.conv), -torch.exp(a), d, dt_bias - 2, s.mamba_head_dim, s.groups, s.state
    )


def decode_attention(b: Bench, rows: int, each: int = 1, long: bool = False) -> Work:
    """``rows`` sequences of uneven lengths, ``each`` new tokens of each."""
    s, context = b.shape, b.sizes.long_context if long else b.sizes.context
    q, k, v = _queries_keys_values(b, rows, each)
    pages, table = _pages(b, rows, context)
    first = [context - each - (1 + 37 * i) % (context // 8) for i in range(rows)]
    slots, positions = b.slots(rows), torch.tensor(first, device=b.device)
    tokens = sum(first) + rows * each
    pairs = sum(position + j + 1 for position in first for j in range(each))  # of a row and a token it sees
    return Work(
        lambda: b.kernels.decode_attention(q, k, v, pages, table, slots, positions, s.head_dim**-0.5, each),
        tokens * 2 * s.kv_heads * s.head_dim * b.cache.itemsize + bytes_of(q, q, k, v),
        4 * pairs * s.heads * s.head_dim,
        (pages.keys, pages.values),
    )


def prefill_attention(b: Bench, rows: int) -> Work:
    s = b.shape
    q, k, v = _queries_keys_values(b, rows, 1)
    pages, table = _pages(b, 1, rows)
    return Work(
        lambda: b.kernels.prefill_attention(q, k, v, pages, table, 0, 0, s.head_dim**-0.5),
        bytes_of(pages.keys, pages.values, q, q, k, v),
        4 * rows * (rows + 1) // 2 * s.heads * s.head_dim,
        (pages.keys, pages.values),
    )


def _queries_keys_values(b: Bench, rows: int, each: int) -> tuple[Tensor, ...]:
    """Side by side, as the projection leaves them."""
    s = b.shape
    new = b.rows(rows, each, s.heads + 2 * s.kv_heads, s.head_dim).flatten(0, 1)
    return torch.split(new, [s.heads, s.kv_heads, s.kv_heads], 1)


def _pages(b: Bench, sequences: int, context: int) -> tuple[Pages, Tensor]:
    """Full pages, drawn last: each sequence's own values, its pages ``sequences`` apart."""
    s, per = b.shape, -(-context // b.shape.page)
    order = torch.arange(per * sequences, dtype=torch.int32, device=b.device).view(per, sequences)
    size = per, s.page, s.kv_heads, s.head_dim
    keys, values = (torch.empty(per * sequences, *size[1:], dtype=b.cache, device=b.device) for _ in range(2))
    for sequence in range(sequences):
        for memory in (keys, values):
            memory[sequence::sequences] = b.randn(*size, dtype=b.cache)
    table = b.by_slot(order.t())
    return Pages(keys, values, 0.5, 0.5) if b.cache == FP8 else Pages(keys, values), table


def route(b: Bench, rows: int) -> Work:
    logits, bias, routing = _router(b, rows)
    pairs = rows * routing.top_k

    def run() -> tuple[Tensor, ...]:
        routes = b.kernels.route(logits, bias, routing)
        return routes.weights, routes.experts

    return Work(run, bytes_of(logits, bias) + pairs * (4 + 8))


def _router(b: Bench, rows: int) -> tuple[Tensor, Tensor, Routing]:
    """Scores that prefer nobody; sigmoids of multiples of COARSE, an eighth added to some, are never close."""
    s = b.shape
    bias = (b.randn(s.experts) > 0).float() / 8
    return b.coarse(rows, s.experts), bias, Routing(s.top_k, 1, 1, True, s.routed_scale)


def experts(b: Bench, rows: int, residual: bool = False) -> Work:
    """``residual``: add one, as a model without a latent space does."""
    s = b.shape
    routes = b.kernels.route(*_router(b, rows))
    x, beside = b.rows(rows, s.latent), b.rows(rows, s.latent)
    up, down = b.stored(s.experts, s.expert_inner, s.latent), b.stored(s.experts, s.latent, s.expert_inner)
    packed = b.kernels.pack_experts(up, down)
    touched = int(routes.experts.unique().numel())
    matrix = s.expert_inner * s.latent
    minimum = touched * bytes_of(up, down) // s.experts + bytes_of(x, x, routes.weights, routes.experts)
    if residual:
        minimum += bytes_of(beside)
    added = {"residual": beside} if residual else {}
    return Work(lambda: b.kernels.experts(x, packed, routes, **added), minimum, rows * s.top_k * 2 * 2 * matrix)


def sample(b: Bench, rows: int, temperature: float = 1.0, top_p: float = 0.95, top_logprobs: int = 0) -> Work:
    logits, state = b.coarse(rows, b.shape.vocab) * 3, SamplerState.allocate(rows, b.device)
    state.temperature.fill_(temperature)
    state.top_p.fill_(top_p)
    state.tokens_left.fill_(1 << 40)
    slots, control = b.slots(rows), ControlIds(eos=())
    state.seed[slots] = b.ids(range(rows))
    parts = ("tokens", "phases", "finish", *(("logprobs", "top_ids", "top_logprobs") if top_logprobs else ()))

    def run() -> tuple[Tensor, ...]:
        decided = b.kernels.sample(logits, slots, state, control, logprobs=top_logprobs > 0, top_logprobs=top_logprobs)
        return tuple(getattr(decided, part) for part in parts)

    advanced = tuple(getattr(state, f.name) for f in fields(state))
    return Work(run, bytes_of(logits), advanced=advanced)
