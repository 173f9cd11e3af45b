"""The multi-token-prediction module: from a hidden state and the token after it, a draft of the token after that.

    u = eh_proj [enorm(embedding(token_{t+1})), hnorm(h_t)];   u <- u + mixer(norm(u)), layer by layer;
    g_t = final_layernorm(u);   the draft of token t + 2 is lm_head(g_t)

h_t is the model's hidden state after its final norm, and the head is the model's. For the draft after the next, the
module runs again with g in place of h. Source: the released checkpoints' ``mtp.*`` tensors and vLLM's
nemotron_h_mtp.py (structure); transformers has no implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.engine.config import LayerKind, ModelConfig
from headrace.engine.model.batch import Batch, Caches
from headrace.engine.model.layers import Embedding, Linear, Weights, load_norm
from headrace.engine.model.mixers import Layer, make_layer
from headrace.kernels import Kernels
from headrace.kernels.norm import Norm

PAGE_SIZE = 16
"""Tokens per page of a draft's context, as the engine's own by default: kernels are compiled for a page size."""


class MtpModule:
    """Drafts for whole sequences. It shares the model's embedding."""

    def __init__(self, config: ModelConfig, kernels: Kernels, weights: Weights, embeddings: Embedding) -> None:
        eps = config.norm_eps
        self.config = config
        self.embeddings = embeddings
        self.kernels = kernels
        halves = [load_norm(weights, f"mtp.layers.0.{half}", eps).weight for half in ("enorm", "hnorm")]
        self.eh_norm = Norm(torch.cat(halves), eps, groups=2)
        self.eh_proj = Linear(kernels, weights, "mtp.layers.0.eh_proj")
        self.layers: list[Layer] = []
        attentions = 0
        for index, kind in enumerate(config.mtp_layers):
            self.layers.append(make_layer(config, kernels, weights, f"mtp.layers.{index}", kind, attentions))
            attentions += kind is LayerKind.ATTENTION
        self.final_norm = load_norm(weights, f"mtp.layers.{len(config.mtp_layers) - 1}.final_layernorm", eps)

    @torch.inference_mode()
    def forward(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """A whole sequence from its first token.

        hidden [T, hidden] fp32: h_t (or g_t of the draft before); next_ids [T] int64: the token after t -> g
        [T, hidden]. ``NemotronH.logits(g)[t]`` then decides token t + 2.
        """
        x = self.eh_proj((self.embeddings(next_ids), hidden), norm=self.eh_norm)
        batch, caches = self._one_sequence(next_ids)
        for layer in self.layers:
            x = layer(x, batch, caches)
        drafts: Tensor = self.kernels.rms_norm(x, self.final_norm)
        return drafts

    def _one_sequence(self, token_ids: Tensor) -> tuple[Batch, Caches]:
        """The sequence as a single chunk; its pages lie in order."""
        length, device = token_ids.shape[0], token_ids.device
        num_pages = -(-length // PAGE_SIZE)
        none = torch.empty(0, dtype=torch.int64, device=device)
        page_table = torch.arange(num_pages, dtype=torch.int32, device=device)[None]
        batch = Batch(token_ids, none, none, (0,), (0,), (length,), page_table, none)
        pages: tuple[Tensor, ...] = ()
        if attention := self.config.attention:
            shape = (num_pages, PAGE_SIZE, attention.num_kv_heads, attention.head_dim)
            count = self.config.mtp_layers.count(LayerKind.ATTENTION)
            pages = tuple(torch.zeros(shape, device=device) for _ in range(2 * count))
        return batch, Caches(pages[0::2], pages[1::2], (), ())
