"""What fits where: from a model and a configuration to the sizes of caches and the scheduler's limits."""

from __future__ import annotations

import torch

from headrace.engine.config import ModelConfig
from headrace.engine.model.batch import Caches
from headrace.engine.options import EngineConfig
from headrace.engine.run.device import Device
from headrace.engine.run.memory import CacheSizes, plan_caches
from headrace.engine.run.padding import padding_rows
from headrace.engine.schedule import scheduler as scheduling


def cache_sizes(model: ModelConfig, config: EngineConfig, device: Device) -> CacheSizes:
    """What fits, see ``plan_caches``."""
    return plan_caches(
        Caches.allocate(model, 1, 1, config.page_size, "meta", *cache_dtypes(model, config)),
        device,
        num_slots=config.max_sequences,
        page_size=config.page_size,
        model_context=model.max_position_embeddings,
        max_context=config.max_context,
        num_pages=config.num_pages,
        cache_bytes=config.cache_bytes,
        step_bytes=step_bytes(model, config),
        padding=padding_rows(config.kernels, config.max_sequences),
    )


def cache_dtypes(
    model: ModelConfig, config: EngineConfig, capability: tuple[int, int] | None = None
) -> tuple[torch.dtype, torch.dtype]:
    """(convolution inputs', keys' and values'), as ``Caches.allocate`` takes them.

    ``capability`` is that of a GPU which is only planned for; None: the device's own.
    """
    dtype = getattr(torch, config.torch_cache_dtype)
    fp8 = model.quantization is not None and model.quantization.kv_cache == "fp8"
    if config.kv_dtype == "fp8" or (config.kv_dtype == "auto" and fp8 and _has_fp8_pages(model, config, capability)):
        return dtype, torch.float8_e4m3fn
    return dtype, dtype if config.kv_dtype == "auto" else getattr(torch, config.kv_dtype)


def _has_fp8_pages(model: ModelConfig, config: EngineConfig, capability: tuple[int, int] | None) -> bool:
    """Whether the attention kernels take them; the Triton ones say so too, later and by an error."""
    if config.kernels != "triton" or model.attention is None:
        return True
    device = torch.device(config.device)
    fits = device.type != "cuda" or (capability or torch.cuda.get_device_capability(device)) >= (8, 9)
    return fits and model.attention.head_dim % 16 == 0


def step_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """What a step's tensors take on a GPU at most: activations of its rows, logits and scratch of its slots."""
    chunk = config.max_batched_tokens or config.prefill_chunk + config.max_sequences
    widest = max(model.mamba.projection_size if model.mamba else 0, 8 * model.hidden_size)
    # Logits are 4 bytes a token of the vocabulary, the sampler's lists 8; attention leaves 72 partial sums a head.
    attention = 72 * 4 * model.attention.num_heads * (model.attention.head_dim + 2) if model.attention else 0
    moe = 4 * 8 * model.moe.top_k * (model.moe.latent_size or model.hidden_size) if model.moe else 0
    return config.max_sequences * (12 * model.vocab_size + attention) + chunk * (4 * 4 * widest + moe)


def scheduler_limits(config: EngineConfig, sizes: CacheSizes, model: ModelConfig) -> scheduling.Limits:
    """What the scheduler may plan with. A model without Mamba layers may be cut anywhere."""
    boundary = model.mamba.chunk_size if model.mamba else 1
    chunk = -(-config.prefill_chunk // boundary) * boundary
    return scheduling.Limits(
        num_slots=sizes.num_slots,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        prefill_chunk=chunk,
        max_batched_tokens=config.max_batched_tokens or chunk + config.max_sequences,
        boundary=boundary,
        max_context=sizes.max_context,
        preempt_bytes=config.preempt_bytes,
        page_bytes=sizes.page_bytes,
        slot_bytes=sizes.slot_bytes,
    )
