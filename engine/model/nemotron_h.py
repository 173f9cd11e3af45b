"""Nemotron-H: embedding, then x <- x + mixer(norm(x)) layer by layer in the pattern's order, a norm, the head.

Attention, Mamba-2, mixture-of-experts and dense layers stand in any order; each has one norm before its mixer and
none after. There is no positional encoding anywhere: order comes from the Mamba layers.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import torch
from torch import Tensor

from headrace.engine.config import ConfigError, LayerKind, ModelConfig
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.layers import Embedding, Linear, Weights, load_norm
from headrace.engine.model.mixers import Layer, make_layer
from headrace.engine.model.mtp import MtpModule
from headrace.kernels import Kernels, select


class NemotronH:
    """The decoder. ``weights`` holds what ``weights.names`` lists for ``config``.

    Raises ConfigError if the kernels do not take the checkpoint's weight formats.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels | None = None) -> None:
        self.kernels = kernels = kernels or select()
        formats = config.quantization.formats if config.quantization else frozenset()
        if missing := sorted(formats - kernels.formats):
            taken = ", ".join(sorted(kernels.formats))
            raise ConfigError(
                f"the checkpoint has {' and '.join(missing)} weights, these kernels take {taken}; "
                "backend 'reference' takes all"
            )
        self.config = config
        self.embeddings = Embedding(kernels, weights, "embeddings")
        seen: Counter[LayerKind] = Counter()
        self.layers: list[Layer] = []
        for index, kind in enumerate(config.layers):
            self.layers.append(make_layer(config, kernels, weights, f"layers.{index}", kind, seen[kind]))
            seen[kind] += 1
        self.norm_f = load_norm(weights, "norm_f", config.norm_eps)
        self.lm_head = Linear(kernels, weights, "lm_head")
        self.mtp = MtpModule(config, kernels, weights, self.embeddings) if config.mtp_layers else None

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Caches) -> Tensor:
        """Run one step and advance the caches -> hidden states [T, hidden] fp32 after the final norm."""
        # With chunks among the rows torch joins what several ops have written, so they cannot wait for each other.
        with nullcontext() if batch.chunk_slots else self.kernels.together():
            x = self.embeddings(batch.token_ids)
            for layer in self.layers:
                x = layer(x, batch, caches)
            hidden: Tensor = self.kernels.rms_norm(x, self.norm_f)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] as ``forward`` gives it -> [R, vocab] fp32."""
        return self.lm_head(hidden)
