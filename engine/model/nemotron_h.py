"""Nemotron-H: embedding, then x <- x + mixer(norm(x)) layer by layer in the pattern's order, a norm, the head.

Attention, Mamba-2, mixture-of-experts and dense layers stand in any order; each has one norm before its mixer and
none after. There is no positional encoding anywhere: order comes from the Mamba layers.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from headrace.engine.config import LayerKind, ModelConfig
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.layers import Embedding, Linear, RMSNorm, Weights
from headrace.engine.model.mixers import make_mixer
from headrace.engine.model.mtp import MtpModule
from headrace.kernels import Kernels, select


class Block:
    """x + mixer(norm(x))."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Weights, name: str, kind: LayerKind, index: int
    ) -> None:
        self.norm = RMSNorm(kernels, weights, f"{name}.norm", config.norm_eps)
        self.mixer = make_mixer(config, kernels, weights, f"{name}.mixer", kind, index)

    def __call__(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        """x [T, hidden] -> [T, hidden]; advances the layer's caches."""
        return x + self.mixer(self.norm(x), batch, caches)


class NemotronH:
    """The decoder. ``weights`` holds the tensors that ``weights.names`` lists for ``config``."""

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels | None = None) -> None:
        kernels = kernels or select()
        self.config = config
        self.embeddings = Embedding(weights, "embeddings")
        seen: Counter[LayerKind] = Counter()
        self.blocks: list[Block] = []
        for index, kind in enumerate(config.layers):
            self.blocks.append(Block(config, kernels, weights, f"layers.{index}", kind, seen[kind]))
            seen[kind] += 1
        self.norm_f = RMSNorm(kernels, weights, "norm_f", config.norm_eps)
        self.lm_head = Linear(kernels, weights, "lm_head")
        self.mtp = MtpModule(config, kernels, weights, self.embeddings) if config.mtp_layers else None

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Caches) -> Tensor:
        """Run one step and advance the caches -> hidden states [T, hidden] fp32 after the final norm."""
        x = self.embeddings(batch.token_ids)
        for block in self.blocks:
            x = block(x, batch, caches)
        return self.norm_f(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] as ``forward`` gives it -> [R, vocab] fp32."""
        return self.lm_head(hidden)
