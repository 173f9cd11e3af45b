"""A checkpoint folder becomes a model."""

from __future__ import annotations

from pathlib import Path

import torch

from headrace.engine.config import ModelConfig
from headrace.engine.model.nemotron_h import NemotronH
from headrace.engine.model.weights import load_weights
from headrace.kernels import select


def load_model(
    path: str | Path, device: torch.device | str = "cpu", *, progress: bool = False, backend: str = "reference"
) -> NemotronH:
    """Read ``config.json`` and the safetensors files of a checkpoint folder.

    progress: show a bar on stderr. Raises ConfigError or CheckpointError.
    """
    config, kernels = ModelConfig.load(path), select(backend)
    return NemotronH(config, load_weights(path, config, device=device, progress=progress), kernels)
