"""The engine at work: same tokens alone and together, tokens per second, and where a decode step's time goes.

Two models: the embedded one, and a slice of Super (its widths and experts, five of its layers) with random weights.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks.ops import Shape
from headrace.engine import Engine, EngineConfig, SamplingParams
from headrace.engine.config import ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.model.nemotron_h import NemotronH
from headrace.engine.model.weights.names import memory_shapes
from headrace.engine.schedule.plan import StepPlan, StepResult
from headrace.kernels import MODULES, Kernels, Op, select
from headrace.tokenizer import load as load_tokenizer

LAYERS = "MEM*E"  # all kinds, in an order that the published pattern has too
BATCHES = (1, 8, 32)
PROMPT = 16  # tokens
ALONE = 3  # requests that are also run with nothing beside them


@dataclass(slots=True)
class OpTimes:
    """Times of the steps that only decode and, on demand, of the ops in them."""

    device: torch.device
    active: bool = False
    steps: list[float] = field(default_factory=list)  # seconds of whole steps, from plan to result
    host: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # seconds until a call returns
    events: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))  # around a call, in the stream

    def around(self, kernels: Kernels) -> Kernels:
        """The same ops, timed; packing, done at load, is not."""
        names = [name for name in MODULES if not name.startswith("pack_")]
        return replace(kernels, **{name: partial(self._timed, name, getattr(kernels, name)) for name in names})

    def _timed(self, name: str, op: Op, *args: Any, **options: Any) -> Any:
        if not self.active:
            return op(*args, **options)
        pair: list[Any] = []
        if self.device.type == "cuda":
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        if pair:
            pair[0].record()
        start = time.perf_counter()
        out = op(*args, **options)
        self.host[name].append(time.perf_counter() - start)
        if pair:
            pair[1].record()
            self.events[name].append(pair)
        return out

    def follow(self, engine: Engine, ops: bool) -> None:
        """Time the engine's steps from now on, with ``ops`` also each op, and forget those before."""
        runner: Any = engine._loop._runner
        execute = type(runner).execute
        for times in (self.steps, self.host, self.events):
            times.clear()

        def timed(plan: StepPlan) -> StepResult:
            self.active = ops and not plan.chunks
            start = time.perf_counter()
            result: StepResult = execute(runner, plan)
            if not plan.chunks:
                self.steps.append(time.perf_counter() - start)
            return result

        runner.execute = timed

    def rows(self) -> Iterator[tuple[str, ...]]:
        """(op, calls a step, us a call on the host, us a call on the device), then all of them a step."""
        calls, totals = 0.0, [0.0, 0.0]
        for name, host in self.host.items():
            device = [begin.elapsed_time(end) / 1e3 for begin, end in self.events[name]] or host
            medians = [statistics.median(seconds) * 1e6 for seconds in (host, device)]
            each = len(host) / len(self.steps)
            calls, totals = calls + each, [t + each * m for t, m in zip(totals, medians, strict=True)]
            yield name, f"{each:g}", *(f"{median:.1f}" for median in medians)
        yield "all of a step", f"{calls:g}", *(f"{total:.1f}" for total in totals)


def slice_of_super(shape: Shape, config: EngineConfig, times: OpTimes) -> Engine:
    """Random weights in bf16, made on the device; 14 GB at full size, up to 10 more while they are packed."""
    model = slice_config(shape)
    kernels = times.around(select(config.kernels))
    network = NemotronH(model, random_weights(model, times.device), kernels)
    engine = Engine.from_parts(network, model, load_tokenizer(EMBEDDED_MODEL), name="slice", config=config)
    runner: Any = engine._loop._runner
    runner.kernels = kernels
    return engine


def slice_config(shape: Shape) -> ModelConfig:
    """LAYERS at the shape's widths."""
    published = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    return ModelConfig.from_json(
        published
        | {
            "hidden_size": shape.hidden, "vocab_size": shape.vocab, "hybrid_override_pattern": LAYERS,
            "num_hidden_layers": len(LAYERS), "num_nextn_predict_layers": 0, "mamba_num_heads": shape.mamba_heads,
            "mamba_head_dim": shape.mamba_head_dim, "n_groups": shape.groups, "ssm_state_size": shape.state,
            "chunk_size": shape.chunk, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim, "n_routed_experts": shape.experts, "num_experts_per_tok": shape.top_k,
            "moe_latent_size": shape.latent, "moe_intermediate_size": shape.expert_inner,
            "moe_shared_expert_intermediate_size": shape.shared_inner, "routed_scaling_factor": shape.routed_scale,
            "max_position_embeddings": 4096,
        }
    )  # fmt: skip


def random_weights(config: ModelConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Seeded; matrices keep the size of what they multiply, norms are ones."""
    generator = torch.Generator(device).manual_seed(1234)
    weights = {}
    for name, shape in memory_shapes(config).items():
        if "norm" in name or name.endswith("correction_bias"):  # such a bias prefers no expert
            weights[name] = torch.full(shape, float("norm" in name), device=device)
            continue
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        weights[name] = drawn.mul_(shape[-1] ** -0.5) if len(shape) > 1 else drawn
    return weights


@dataclass(frozen=True, slots=True)
class Load:
    """The same requests every time: random prompts, temperature 1, ``tokens`` answers long."""

    engine: Engine
    tokens: int

    def together(self, requests: range) -> list[tuple[int, ...]]:
        """The answers of these requests, run at once."""
        vocab = self.engine.model_config.vocab_size
        streams = []
        for i in requests:
            prompt = [(i * 7919 + j * 104729) % vocab for j in range(PROMPT)]
            params = SamplingParams(temperature=1.0, seed=i, max_tokens=self.tokens, ignore_eos=True)
            streams.append(self.engine.generate_stream(prompt, params))
        return [tuple(t for event in stream for t in getattr(event, "token_ids", ())) for stream in streams]


def speeds(load: Load, times: OpTimes) -> Iterator[tuple[str, ...]]:
    """For each batch: requests, tokens per second, ms a decode step, and how many answers are what they are alone."""
    load.together(range(BATCHES[-1]))  # compiles
    alone = [load.together(range(i, i + 1))[0] for i in range(ALONE)]
    for count in BATCHES:
        times.follow(load.engine, ops=False)
        start = time.perf_counter()
        found = load.together(range(count))
        speed = count * load.tokens / (time.perf_counter() - start)
        pairs = list(zip(alone, found, strict=False))
        same = sum(a == b and len(a) == load.tokens for a, b in pairs)
        word = "" if same == len(pairs) else " WRONG"
        yield str(count), f"{speed:.0f}", f"{statistics.median(times.steps) * 1e3:.2f}", f"{same} of {len(pairs)}{word}"


def op_times(load: Load, times: OpTimes) -> Iterator[tuple[str, ...]]:
    """For the least and the greatest batch, what ``OpTimes.rows`` says."""
    for count in (BATCHES[0], BATCHES[-1]):
        times.follow(load.engine, ops=True)
        load.together(range(count))
        for row in times.rows():
            yield str(count), *row
