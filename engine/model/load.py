"""A checkpoint folder becomes a model."""

from __future__ import annotations

from pathlib import Path

import torch

from headrace.engine.config import ModelConfig
from headrace.engine.model.nemotron_h import NemotronH
from headrace.engine.model.weights import open_weights
from headrace.kernels import Kernels, select


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    progress: bool = False,
    kernels: Kernels | None = None,
) -> NemotronH:
    """Read ``config.json`` and the safetensors files of a checkpoint folder, packing weights as they come.

    kernels: the references if None. progress: show a bar on stderr. Raises ConfigError or CheckpointError.
    """
    config = ModelConfig.load(path)
    with open_weights(path, config, device=device, progress=progress) as weights:
        return NemotronH(config, weights, kernels or select())
